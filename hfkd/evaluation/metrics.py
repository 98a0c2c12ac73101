"""Metrics as `evaluate.Metric` classes that ship with the package: nothing is fetched and nothing is cached on disk.

>>> from hfkd.evaluation.metrics import Accuracy
>>> Accuracy().compute(predictions=[0, 1, 1], references=[0, 1, 2])
{'accuracy': 0.6666666666666666}
"""

from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from sklearn.metrics import average_precision_score, precision_recall_curve

from hfkd.errors import InputError
from hfkd.evaluation.cohort import top_k_accuracy


_SCORES = datasets.Sequence(datasets.Value("float64"))


class _InMemoryMetric(evaluate.Metric):
    """A metric whose predictions stay in memory, so that it works offline and with a home that cannot be written."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"keep_in_memory": True, **kwargs})

    def _build_data_dir(self) -> str:
        return "" if self.keep_in_memory else super()._build_data_dir()


def _info(description: str, predictions: Any, references: Any, inputs: str) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description=inputs,
        features=datasets.Features({"predictions": predictions, "references": references}),
    )


class Accuracy(_InMemoryMetric):
    """Share of predicted classes that are right, in [0, 1]. `predictions` and `references`: N class numbers."""

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int64")
        return _info("Share of right predictions.", label, label, "predictions, references: class numbers.")

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class TopKAccuracy(_InMemoryMetric):
    """Share of samples whose class is among the k highest scores, in [0, 1].

    `predictions`: (N, C) scores or logits; `references`: N class numbers. `k` is clipped to the number of classes (the
    result is then 1), and the key names the k that was asked for: `top5_accuracy`. Ties count against the label.
    """

    def __init__(self, k: int = 5, **kwargs: Any) -> None:
        if k < 1:
            raise InputError(f"k={k}: top-k accuracy needs k of at least 1.")
        self.k = k
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            "Share of samples whose class is among the k highest scores.",
            _SCORES,
            datasets.Value("int64"),
            "predictions: (N, C) scores; references: class numbers.",
        )

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        scores, labels = torch.as_tensor(np.asarray(predictions)), torch.as_tensor(np.asarray(references))
        return {f"top{self.k}_accuracy": top_k_accuracy(scores, labels, self.k)}


class MeanAveragePrecision(_InMemoryMetric):
    """Mean over labels of the area under the precision-recall steps (scikit-learn's average precision), in [0, 1].

    `predictions`: (N, L) scores; `references`: (N, L) zeros and ones. Labels without one positive sample have no
    precision-recall curve and are left out of the mean.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            "Mean over labels of the average precision.",
            _SCORES,
            datasets.Sequence(datasets.Value("int64")),
            "predictions: (N, L) scores; references: (N, L) zeros and ones.",
        )

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        scores, targets = _with_positives(predictions, references)
        precision = average_precision_score(targets, scores, average="macro")
        return {"mean_average_precision": float(precision)}


class ElevenPointAveragePrecision(MeanAveragePrecision):
    """Mean over labels of PASCAL VOC 2007's average precision, in [0, 1]: at 11 recalls in place of the whole area.

    At each recall 0, 0.1, ..., 1 counts the highest precision at that recall or above (Everingham et al., IJCV 2010,
    equation 1). Inputs as for `MeanAveragePrecision`.
    """

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        scores, targets = _with_positives(predictions, references)
        values = []
        for score, target in zip(scores.T, targets.T, strict=True):
            # The last point is no measurement: precision 1 at recall 0.
            precision, recall = (curve[:-1] for curve in precision_recall_curve(target, score)[:2])
            # In tenths: 0.1 * 3 is more than 0.3.
            values.append(np.mean([precision[recall * 10 >= tenth - 1e-9].max() for tenth in range(11)]))
        return {"mean_average_precision_11_point": float(np.mean(values))}


def _with_positives(predictions: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores and targets (N, L') of the labels that have a positive sample."""
    scores, targets = np.asarray(predictions), np.asarray(references)
    present = targets.any(axis=0)
    if not present.any():
        raise InputError("Mean average precision: no label has a positive sample; evaluate on labelled images.")
    return scores[:, present], targets[:, present]
