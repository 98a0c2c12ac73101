"""Losses of ONE, the on-the-fly native ensemble (Lan, Zhu and Gong, NeurIPS 2018, arXiv 1806.04606).

Branches of one network are taught by an ensemble of themselves that learns with them; what follows is the authors'
released code. PCL and FFL keep the shape of this loss and put another teacher in the ensemble's place.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from hfkd.losses.online_adversarial import distillation_kl


def gated_ensemble(logits: Tensor, gates: Tensor) -> Tensor:
    """z_e = sum over i of g_i z_i, (N, K): the teacher of ONE.

    Args:
        logits: (S, N, K) of the branches.
        gates: (N, S), non-negative and of sum 1 for each image.
    """
    # Not a matrix product, which autocast would take in half precision.
    return (gates.T[..., None] * logits).sum(dim=0)


def ensemble_losses(
    logits: Sequence[Tensor], teacher: Tensor, labels: Tensor, temperature: float = 3.0, kl_weight: float = 1.0
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """CE(z_i) + w T^2 KL(softmax(z_e / T) || softmax(z_i / T)) of each branch, then CE(z_e).

    The teacher learns from the labels alone: to the KL terms it is a target, and gets no gradient. So it is in the
    released code, and the weights of the terms are that code's.

    Args:
        logits: (N, K) of each branch.
        teacher: z_e (N, K), with its graph.
        labels: (N,) class numbers.
        temperature: T > 0 (released code: 3).
        kl_weight: w; the released code ramps it up, see `kl_rampup`.

    Returns:
        The losses, one more than there are branches, and the parts: `student_<i>_ce`, `student_<i>_kl` and
        `teacher_ce`; all 0-dim means over the images.
    """
    losses: list[Tensor] = []
    parts: dict[str, Tensor] = {}
    for i, own in enumerate(logits):
        cross_entropy = parts[f"student_{i}_ce"] = F.cross_entropy(own, labels)
        kl = parts[f"student_{i}_kl"] = distillation_kl(own, teacher, temperature)
        losses.append(cross_entropy + kl_weight * kl)
    parts["teacher_ce"] = F.cross_entropy(teacher, labels)
    return [*losses, parts["teacher_ce"]], parts
