import numpy as np
import pytest

from hfkd.errors import InputError
from hfkd.evaluation.metrics import Accuracy, MeanAveragePrecision, TopKAccuracy


SCORES = np.array([[0.1, 0.5, 0.4], [0.7, 0.2, 0.1], [0.3, 0.3, 0.4]])


def test_accuracy_of_a_hand_count():
    assert Accuracy().compute(predictions=[0, 1, 1], references=[0, 1, 2]) == {"accuracy": pytest.approx(2 / 3)}


def test_accuracy_over_batches_is_that_of_all_samples():
    metric = Accuracy()
    metric.add_batch(predictions=[0, 1, 2], references=[0, 0, 0])
    metric.add_batch(predictions=[5], references=[5])
    assert metric.compute() == {"accuracy": 0.5}


def test_top_k_counts_the_k_highest_scores():
    labels = [2, 2, 0]
    assert TopKAccuracy(k=1).compute(predictions=SCORES, references=labels) == {"top1_accuracy": 0.0}
    # Row 3: class 0 ties with class 1 for the second place, and ties count against the label.
    assert TopKAccuracy(k=2).compute(predictions=SCORES, references=labels) == {"top2_accuracy": pytest.approx(1 / 3)}


def test_top_k_is_clipped_to_the_number_of_classes():
    assert TopKAccuracy().compute(predictions=SCORES, references=[2, 2, 0]) == {"top5_accuracy": 1.0}


def test_top_k_of_zero_is_refused():
    with pytest.raises(InputError, match="k=0"):
        TopKAccuracy(k=0)


def test_mean_average_precision_of_a_hand_count():
    scores = np.array([[0.9, 0.1], [0.8, 0.9], [0.7, 0.2]])
    targets = np.array([[1, 0], [0, 1], [1, 0]])
    # Label 0 finds its positives at ranks 1 and 3: (1 + 2/3) / 2. Label 1 at rank 1.
    result = MeanAveragePrecision().compute(predictions=scores, references=targets)
    assert result == {"mean_average_precision": pytest.approx((5 / 6 + 1) / 2)}


def test_mean_average_precision_leaves_out_labels_without_positives():
    scores = np.array([[0.9, 0.5], [0.1, 0.5]])
    result = MeanAveragePrecision().compute(predictions=scores, references=np.array([[1, 0], [0, 0]]))
    assert result == {"mean_average_precision": 1.0}
    with pytest.raises(InputError, match="no label has a positive sample"):
        MeanAveragePrecision().compute(predictions=scores, references=np.zeros((2, 2), dtype=int))


def test_metrics_touch_no_disk(monkeypatch, tmp_path):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "cache"))
    Accuracy().compute(predictions=[1], references=[1])
    assert list(tmp_path.iterdir()) == []
