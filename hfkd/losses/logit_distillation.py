"""Losses between a student's logits and a trained teacher's: Hinton's KD and what followed it.

- KD (Hinton, Vinyals and Dean, 2015, arXiv 1503.02531): `distillation_kl`, which AFD shares.
- DKD (Zhao et al., CVPR 2022, arXiv 2203.08679): `decoupled_kd`.
- DIST (Huang et al., NeurIPS 2022, arXiv 2205.10536): `correlation_distillation`.
- Logit standardisation (Sun et al., CVPR 2024, arXiv 2403.01427): `standardised_kd`.

Every function takes logits (N, K) of the student and of the teacher, which is detached, and returns a 0-dim mean over
the batch. T is a temperature above 0; T^2 keeps the size of the gradient independent of it.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hfkd.losses.online_adversarial import distillation_kl


__all__ = [
    "correlation_distillation",
    "decoupled_divergences",
    "decoupled_kd",
    "distillation_kl",
    "inter_class_relation",
    "intra_class_relation",
    "joint_logits",
    "standardise",
    "standardised_kd",
]

# Below this deviation logits count as all equal (what the public code of standardisation adds to it).
SMALLEST_DEVIATION = 1e-7


def joint_logits(teacher_logits: Sequence[Tensor], temperature: float) -> Tensor:
    """Logits (N, K) of several teachers as one: softmax(z / T) is the mean of the teachers' softmax(z_j / T).

    It is the probabilities that are averaged, not the logits, so a teacher's scale does not become its weight. One
    teacher's logits are returned as they are.

    Raises:
        ValueError: no teacher, or shapes that differ.
    """
    if not teacher_logits or len({logits.shape for logits in teacher_logits}) > 1:
        shapes = [tuple(logits.shape) for logits in teacher_logits]
        raise ValueError(f"teacher_logits have shapes {shapes}: give one or more of one shape")
    if len(teacher_logits) == 1:
        return teacher_logits[0]
    log_probabilities = torch.stack([F.log_softmax(logits / temperature, dim=-1) for logits in teacher_logits])
    return temperature * (log_probabilities.logsumexp(dim=0) - math.log(len(teacher_logits)))


def decoupled_divergences(
    logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 4.0
) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD of each sample, (N,) each and at least 0 (DKD, eq. 5): KL = TCKD + (1 - p_y) NCKD.

    TCKD is the divergence between the two-way distributions "the label or not"; NCKD that between the distributions
    over the other classes alone; p_y is the teacher's probability of the label. All at temperature T, without T^2.

    Args:
        logits, teacher_logits: (N, K), K >= 2.
        labels: (N,) class numbers.
        temperature: T > 0.

    Raises:
        ValueError: if shapes differ or `temperature` is not positive.
    """
    _check(logits, teacher_logits, temperature)
    split = [_split_by_label(z / temperature, labels) for z in (logits, teacher_logits.detach())]
    (target, rest), (teacher_target, teacher_rest) = split
    return _divergence(teacher_target, target), _divergence(teacher_rest, rest)


def decoupled_kd(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 4.0,
    target_weight: float = 1.0,
    nontarget_weight: float = 8.0,
) -> Tensor:
    """T^2 (alpha TCKD + beta NCKD) (DKD, eq. 7): KD whose second term does not fade where the teacher is sure.

    Arguments and errors as in `decoupled_divergences`; alpha = 1 and beta = 8 are the paper's for ResNet-32x4 to
    ResNet-8x4 (its code takes 2 for ResNet-56 to ResNet-20).
    """
    target, nontarget = decoupled_divergences(logits, teacher_logits, labels, temperature)
    return temperature**2 * (target_weight * target + nontarget_weight * nontarget).mean()


def inter_class_relation(probabilities: Tensor, teacher_probabilities: Tensor) -> Tensor:
    """1 - mean over the N rows of Pearson's correlation between p_i and the teacher's, in [0, 2] (DIST, eq. 8)."""
    own, teachers = (p - p.mean(dim=1, keepdim=True) for p in (probabilities, teacher_probabilities.detach()))
    return 1 - F.cosine_similarity(own, teachers, dim=1).mean()


def intra_class_relation(probabilities: Tensor, teacher_probabilities: Tensor) -> Tensor:
    """The same over the K columns: how the samples of the batch rank for each class (DIST, eq. 9)."""
    return inter_class_relation(probabilities.T, teacher_probabilities.T)


def correlation_distillation(
    logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 4.0,
    inter_weight: float = 2.0,
    intra_weight: float = 2.0,
) -> Tensor:
    """T^2 (beta inter + gamma intra) of softmax(z / T) (DIST, eq. 10; T^2 as in its code).

    It is the teacher's preferences that are learnt, up to scale and shift of the probabilities. The intra-class term
    relates the images of a batch: it is no mean over independent samples.

    Args:
        logits, teacher_logits: (N, K).
        temperature: T > 0 (4 on CIFAR-100, 1 on ImageNet).
        inter_weight, intra_weight: beta and gamma, 2 each in the paper.

    Raises:
        ValueError: if shapes differ or `temperature` is not positive.
    """
    _check(logits, teacher_logits, temperature)
    student, teacher = ((z / temperature).softmax(dim=1) for z in (logits, teacher_logits.detach()))
    relations = inter_weight * inter_class_relation(student, teacher)
    return temperature**2 * (relations + intra_weight * intra_class_relation(student, teacher))


def standardise(logits: Tensor) -> Tensor:
    """Z-scores (N, K) of each sample's logits: mean 0, (unbiased) deviation 1 over the classes (Sun et al., alg. 1).

    They do not change when a sample's logits are shifted or scaled by a positive number. A sample whose logits are all
    equal has scores of zero, and no gradient.
    """
    deviation = logits.std(dim=-1, keepdim=True)
    scale = deviation.where(deviation > SMALLEST_DEVIATION, torch.inf)
    return (logits - logits.mean(dim=-1, keepdim=True)) / scale


def standardised_kd(logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0) -> Tensor:
    """`distillation_kl` of z-scores (Sun et al., alg. 2): the student need not match the teacher's logit range.

    Arguments and errors as there; T = 2 is the released code's most common choice.
    """
    return distillation_kl(standardise(logits), standardise(teacher_logits.detach()), temperature)


def _split_by_label(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (label, not label), (N, 2), and of the other classes among themselves, (N, K - 1)."""
    columns = torch.arange(logits.shape[1] - 1, device=logits.device)
    others = columns + (columns >= labels[:, None])
    log_probabilities = F.log_softmax(logits, dim=1)
    rest = log_probabilities.gather(1, others)
    of_rest = rest.logsumexp(dim=1, keepdim=True)
    return torch.cat([log_probabilities.gather(1, labels[:, None]), of_rest], dim=1), rest - of_rest


def _divergence(target: Tensor, own: Tensor) -> Tensor:
    """KL(target || own) of each sample, (N,), from log-probabilities."""
    return F.kl_div(own, target, reduction="none", log_target=True).sum(dim=1)


def _check(logits: Tensor, teacher_logits: Tensor, temperature: float) -> None:
    if logits.shape != teacher_logits.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and teacher_logits {tuple(teacher_logits.shape)} differ in shape"
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
