"""Losses between what a student and a trained teacher compute on the way to their logits.

- FitNets (Romero et al., ICLR 2015, arXiv 1412.6550): `hint_loss`.
- Attention transfer (Zagoruyko and Komodakis, ICLR 2017, arXiv 1612.03928): `attention_transfer_loss`.
- RKD (Park et al., CVPR 2019, arXiv 1904.05068): `relational_distance_loss`, `relational_angle_loss`.
- CRD (Tian et al., ICLR 2020, arXiv 1910.10699): `contrastive_loss`; its memory is `hfkd.models.distillation_layers`.
- ReviewKD (Chen et al., CVPR 2021, arXiv 2104.09044): `hierarchical_context_loss`; its fusion is there too.

Teacher tensors are detached. All results are 0-dim. The scale of each is that of the released code, because published
weights (100 for hints, 1000 for attention, 25 and 50 for relations) belong to it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


# Sides of the pooled maps that ReviewKD compares beside the whole ones.
CONTEXT_SIDES = (4, 2, 1)


def at_common_size(feature_map: Tensor, teacher_map: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps (N, C, H, W), average-pooled to the smaller height and the smaller width."""
    height, width = (min(sides) for sides in zip(feature_map.shape[2:], teacher_map.shape[2:], strict=True))

    def pooled(f: Tensor) -> Tensor:
        return f if f.shape[2:] == (height, width) else F.adaptive_avg_pool2d(f, (height, width))

    return pooled(feature_map), pooled(teacher_map)


def hint_loss(regressed: Tensor, teacher_map: Tensor) -> Tensor:
    """Mean over all entries of (r(F_s) - F_t)^2 (FitNets, eq. 3, which sums and halves).

    Args:
        regressed: (N, C, H', W'), the student's map after a regressor to the teacher's C channels.
        teacher_map: (N, C, H, W); the larger map is average-pooled.

    Raises:
        ValueError: if the widths differ.
    """
    if regressed.shape[:2] != teacher_map.shape[:2]:
        raise ValueError(
            f"maps {tuple(regressed.shape)} and {tuple(teacher_map.shape)} differ in width: use a regressor"
        )
    return F.mse_loss(*at_common_size(regressed, teacher_map.detach()))


def attention_transfer_loss(feature_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Mean over all entries of (Q_s - Q_t)^2, with Q = q / |q|_2 and q the mean square of the channels (eq. 2).

    It does not change when either map is scaled. The paper's formula has the norm of the difference; the mean of
    squares is its code's.

    Args:
        feature_map, teacher_map: (N, C, H, W), of any widths; the larger one is average-pooled.
    """
    student, teacher = at_common_size(feature_map, teacher_map.detach())
    return F.mse_loss(_attention(student), _attention(teacher))


def relational_distance_loss(embeddings: Tensor, teacher_embeddings: Tensor) -> Tensor:
    """Huber loss between the distances of all pairs, each in units of their mean (RKD, eq. 5 to 7).

    The mean is over all N^2 pairs, those of a sample with itself (0) included, as in the released code: 0 of one
    sample. It does not change when either side is rotated, shifted or scaled.

    Args:
        embeddings, teacher_embeddings: (N, D) and (N, D').
    """
    student, teacher = _relative_distances(embeddings), _relative_distances(teacher_embeddings.detach())
    # Each pair comes once.
    return 2 * F.smooth_l1_loss(student, teacher, reduction="sum") / len(embeddings) ** 2


def relational_angle_loss(embeddings: Tensor, teacher_embeddings: Tensor) -> Tensor:
    """Huber loss between the cosines of the angles at x_i of all triplets (RKD, eq. 8 to 10), the mean over N^3.

    Triplets with a sample twice count as no difference, as in the released code: 0 of two samples. Memory is
    N^2 (N + D). Arguments and invariances as in `relational_distance_loss`.
    """
    return F.smooth_l1_loss(_cosines(embeddings), _cosines(teacher_embeddings.detach()))


def contrastive_loss(scores: Tensor, population: int) -> Tensor:
    """-log h of the positive and -log(1 - h) of k negatives, with h = e^s / (e^s + k / M) (CRD, eq. 17 and 19).

    Noise-contrastive estimation: h is the probability that a pair is of one image, where k of its k + 1 partners were
    drawn from all M images.

    Args:
        scores: (N, 1 + k), log of the normalised similarity; the positive first.
        population: M, at least 1.

    Returns:
        The mean over the N samples of the sum over their pairs.
    """
    against_noise = scores - math.log((scores.shape[1] - 1) / population)
    return (F.softplus(-against_noise[:, 0]) + F.softplus(against_noise[:, 1:]).sum(dim=1)).mean()


def hierarchical_context_loss(fused: Tensor, teacher_map: Tensor) -> Tensor:
    """HCL: the mean square difference of whole maps and of maps pooled to 4, 2 and 1 positions a side (section 3.4).

    Levels that are not smaller than the map are left out; weights are 1, 1/2, 1/4, ... over their sum (released code).

    Args:
        fused, teacher_map: (N, C, H, W), equal in shape.

    Raises:
        ValueError: if the shapes differ.
    """
    if fused.shape != teacher_map.shape:
        raise ValueError(f"maps {tuple(fused.shape)} and {tuple(teacher_map.shape)} differ in shape")
    teacher_map = teacher_map.detach()
    loss, weights = F.mse_loss(fused, teacher_map), 1.0
    sides = [side for side in CONTEXT_SIDES if side < min(fused.shape[2:])]
    for level, side in enumerate(sides, start=1):
        own, other = (F.adaptive_avg_pool2d(f, side) for f in (fused, teacher_map))
        loss, weights = loss + 0.5**level * F.mse_loss(own, other), weights + 0.5**level
    return loss / weights


def _attention(feature_map: Tensor) -> Tensor:
    """(N, H W), of length 1: how strong the map is at each position."""
    return F.normalize(feature_map.square().mean(dim=1).flatten(1), dim=1)


def _relative_distances(embeddings: Tensor) -> Tensor:
    """(N (N - 1) / 2,) distances over their mean; zeros where all embeddings are one."""
    distances = F.pdist(embeddings)
    return distances / distances.mean().clamp(min=torch.finfo(distances.dtype).tiny)


def _cosines(embeddings: Tensor) -> Tensor:
    """(N, N, N): at [i, j, k] the cosine of the angle at x_i between x_j and x_k; 0 where x_j or x_k is x_i."""
    differences = embeddings[None] - embeddings[:, None]
    lengths = torch.linalg.vector_norm(differences, dim=2, keepdim=True)
    # Division by infinity: no direction, and no gradient, where there is no difference.
    directions = differences / lengths.where(lengths > 0, torch.inf)
    return directions @ directions.transpose(1, 2)
