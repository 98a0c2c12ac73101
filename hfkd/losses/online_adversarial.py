"""Losses of AFD: feature-map-level online adversarial knowledge distillation.

Chung, Park, Kim and Kwak, ICML 2020 (arXiv 2002.01775). No code of the authors is public. The equations (logit loss,
least-squares adversarial loss, the cycle) are the paper's; what it leaves open and is decided here says "inferred".

Every function takes plain tensors and returns the mean over the mini-batch as a scalar, without hidden weights.
"""

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor


GanLoss = Literal["lsgan_sigmoid", "lsgan_linear", "bce_nonsat", "hinge"]
GAN_LOSSES: tuple[GanLoss, ...] = ("lsgan_sigmoid", "lsgan_linear", "bce_nonsat", "hinge")


def previous(student: int, count: int) -> int:
    """Who `student` learns from in the cycle 0 -> 1 -> ... -> count-1 -> 0, for logits and feature maps alike.

    With `count == 2` this is the mutual pair: one rule serves both cases.
    """
    return (student - 1) % count


def distillation_kl(logits: Tensor, peer_logits: Tensor, temperature: float = 3.0) -> Tensor:
    """T^2 KL(softmax(peer / T) || softmax(self / T)): the second term of L_logit (paper, eq. 13).

    The peer is the target and is detached (inferred: ONE and FFL, whose schedule the paper follows, both detach).
    T^2 keeps the gradient's size independent of T (Hinton et al., 2015).

    Args:
        logits: (N, K) logits of the network that learns, z_k.
        peer_logits: (N, K) logits of the network that it learns from, z_prev(k).
        temperature: T > 0. The value 3 is inferred.

    Raises:
        ValueError: if the shapes differ or `temperature` is not positive.
    """
    if logits.shape != peer_logits.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and peer_logits {tuple(peer_logits.shape)} differ in shape")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
    target = F.log_softmax(peer_logits.detach() / temperature, dim=-1)
    divergence = F.kl_div(F.log_softmax(logits / temperature, dim=-1), target, reduction="batchmean", log_target=True)
    return temperature**2 * divergence


def kl_rampup(epoch: float, rampup_epochs: float) -> float:
    """Weight of the KL term while it is ramped up: exp(-5 (1 - min(e, E) / E)^2), in (0, 1]; 1 when E is 0.

    Not in the paper's equation; an option because ONE and FFL use it (with E = 80).
    """
    if rampup_epochs <= 0:
        return 1.0
    return math.exp(-5.0 * (1.0 - min(epoch, rampup_epochs) / rampup_epochs) ** 2)


def discriminator_loss(real: Tensor, fake: Tensor, kind: GanLoss = "lsgan_sigmoid") -> Tensor:
    """L_D^k = (1 - D_k(f_prev(k)))^2 + D_k(f_k)^2, the mean over all scores (paper, eq. 14; no factor 1/2).

    Args:
        real: scores of the maps of the network that k learns from (target 1), any shape: (N,), or (N, P) for patches.
        fake: scores of network k's own maps (target 0).
        kind: `lsgan_sigmoid` is the paper's, on scores in (0, 1); `lsgan_linear` the same squares on unbounded
            scores; `bce_nonsat` (non-saturating) and `hinge` on unbounded scores are for ablations.

    Raises:
        ValueError: on an unknown `kind`.
    """
    _check_kind(kind)
    if kind == "bce_nonsat":
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return (1 - real).square().mean() + fake.square().mean()


def generator_loss(fake: Tensor, kind: GanLoss = "lsgan_sigmoid") -> Tensor:
    """L_G^k = (1 - D_k(f_k))^2: the feature extractor's part, mean over all scores (paper, eq. 14).

    Arguments and errors as in `discriminator_loss`. At the equilibrium D = 1/2: L_G = 0.25 and L_D = 0.5.
    """
    _check_kind(kind)
    if kind == "bce_nonsat":
        return F.softplus(-fake).mean()
    if kind == "hinge":
        return -fake.mean()
    return (1 - fake).square().mean()


def undecided_score(kind: GanLoss = "lsgan_sigmoid") -> float:
    """The score between real and fake: 0.5 for the least-squares targets 0 and 1, 0 for logits and hinge scores."""
    _check_kind(kind)
    return 0.5 if kind.startswith("lsgan") else 0.0


def alignment_loss(feature_map: Tensor, peer_map: Tensor, power: int = 1, normalize: bool = False) -> Tensor:
    """mean |f_k - f_prev(k)|^p: the direct alignment ("L1", "L2") that the paper compares with; the peer is detached.

    The paper's norm and weight are not published: the mean over batch, channels and positions is inferred.

    Args:
        feature_map: (N, C, H, W) map of the network that learns.
        peer_map: (N, C, H, W) map of the network that it learns from.
        power: 1 or 2.
        normalize: divide each sample's flattened map by its l2 norm first.

    Raises:
        ValueError: if the shapes differ or `power` is neither 1 nor 2.
    """
    if feature_map.shape != peer_map.shape:
        raise ValueError(f"feature maps {tuple(feature_map.shape)} and {tuple(peer_map.shape)} differ in shape")
    if power not in (1, 2):
        raise ValueError(f"power={power} must be 1 or 2")
    own, peer = feature_map.flatten(1), peer_map.detach().flatten(1)
    if normalize:
        own, peer = F.normalize(own, dim=1), F.normalize(peer, dim=1)
    distance = (own - peer).abs()
    return (distance if power == 1 else distance.square()).mean()


def _check_kind(kind: str) -> None:
    if kind not in GAN_LOSSES:
        raise ValueError(f"gan_loss={kind!r} is unknown: choose one of {', '.join(GAN_LOSSES)}")
