"""The losses of Squeeze-and-Span (Yang et al., NeurIPS 2022, arXiv 2211.03000), and with them VICReg's.

A generator's features h are squeezed into z_g = T(h), and a student gives z_f = S(a(x)) of the augmented image x.
Squeezing pulls the two together and keeps either from collapsing; spanning does the same for two views of real images.
The three terms are VICReg's (Bardes et al., ICLR 2022, arXiv 2105.04906) as the paper's public code has them: means
over all entries, and no half on the variance. The weights belong to this form.

Representations are (N, D). Statistics are of the N samples that are passed: those of several processes are gathered
before.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LossWeights(NamedTuple):
    """lambda, mu and nu. The defaults are the code's for CIFAR-10 and STL-10; CIFAR-100 has 10, 10, 1."""

    invariance: float = 25.0
    variance: float = 25.0
    covariance: float = 1.0


def representation_distillation(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over all N D entries of (z_g - z_f)^2 (eq. 8, which sums over the entries of a sample).

    Both sides get gradients. Raises ValueError where the shapes differ.
    """
    if teacher.shape != student.shape:
        raise ValueError(f"representations of shape {tuple(teacher.shape)} and {tuple(student.shape)} differ in shape")
    return F.mse_loss(student, teacher)


def variance_loss(z: Tensor, gamma: float = 1.0, epsilon: float = 1e-4) -> Tensor:
    """Mean over dimensions of max(0, gamma - sqrt(Var_j + epsilon)), with the unbiased variance; in [0, gamma].

    Raises ValueError for fewer than two samples.
    """
    _check_samples(z)
    return F.relu(gamma - torch.sqrt(z.var(dim=0) + epsilon)).mean()


def covariance_loss(z: Tensor) -> Tensor:
    """Sum of the squared covariances of different dimensions, over D; at least 0.

    D - 1 where all dimensions are one of unit variance. Raises ValueError for fewer than two samples.
    """
    _check_samples(z)
    count, width = z.shape
    centred = (z - z.mean(dim=0)) / (count - 1) ** 0.5
    if count >= width:
        covariance = centred.T @ centred
        return (covariance - covariance.diag().diag()).square().sum() / width
    # C = Z'Z and ZZ' have one Frobenius norm, and ZZ' is the smaller.
    variances = centred.square().sum(dim=0)
    return ((centred @ centred.T).square().sum() - variances.square().sum()).clamp(min=0) / width


def squeeze_loss(
    teacher: Tensor, student: Tensor, weights: LossWeights | None = None, *, regularize_teacher: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """lambda RD(z_g, z_f) + mu [var(z_f) + var(z_g)] + nu [cov(z_f) + cov(z_g)] (eq. 11), of synthetic samples.

    Args:
        teacher, student: z_g and z_f, (N, D). Both get gradients.
        weights: by default the code's for CIFAR-10.
        regularize_teacher: False leaves var(z_g) and cov(z_g) out, as the released code does.

    Returns:
        The loss, and its terms without their weights; a term of weight 0 is not computed.
    """
    weights = weights or LossWeights()
    parts = {"distillation": representation_distillation(teacher, student)}
    loss = weights.invariance * parts["distillation"]
    for name, z in {"student": student, "teacher": teacher}.items():
        if name == "student" or regularize_teacher:
            regularizer, terms = spread_loss(z, weights)
            loss = loss + regularizer
            parts |= {f"{name}_{term}": value for term, value in terms.items()}
    return loss, parts


def span_loss(view: Tensor, other: Tensor, weights: LossWeights | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """lambda d(z, z') + mu [var(z) + var(z')] + nu [cov(z) + cov(z')] (eq. 12), of two views: VICReg's loss.

    Args:
        view, other: representations (N, D) of two views of the same images. Both get gradients.
        weights: by default the code's for CIFAR-10.

    Returns:
        The loss, and its terms without their weights, `variance` and `covariance` as means of the two views'.
    """
    weights = weights or LossWeights()
    parts = {"invariance": representation_distillation(view, other)}
    regularizers, terms = zip(*(spread_loss(z, weights) for z in (view, other)), strict=True)
    parts |= {name: (terms[0][name] + terms[1][name]) / 2 for name in terms[0]}
    return weights.invariance * parts["invariance"] + regularizers[0] + regularizers[1], parts


def spread_loss(z: Tensor, weights: LossWeights) -> tuple[Tensor, dict[str, Tensor]]:
    """mu var(z) + nu cov(z), and the two terms; one of weight 0 is not computed."""
    functions = {"variance": (variance_loss, weights.variance), "covariance": (covariance_loss, weights.covariance)}
    parts = {name: function(z) for name, (function, weight) in functions.items() if weight}
    return sum((functions[name][1] * value for name, value in parts.items()), z.new_zeros(())), parts


def _check_samples(z: Tensor) -> None:
    if z.dim() != 2 or len(z) < 2:
        raise ValueError(
            f"representations of shape {tuple(z.shape)}: variance and covariance need (N, D) with N of 2 or more"
        )
