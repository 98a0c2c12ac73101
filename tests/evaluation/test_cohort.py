import math

import pytest
import torch

from hfkd.errors import InputError
from hfkd.evaluation.cohort import cohort_metrics, ensemble_scores, top_k_accuracy


Z1 = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64)
Z2 = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64)


def test_ensembles_of_logits_and_of_probabilities_differ():  # T24
    logits, probabilities = ensemble_scores([Z1, Z2])
    torch.testing.assert_close(
        logits.softmax(-1), torch.tensor([[0.4519, 0.2741, 0.2741]], dtype=torch.float64), atol=5e-5, rtol=0
    )
    torch.testing.assert_close(
        probabilities, torch.tensor([[0.4669, 0.1795, 0.3536]], dtype=torch.float64), atol=5e-5, rtol=0
    )


def test_the_report_tells_the_two_ensembles_apart():
    # One very sure student outweighs two mild ones in the logits, but not in the probabilities.
    logits = [torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 2.0]])]
    metrics = cohort_metrics(logits, torch.tensor([0]))
    assert metrics["ensemble_accuracy"] == 1.0
    assert metrics["ensemble_prob_accuracy"] == 0.0
    assert metrics["mean_accuracy"] == pytest.approx(1 / 3)


def test_keys_of_two_students():
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(20, 10, generator=generator) for _ in range(2)]
    labels = torch.randint(10, (20,), generator=generator)
    metrics = cohort_metrics(logits, labels)
    assert set(metrics) == {
        "student_0_accuracy",
        "student_0_top5",
        "student_1_accuracy",
        "student_1_top5",
        "mean_accuracy",
        "ensemble_accuracy",
        "ensemble_prob_accuracy",
    }
    expected = torch.stack([(z.argmax(1) == labels).double().mean() for z in logits])
    assert metrics["student_1_accuracy"] == expected[1].item()
    assert metrics["mean_accuracy"] == pytest.approx(expected.mean().item())
    in_top = (logits[0].topk(5).indices == labels[:, None]).any(1).double().mean().item()
    assert metrics["student_0_top5"] == in_top


def test_five_classes_have_no_top5():
    assert not any("top5" in key for key in cohort_metrics([torch.eye(5)], torch.arange(5)))


def test_constant_and_nan_scores_earn_no_top_k():
    labels = torch.zeros(4, dtype=torch.int64)
    assert top_k_accuracy(torch.zeros(4, 10), labels) == 0.0
    assert top_k_accuracy(torch.full((4, 10), math.nan), labels) == 0.0


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ([], torch.tensor([0]), "empty list"),
        ([Z1, Z2[:, :2]], torch.tensor([0]), r"\(1, 2\), \(1, 3\)"),
        ([Z1], torch.tensor([0, 1]), r"labels of shape \(2,\)"),
        ([Z1[:0]], torch.tensor([], dtype=torch.int64), "N > 0"),
    ],
)
def test_shapes_that_do_not_agree_are_named(logits, labels, message):
    with pytest.raises(InputError, match=message):
        cohort_metrics(logits, labels)
