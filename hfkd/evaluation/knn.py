"""Weighted nearest-neighbour accuracy of frozen features."""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hfkd.errors import InputError
from hfkd.evaluation.cohort import accuracy


@dataclass(frozen=True)
class KNNSettings:
    """Protocol of Wu et al., "Unsupervised feature learning via non-parametric instance discrimination" (CVPR 2018).

    `neighbours`: how many vote, clipped to the training set's size (20 is the common choice since DINO; the paper has
    200). `temperature`: each neighbour votes with weight `exp(cosine / temperature)`.
    """

    neighbours: int = 20
    temperature: float = 0.07

    def __post_init__(self) -> None:
        if self.neighbours < 1 or self.temperature <= 0:
            raise InputError(
                f"neighbours={self.neighbours}, temperature={self.temperature}: kNN needs at least one neighbour and "
                "a temperature above 0."
            )


def check_features(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> None:
    """Raise `InputError` unless both sides are (N, D) with (N,) labels, not empty, finite, and of one width D."""
    for name, features, labels in (("training", train, train_labels), ("test", test, test_labels)):
        if features.dim() != 2 or labels.shape != features.shape[:1] or len(labels) == 0:
            raise InputError(
                f"{name} features of shape {tuple(features.shape)} with labels of shape {tuple(labels.shape)}: "
                "need (N, D) pooled features and (N,) labels with N > 0."
            )
        if not features.isfinite().all():
            raise InputError(f"The {name} features hold NaN or infinite values: the checkpoint diverged.")
    if train.shape[1] != test.shape[1]:
        raise InputError(f"{train.shape[1]} training features against {test.shape[1]}: use one backbone for both.")


def knn_scores(
    train: Tensor, train_labels: Tensor, test: Tensor, num_classes: int, settings: KNNSettings, chunk: int = 1024
) -> Tensor:
    """Votes per class, (M, num_classes), for `test` (M, D) from `train` (N, D) with labels (N,), in chunks of rows."""
    neighbours = min(settings.neighbours, len(train))
    reference = F.normalize(train.float(), dim=1)
    votes = torch.zeros(len(test), num_classes, device=test.device)
    for start in range(0, len(test), chunk):
        cosine = F.normalize(test[start : start + chunk].float(), dim=1) @ reference.T
        nearest = cosine.topk(neighbours, dim=1)
        weights = (nearest.values / settings.temperature).exp()
        votes[start : start + chunk].scatter_add_(1, train_labels[nearest.indices], weights)
    return votes


def knn_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, settings: KNNSettings | None = None
) -> tuple[float, dict[str, float]]:
    """Accuracy in [0, 1] of nearest neighbours on pooled features, and the settings that gave it (for the card).

    `train` (N, D) and `test` (M, D) are features of a frozen backbone, labels are (N,) and (M,) class numbers.

    Raises:
        InputError: shapes that do not agree, an empty side, or features that are not finite.
    """
    check_features(train, train_labels, test, test_labels)
    settings = settings or KNNSettings()
    num_classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    votes = knn_scores(train, train_labels, test, num_classes, settings)
    return accuracy(votes, test_labels), asdict(settings)
