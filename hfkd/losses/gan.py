"""Losses of generative adversarial networks: non-saturating, with a penalty on the discriminator's gradient.

`discriminator_loss` and `generator_loss` are the game of Goodfellow et al. (NeurIPS 2014, arXiv 1406.2661) in logits,
with the generator's loss of its section 3 that does not saturate; StyleGAN2 and ADA train with them and `r1_penalty`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """E softplus(-D(x)) + E softplus(D(G(z))): at least 0, and 2 log 2 where D = 0 everywhere.

    Args:
        real: (N,) logits of real images.
        fake: (M,) logits of generated images.
    """
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """E softplus(-D(G(z))), of logits (M,) of generated images: at least 0, with a gradient even where D is sure."""
    return F.softplus(-fake).mean()


def r1_penalty(logits: Tensor, images: Tensor, weight: float) -> Tensor:
    """weight / 2 E ||grad D(x)||^2, at real images (Mescheder et al., ICML 2018, arXiv 1801.04406, eq. 9).

    Args:
        logits: (N,) of D, each of its own image alone.
        images: (N, C, H, W) that they were computed from, with `requires_grad`.
        weight: gamma.

    Returns:
        A mean over images, 0-dim, whose gradient reaches D's parameters. A penalty taken in every k-th update alone
        counts k times there (Karras et al., CVPR 2020, arXiv 1912.04958, section 3.1).
    """
    (gradients,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return weight / 2 * gradients.square().flatten(1).sum(dim=1).mean()
