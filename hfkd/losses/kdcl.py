"""The teachers of KDCL: knowledge distillation via collaborative learning (Guo et al., CVPR 2020).

Students that are trained together are taught by one ensemble of their logits. No code of the authors is known; the
variants follow public descriptions of the paper, and what they leave open says "inferred".

Logits come as (S, N, K), of S students on N images with K classes; labels as (N,). What is returned is a target:
logits (N, K) without gradient.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


KdclVariant = Literal["naive", "linear", "minlogit", "general", "mean"]

# Both are inferred. Fifty halvings of [0, 1] are float64's precision.
BISECTIONS = 50
EXPONENTIATED_STEPS = 50


@torch.no_grad()
def ensemble_teacher(logits: Tensor, labels: Tensor, variant: KdclVariant, weights: Tensor | None = None) -> Tensor:
    """z_t of the variant, (N, K); `mean` is the plain average of the logits, a control that the paper lacks.

    Args:
        logits: (S, N, K) of the students.
        labels: (N,) class numbers.
        variant: which teacher.
        weights: (S,), of `general` alone: see `general_weights`.

    Raises:
        ValueError: an unknown variant, or `general` without weights.
    """
    if variant == "naive":
        return naive_teacher(logits, labels)
    if variant == "linear":
        return linear_teacher(logits, labels)
    if variant == "minlogit":
        return minlogit_teacher(logits, labels)
    if variant == "mean":
        return logits.mean(dim=0)
    if variant != "general":
        raise ValueError(f"variant={variant!r} is unknown: choose naive, linear, minlogit, general or mean")
    if weights is None:
        raise ValueError("variant='general' needs weights: take those of general_weights")
    return _combine(weights.to(logits)[:, None], logits)


@torch.no_grad()
def naive_teacher(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each image, the logits of the student with the smallest cross-entropy."""
    best = _cross_entropies(logits, labels).argmin(dim=0)
    return logits[best, torch.arange(len(labels), device=labels.device)]


@torch.no_grad()
def linear_teacher(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each image, the convex combination of the students' logits with the smallest cross-entropy.

    The problem is convex. Two students are solved by bisection of the derivative, more by exponentiated gradient
    (inferred). Its cross-entropy is never above that of `naive_teacher`.
    """
    solve = _bisected_weights if len(logits) == 2 else _exponentiated_weights
    combined, single = _combine(solve(logits, labels), logits), naive_teacher(logits, labels)
    # A vertex of the simplex is reached in the limit only.
    errors = _cross_entropies(torch.stack([combined, single]), labels)
    return torch.where((errors[0] <= errors[1])[:, None], combined, single)


@torch.no_grad()
def minlogit_teacher(logits: Tensor, labels: Tensor) -> Tensor:
    """z_t[j] = min over i of (z_i[j] - z_i[y]): every wrong class as far below the right one as in any student.

    So z_t[y] = 0, and its cross-entropy is never above that of any student.
    """
    own = labels.expand(logits.shape[:2])[..., None]
    return (logits - logits.gather(-1, own)).amin(dim=0)


@torch.no_grad()
def error_covariance(logits: Tensor, labels: Tensor) -> Tensor:
    """C_ij = mean over images of <p_i - y, p_j - y>, float64 (S, S), with p_i = softmax(z_i) and y one-hot.

    To be measured on images that the students are not trained on.
    """
    errors = _residuals(logits.double(), labels)
    return torch.einsum("ink,jnk->ij", errors, errors) / len(labels)


@torch.no_grad()
def general_weights(covariance: Tensor, ridge: float = 1e-6) -> Tensor:
    """w = C^-1 1 / (1' C^-1 1), (S,): the weights of sum 1 whose combined error w' C w is the smallest.

    They may be negative. Whether the paper combines logits or probabilities by them differs between descriptions;
    here it is logits (inferred).

    Args:
        covariance: (S, S), see `error_covariance`.
        ridge: added to the diagonal, as a fraction of its mean (inferred): students that err alike make C singular.
    """
    count = len(covariance)
    size = covariance.diagonal().mean().clamp(min=torch.finfo(covariance.dtype).eps)
    identity = torch.eye(count, dtype=covariance.dtype, device=covariance.device)
    raw = torch.linalg.solve(covariance + ridge * size * identity, covariance.new_ones(count))
    return raw / raw.sum()


def _cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """(S, N)."""
    return F.cross_entropy(logits.movedim(-1, 1), labels.expand(logits.shape[:2]), reduction="none")


def _residuals(logits: Tensor, labels: Tensor) -> Tensor:
    """softmax(z) - y, the derivative of the cross-entropy by z, in the shape (..., N, K) of the logits."""
    return logits.softmax(dim=-1) - F.one_hot(labels, logits.shape[-1]).to(logits)


def _combine(weights: Tensor, logits: Tensor) -> Tensor:
    """sum over i of w_i z_i, (N, K), with weights (S, N) or (S, 1)."""
    return (weights[..., None] * logits).sum(dim=0)


def _bisected_weights(logits: Tensor, labels: Tensor) -> Tensor:
    """The best weights (2, N) of two students: where the derivative, which rises, changes its sign in [0, 1]."""
    first, second = logits
    low, high = (torch.full(first.shape[:1], end, dtype=first.dtype, device=first.device) for end in (0.0, 1.0))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        mixed = second + middle[:, None] * (first - second)
        rising = (_residuals(mixed, labels) * (first - second)).sum(dim=-1) > 0
        low, high = torch.where(rising, low, middle), torch.where(rising, middle, high)
    return torch.stack([high, 1 - high])


def _exponentiated_weights(logits: Tensor, labels: Tensor) -> Tensor:
    """The best weights (S, N) on the simplex: multiplied by exp(-rate * gradient), as long as that helps.

    The first rate is the inverse of the curvature's bound, the squared half-width of the centred logits. It grows by a
    fifth after a step that lowers an image's cross-entropy; another step is taken back, and the rate falls to 0.3.
    """
    centred = logits - logits.mean(dim=0)
    spread = (centred.amax(dim=-1) - centred.amin(dim=-1)).amax(dim=0)
    rate = 4 / spread.square().clamp(min=torch.finfo(logits.dtype).eps)
    weights = torch.full_like(logits[..., 0], 1 / len(logits))
    mixed = _combine(weights, logits)
    error = F.cross_entropy(mixed, labels, reduction="none")
    for _ in range(EXPONENTIATED_STEPS):
        gradient = (_residuals(mixed, labels) * centred).sum(dim=-1)
        trial = (weights.log() - rate * gradient).softmax(dim=0)
        trial_mixed = _combine(trial, logits)
        trial_error = F.cross_entropy(trial_mixed, labels, reduction="none")
        better = trial_error < error
        weights, rate = torch.where(better, trial, weights), torch.where(better, 1.2 * rate, 0.3 * rate)
        mixed, error = torch.where(better[:, None], trial_mixed, mixed), torch.where(better, trial_error, error)
    return weights
