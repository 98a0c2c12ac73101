"""Predictions from several crops, and the metrics of one classifier."""

import math

import pytest
import torch

from hfkd.errors import InputError
from hfkd.evaluation.classifier import classifier_metrics
from hfkd.evaluation.crops import mean_prediction


@pytest.mark.parametrize("several", [False, True])
def test_probabilities_are_averaged(several):
    logits = [torch.randn(4, 3, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in range(5)]
    probabilities = torch.sigmoid if several else lambda z: z.softmax(-1)
    found = probabilities(mean_prediction(logits, several))
    torch.testing.assert_close(found, torch.stack([probabilities(z) for z in logits]).mean(0))
    assert mean_prediction(logits[:1], several) is logits[0]


@pytest.mark.parametrize("several", [False, True])
def test_certain_predictions_stay_finite(several):
    sure = torch.tensor([[300.0, -300.0]])
    assert mean_prediction([sure, sure], several).isfinite().all()


def test_metrics_of_class_numbers():
    logits = torch.eye(6)[[0, 1, 2, 3]].log_softmax(1)
    metrics = classifier_metrics(logits, torch.tensor([0, 1, 2, 4]))
    partition = math.log(math.e + 5)
    assert metrics == {
        "loss": pytest.approx((3 * (partition - 1) + partition) / 4),
        "accuracy": 0.75,
        "top5_accuracy": 0.75,  # the fourth is tied with four others, which counts against it
    }
    assert "top5_accuracy" not in classifier_metrics(logits[:, :5], torch.tensor([0, 1, 2, 3]))


def test_metrics_of_several_labels():
    logits = torch.zeros(4, 2)
    logits[:, 0] = torch.tensor([3.0, 2.0, 1.0, 0.0])
    labels = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    metrics = classifier_metrics(logits, labels)
    # Precision 1 at recall 1/2 and 2/3 at recall 1; the label without a positive is left out.
    assert metrics["mean_average_precision"] == pytest.approx((1 + 2 / 3) / 2)
    assert metrics["mean_average_precision_11_point"] == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert metrics["loss"] > 0
    with pytest.raises(InputError, match="no label has a positive"):
        classifier_metrics(logits, torch.zeros(4, 2))


def test_eleven_points_count_no_precision_that_was_not_reached():
    """The best score is wrong: nowhere is the precision 1, not at recall 0 either."""
    metrics = classifier_metrics(torch.tensor([[2.0], [1.0]]), torch.tensor([[0.0], [1.0]]))
    assert metrics["mean_average_precision_11_point"] == pytest.approx(0.5)
