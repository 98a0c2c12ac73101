"""Linear classifiers on frozen features: the layer itself, and logistic regression as the fast way to fit it."""

from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from hfkd.errors import InputError
from hfkd.evaluation.cohort import accuracy
from hfkd.evaluation.knn import check_features


class LinearHead(NamedTuple):
    """The last layer of a classifier: `weight` (C, D) and `bias` (C,), on features as the backbone gives them."""

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """(N, C) of features (N, D), in the precision and on the device of the layer."""
        return features.to(self.weight) @ self.weight.T + self.bias


@dataclass(frozen=True)
class LinearProbeSettings:
    """Multinomial logistic regression (L-BFGS, deterministic) on features standardised by the training set.

    `inverse_regularisation` is scikit-learn's C: the loss is `||W||^2 / 2 + C * sum of cross entropies`. `max_iter`
    is high enough to converge on standardised features; a fit that does not is reported by scikit-learn's warning.
    """

    inverse_regularisation: float = 1.0
    max_iter: int = 1000

    def __post_init__(self) -> None:
        if self.inverse_regularisation <= 0 or self.max_iter < 1:
            raise InputError(
                f"inverse_regularisation={self.inverse_regularisation}, max_iter={self.max_iter}: the probe needs "
                "both above 0."
            )


def fit_linear_probe(
    features: Tensor, labels: Tensor, num_classes: int, settings: LinearProbeSettings | None = None
) -> LinearHead:
    """The classifier of `num_classes` that logistic regression makes of features (N, D) and class numbers (N,).

    The standardisation is folded into it, so it takes the features as they are. Float64, on the CPU. A class that no
    image has gets no weight, and a bias that makes it as rare as half an image.

    Raises:
        InputError: a single class.
    """
    if len(labels.unique()) < 2:
        raise InputError(f"All {len(labels)} training samples have one class: a linear probe needs two.")
    settings = settings or LinearProbeSettings()
    scaler = StandardScaler()
    inputs = scaler.fit_transform(features.double().cpu().numpy())
    probe = LogisticRegression(C=settings.inverse_regularisation, max_iter=settings.max_iter)
    probe.fit(inputs, labels.cpu().numpy())
    found, offset = probe.coef_, probe.intercept_
    if len(probe.classes_) == 2:  # scikit-learn has one logit for two classes
        found, offset = np.concatenate([-found, found]) / 2, np.concatenate([-offset, offset]) / 2
    weight = np.zeros((num_classes, inputs.shape[1]))
    bias = np.full(num_classes, logsumexp(offset) + np.log(0.5 / len(inputs)))
    weight[probe.classes_] = found / scaler.scale_
    bias[probe.classes_] = offset - weight[probe.classes_] @ scaler.mean_
    return LinearHead(torch.from_numpy(weight), torch.from_numpy(bias))


def linear_probe_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, settings: LinearProbeSettings | None = None
) -> tuple[float, dict[str, float]]:
    """Accuracy in [0, 1] of a linear probe on pooled features, and the settings that gave it (for the card).

    `train` (N, D) and `test` (M, D) are features of a frozen backbone, labels are (N,) and (M,) class numbers.

    Raises:
        InputError: shapes that do not agree, an empty side, features that are not finite, or a single class.
    """
    check_features(train, train_labels, test, test_labels)
    settings = settings or LinearProbeSettings()
    num_classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    head = fit_linear_probe(train, train_labels, num_classes, settings)
    return accuracy(head.logits(test), test_labels.to(head.weight.device)), asdict(settings)
