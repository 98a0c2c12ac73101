"""How good a generator's images are: the only place that holds them against real ones.

Which measures there are, and that they are read beside those of real held-out images and of noise, follows the method
`generator_from_classifier` (idea: arXiv 2312.02470); their definitions are ours. Images are (N, C, H, W) in [-1, 1],
labels (N,) class numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hfkd.errors import InputError
from hfkd.evaluation.cohort import accuracy
from hfkd.evaluation.frechet import frechet_distance
from hfkd.evaluation.judges import Judge
from hfkd.evaluation.likeness import (
    SSIM_LEAST_SIDE,
    class_mean_correlation,
    coverage,
    diversity,
    nearest_same_class,
    per_sample_correlation,
    structural_similarity,
)


@dataclass(frozen=True)
class RealImages:
    """What generated images are held against.

    Attributes:
        training, training_labels: of the parent classifier.
        reference, reference_labels: half of the held-out images. Class means, diversity and Fréchet statistics are
            theirs, and a nearest-neighbour judge knows them.
        held_out, held_out_labels: the other half, measured like a generator's images: what one could reach at best.
            The classes take turns, so that any first part of them is balanced.
    """

    training: Tensor
    training_labels: Tensor
    reference: Tensor
    reference_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor

    @classmethod
    def split(cls, training: Tensor, training_labels: Tensor, test: Tensor, test_labels: Tensor) -> "RealImages":
        """Halves the test images: of each class every other image, in stored order.

        Raises:
            InputError: a class with a single test image.
        """
        counts = test_labels.bincount()
        if (counts == 1).any():
            raise InputError(
                f"class {counts.tolist().index(1)} has one held-out image and generation needs two: hold out more"
            )
        order = test_labels.argsort(stable=True)
        first = counts.cumsum(0) - counts  # place in `order` of the first image of each class
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device) - first[test_labels[order]]
        turn = (rank * len(counts) + test_labels).argsort()
        known, rest = turn[rank[turn] % 2 == 0], turn[rank[turn] % 2 == 1]
        return cls(training, training_labels, test[known], test_labels[known], test[rest], test_labels[rest])


def generation_metrics(
    images: Tensor,
    labels: Tensor | None,
    real: RealImages,
    judge: Judge,
    *,
    classifier: Judge | None = None,
    sqrt_stationarity: Callable[[Tensor, Tensor], float] | None = None,
) -> dict[str, float]:
    """Everything that is measured of one set of images, by name.

    - `self_accuracy`: share of images to which the parent classifier gives the class that they were made for. It says
      that the generator does what its loss asks, and nothing of how the images look.
    - `judge_accuracy`: the same share by the judge.
    - `class_mean_correlation`, `per_sample_correlation`: with the class means of the reference images.
    - `nearest_correlation`, `nearest_ssim`: with the most correlated training image of the class, mean. SSIM is left
      out below 6 pixels a side.
    - `coverage`: how near the images come to each training image.
    - `diversity`: spread within a class against that of the reference images.
    - `frechet_distance`: to the reference images in the judge's features, where it has some.
    - `sqrt_stationarity`: how far they are from explaining the parent's weights; 0 is satisfied, 1 no explanation.

    Coverage and Fréchet distance depend on the number of images: both are of the first as many as there are held-out
    images, so that these can be compared.

    Images of a generator without classes take the judge's class, so that the two accuracies say nothing and are left
    out; `judge_statistics` stands in their place.

    Args:
        labels: (N,) the classes that the images were made for; None of a generator without classes.
        real: what they are held against.
        judge: a classifier that was trained on other images than the parent.
        classifier: the parent.
        sqrt_stationarity: of images and their labels under the parent.

    Raises:
        InputError: images of another shape than the real ones, or a class of which there is no real image.
    """
    if images.shape[1:] != real.reference.shape[1:]:
        raise InputError(
            f"generated images of shape {tuple(images.shape[1:])} against real ones of "
            f"{tuple(real.reference.shape[1:])}: prepare the real ones as the generator makes them"
        )
    probabilities, features = judge(images)
    metrics: dict[str, float] = {}
    if labels is None:
        labels = probabilities.argmax(dim=1)
        metrics |= judge_statistics(probabilities)
    else:
        if classifier is not None:
            metrics["self_accuracy"] = accuracy(classifier(images).probabilities, labels)
        metrics["judge_accuracy"] = accuracy(probabilities, labels)
    metrics |= _likeness(images, labels, real)
    if features is not None:
        known = judge(real.reference).features
        assert known is not None  # a judge has features of all images or of none
        metrics["frechet_distance"] = frechet_distance(features[: len(real.held_out)], known)
    if sqrt_stationarity is not None:
        metrics["sqrt_stationarity"] = sqrt_stationarity(images, labels)
    return metrics


def judge_statistics(probabilities: Tensor) -> dict[str, float]:
    """Of `probabilities` (N, K): `judge_confidence`, the mean of each row's highest, and `judge_share_<class>`, the
    share of images that are taken for the class; all in [0, 1].
    """
    confidence, found = probabilities.max(dim=1)
    shares = found.bincount(minlength=probabilities.shape[1]).double() / len(found)
    return {
        "judge_confidence": confidence.double().mean().item(),
        **{f"judge_share_{number}": share for number, share in enumerate(shares.tolist())},
    }


def _likeness(images: Tensor, labels: Tensor, real: RealImages) -> dict[str, float]:
    reference = (real.reference, real.reference_labels)
    training = (real.training, real.training_labels)
    correlations, nearest = nearest_same_class(images, labels, *training)
    metrics = {
        "class_mean_correlation": class_mean_correlation(images, labels, *reference),
        "per_sample_correlation": per_sample_correlation(images, labels, *reference),
        "nearest_correlation": correlations.mean().item(),
    }
    if min(images.shape[2:]) >= SSIM_LEAST_SIDE:
        metrics["nearest_ssim"] = structural_similarity(images, real.training[nearest[:, 0]])
    count = len(real.held_out)
    metrics["coverage"] = coverage(images[:count], labels[:count], *training)
    metrics["diversity"] = diversity(images, labels, *reference)
    return metrics


def uniform_noise(like: Tensor, seed: int = 0) -> Tensor:
    """Images of the shape, type and device of `like`, every pixel uniform in [-1, 1] by itself."""
    drawn = torch.rand(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)
    return (2 * drawn - 1).to(like.device)
