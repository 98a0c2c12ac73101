"""How alike images are, pixel by pixel: correlations, structural similarity, and spread within a class.

Images are (N, C, H, W) in [-1, 1], labels (N,) class numbers. A correlation is Pearson's over the C*H*W pixels of two
images: in [-1, 1], and 0 where one of the two is constant. Pairs are compared in chunks, within a class only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hfkd.errors import InputError


SSIM_LEAST_SIDE = 6  # pixels: its window of 11 is mirrored at the border
CHUNK = 1024  # images at a time


def class_mean_correlation(images: Tensor, labels: Tensor, reference: Tensor, reference_labels: Tensor) -> float:
    """Of each class's mean image with the mean of the `reference` of that class; mean over the classes of `labels`.

    What is common to a class's images: noise of single images averages out, and so does diversity.

    Raises:
        InputError: a class without `reference`.
    """
    classes, means = _class_means(images, labels)
    _, wanted = _class_means(reference, reference_labels, classes)
    return (_standardised(means) * _standardised(wanted)).sum(dim=1).mean().item()


def per_sample_correlation(images: Tensor, labels: Tensor, reference: Tensor, reference_labels: Tensor) -> float:
    """Of each image with the mean of the `reference` of its class; mean over the images.

    Real images reach less than 1, as they differ: held-out digits have 0.84.

    Raises:
        InputError: a class without `reference`.
    """
    classes = labels.unique()
    _, means = _class_means(reference, reference_labels, classes)
    wanted = _standardised(means)[torch.searchsorted(classes, labels)]
    return (_standardised(images) * wanted).sum(dim=1).mean().item()


def nearest_same_class(
    images: Tensor, labels: Tensor, training: Tensor, training_labels: Tensor, k: int = 1
) -> tuple[Tensor, Tensor]:
    """The `k` most correlated of the `training` images of the same class: correlations and row numbers, both (N, k).

    A mean of the first near 1 says that the images are copies.

    Raises:
        InputError: a class with fewer than `k` training images.
    """
    known = _standardised(training)
    correlations = known.new_zeros(len(images), k)
    nearest = torch.zeros(len(images), k, dtype=torch.long, device=images.device)
    for number in labels.unique():
        candidates = (training_labels == number).nonzero()[:, 0]
        if len(candidates) < k:
            raise InputError(
                f"class {int(number)} has {len(candidates)} real images to compare with and needs {k}: use data with "
                "all of the generator's classes"
            )
        for rows in (labels == number).nonzero()[:, 0].split(CHUNK):
            found = (_standardised(images[rows]) @ known[candidates].T).topk(k, dim=1)
            correlations[rows], nearest[rows] = found.values, candidates[found.indices]
    return correlations, nearest


def coverage(images: Tensor, labels: Tensor, training: Tensor, training_labels: Tensor) -> float:
    """Correlation of each training image with the most alike of `images` of its class; mean over the training images.

    A training image of whose class there is none counts 0. It grows with the number of images.
    """
    made = torch.isin(training_labels, labels)
    best, _ = nearest_same_class(training[made], training_labels[made], images, labels)
    return (best.sum() / len(training)).item()


def structural_similarity(images: Tensor, others: Tensor) -> float:
    """SSIM (Wang et al., 2004: a Gaussian window of deviation 1.5) of `images` and `others`, pair by pair, mean.

    In [-1, 1], 1 for equal images; of pixels in [0, 1], as its luminance term depends on where black lies.

    Raises:
        InputError: shapes that differ, or images of fewer than 6 pixels a side.
    """
    if images.shape != others.shape or min(images.shape[2:]) < SSIM_LEAST_SIDE:
        raise InputError(
            f"SSIM of images of shape {tuple(images.shape)} and {tuple(others.shape)}: give equal shapes with sides "
            f"of {SSIM_LEAST_SIDE} pixels or more"
        )
    from torchmetrics.functional.image import structural_similarity_index_measure  # takes seconds to import

    total = images.new_zeros((), dtype=torch.float64)
    for rows in torch.arange(len(images), device=images.device).split(CHUNK):
        pair = ((part[rows] + 1) / 2 for part in (images, others))
        total += structural_similarity_index_measure(*pair, data_range=1.0, reduction="none").double().sum()
    return (total / len(images)).item()


def diversity(images: Tensor, labels: Tensor, reference: Tensor, reference_labels: Tensor) -> float:
    """Deviation of a pixel within a class, against that of `reference`: 1 is as diverse as real images, 0 one image.

    The unbiased deviation, mean over pixels and over the classes of which both have two images or more. Noise has more
    than 1. NaN where there is no such class.
    """
    several = [n for n in labels.unique() if min((labels == n).sum(), (reference_labels == n).sum()) > 1]
    own = sum(images[labels == number].std(dim=0).mean() for number in several)
    real = sum(reference[reference_labels == number].std(dim=0).mean() for number in several)
    return float(own / real) if len(several) else float("nan")


def _class_means(images: Tensor, labels: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The classes (K,), by default those of `labels`, and the mean image of each, (K, C, H, W)."""
    classes = labels.unique() if classes is None else classes
    for number in classes:
        if not (labels == number).any():
            raise InputError(
                f"class {int(number)} has no real image to compare with: use data with all of the generator's classes"
            )
    return classes, torch.stack([images[labels == number].mean(dim=0) for number in classes])


def _standardised(images: Tensor) -> Tensor:
    """(N, C*H*W) of mean 0 and length 1, whose inner products are correlations; 0 for a constant image."""
    flat = images.flatten(1)
    centred = flat - flat.mean(dim=1, keepdim=True)
    # What rounding leaves of a constant image must not be blown up.
    rounding = torch.finfo(flat.dtype).eps * flat.norm(dim=1, keepdim=True) * 4
    return torch.where(centred.norm(dim=1, keepdim=True) > rounding, F.normalize(centred, dim=1), 0.0)
