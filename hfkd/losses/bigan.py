"""Losses of bidirectional GANs: ALI (Dumoulin et al., ICLR 2017, arXiv 1606.00704) and its Wasserstein form.

A discriminator D(x, z) scores pairs of the data's joint distribution, (x, E(x)), and of the generator's, (G(z), z).
ALI's are its eq. 3 with the non-saturating generator loss of its section 2.3 and its code; the Wasserstein form with
gradient penalty (Gulrajani et al., NeurIPS 2017, arXiv 1704.00028) is that of the public Wasserstein-BiGAN code.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


BiGanLoss = Literal["ali", "wasserstein"]
BIGAN_LOSSES: tuple[BiGanLoss, ...] = ("ali", "wasserstein")
Pair = tuple[Tensor, Tensor]


def discriminator_loss(data: Tensor, samples: Tensor, kind: BiGanLoss = "ali") -> Tensor:
    """What the discriminator minimises, a mean over pairs.

    `ali`: softplus(-D(x, E(x))) + softplus(D(G(z), z)), at least 0, 2 log 2 where D = 0 everywhere.
    `wasserstein`: D(G(z), z) - D(x, E(x)), to which `gradient_penalty` is added.

    Args:
        data: (N,) scores (logits) of pairs (x, E(x)).
        samples: (N,) scores of pairs (G(z), z).
        kind: which of the two.

    Raises:
        ValueError: on an unknown `kind`.
    """
    _check_kind(kind)
    if kind == "wasserstein":
        return samples.mean() - data.mean()
    return F.softplus(-data).mean() + F.softplus(samples).mean()


def generator_loss(data: Tensor, samples: Tensor, kind: BiGanLoss = "ali") -> Tensor:
    """What encoder and generator minimise together: the same with the two kinds of pairs exchanged.

    `ali`: softplus(D(x, E(x))) + softplus(-D(G(z), z)), which does not saturate where D is right. Arguments and
    errors as in `discriminator_loss`.
    """
    return discriminator_loss(samples, data, kind)


def gradient_penalty(critic: Callable[[Tensor, Tensor], Tensor], data: Pair, samples: Pair, mixing: Tensor) -> Tensor:
    """E (||grad D(x', z')||_2 - 1)^2, where (x', z') lie between pairs and the norm is over x' and z' jointly.

    Args:
        critic: D, which maps (N, C, H, W) and (N, L) to (N,) scores, each of its own pair alone.
        data: (x, E(x)).
        samples: (G(z), z). Neither gets a gradient; the critic's parameters do.
        mixing: (N,) in [0, 1]: x' = m x + (1 - m) G(z), z' = m E(x) + (1 - m) z with the same m.

    Returns:
        The mean over pairs, without the weight lambda.
    """
    between = []
    for real, made in zip(data, samples, strict=True):
        share = mixing.view(-1, *[1] * (real.ndim - 1)).to(real.dtype)
        between.append((share * real.detach() + (1 - share) * made.detach()).requires_grad_())
    scores = critic(between[0], between[1])
    gradients = torch.autograd.grad(scores.sum(), between, create_graph=True)
    norms = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1).norm(dim=1)
    return (norms - 1).square().mean()


def _check_kind(kind: str) -> None:
    if kind not in BIGAN_LOSSES:
        raise ValueError(f"gan_loss={kind!r} is unknown: choose one of {', '.join(BIGAN_LOSSES)}")
