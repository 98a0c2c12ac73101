"""Accuracy of a linear classifier on frozen features."""

from dataclasses import asdict, dataclass

from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from hfkd.errors import InputError
from hfkd.evaluation.knn import check_features


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


def linear_probe_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, settings: LinearProbeSettings | None = None
) -> tuple[float, dict[str, float]]:
    """Accuracy in [0, 1] of a linear probe on pooled features, and the settings that gave it (for the card).

    `train` (N, D) and `test` (M, D) are features of a frozen backbone, labels are (N,) and (M,) class numbers.

    Raises:
        InputError: shapes that do not agree, an empty side, features that are not finite, or a single class.
    """
    check_features(train, train_labels, test, test_labels)
    if len(train_labels.unique()) < 2:
        raise InputError(f"All {len(train_labels)} training samples have one class: a linear probe needs two.")
    settings = settings or LinearProbeSettings()
    probe = make_pipeline(
        StandardScaler(), LogisticRegression(C=settings.inverse_regularisation, max_iter=settings.max_iter)
    )
    probe.fit(train.double().cpu().numpy(), train_labels.cpu().numpy())
    score = probe.score(test.double().cpu().numpy(), test_labels.cpu().numpy())
    return float(score), asdict(settings)
