import pytest
import torch
from sklearn.datasets import load_digits

from hfkd.errors import InputError
from hfkd.evaluation.knn import KNNSettings, knn_accuracy, knn_scores
from hfkd.evaluation.linear_probe import LinearProbeSettings, linear_probe_accuracy


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    features = torch.tensor(data.data, dtype=torch.float32)
    labels = torch.tensor(data.target, dtype=torch.int64)
    return features[:400], labels[:400], features[400:], labels[400:]


def test_knn_on_digits_and_its_settings(digits):
    score, settings = knn_accuracy(*digits)
    assert score > 0.85
    assert settings == {"neighbours": 20, "temperature": 0.07}


def test_linear_probe_on_digits_is_deterministic(digits):
    score, settings = linear_probe_accuracy(*digits)
    assert score > 0.85
    assert settings == {"inverse_regularisation": 1.0, "max_iter": 1000}
    assert linear_probe_accuracy(*digits)[0] == score


def test_shuffled_labels_score_chance(digits):
    train, labels, test, test_labels = digits
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    assert knn_accuracy(train, shuffled, test, test_labels)[0] < 0.3
    assert linear_probe_accuracy(train, shuffled, test, test_labels)[0] < 0.3


def test_knn_votes_by_hand():
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    votes = knn_scores(train, torch.tensor([0, 1, 1]), torch.tensor([[3.0, 0.0]]), 2, KNNSettings(3, temperature=0.5))
    torch.testing.assert_close(votes, torch.tensor([[torch.tensor(2.0).exp(), 2.0]]))


def test_knn_does_not_depend_on_chunks(digits):
    train, labels, test, _ = digits
    whole = knn_scores(train, labels, test[:50], 10, KNNSettings(), chunk=50)
    torch.testing.assert_close(knn_scores(train, labels, test[:50], 10, KNNSettings(), chunk=7), whole)


def test_neighbours_are_clipped_to_the_training_set():
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert knn_accuracy(train, torch.tensor([0, 1]), train, torch.tensor([0, 1]))[0] == 1.0


@pytest.mark.parametrize("probe", [knn_accuracy, linear_probe_accuracy])
def test_bad_features_are_named(probe, digits):
    train, labels, test, test_labels = digits
    cases = [
        ((train[:, :3], labels, test, test_labels), "3 training features against 64"),
        ((train, labels[:-1], test, test_labels), r"training features of shape \(400, 64\)"),
        ((train, labels, test[:0], test_labels[:0]), "N > 0"),
        ((train / 0, labels, test, test_labels), "NaN or infinite"),
    ]
    for arguments, message in cases:
        with pytest.raises(InputError, match=message):
            probe(*arguments)


def test_one_class_and_bad_settings_are_refused(digits):
    train, labels, test, test_labels = digits
    with pytest.raises(InputError, match="one class"):
        linear_probe_accuracy(train, torch.zeros_like(labels), test, test_labels)
    for build in (lambda: KNNSettings(neighbours=0), lambda: LinearProbeSettings(inverse_regularisation=0)):
        with pytest.raises(InputError, match="=0"):
            build()
