import pytest
import torch

from hfkd.errors import InputError
from hfkd.evaluation.similarity import FeatureMapSimilarity, discriminator_accuracy, feature_map_similarity


A = torch.tensor([[[[1.0, 0.0], [2.0, 1.0]]]])
B = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])


def test_closed_form():  # T25
    result = feature_map_similarity(A, B)
    assert result == {"l1": 1.0, "l2": 1.5, "cosine": pytest.approx(0.76376, abs=5e-6)}


def test_cosine_is_a_mean_over_samples():
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    b = torch.tensor([[100.0, 0.0], [0.0, 1.0]])
    assert feature_map_similarity(a, b)["cosine"] == pytest.approx(0.5)


def test_batches_do_not_matter():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 10, 4, 3, 3, generator=generator)
    streamed = FeatureMapSimilarity()
    for start, stop in [(0, 1), (1, 7), (7, 10)]:
        streamed.update(a[start:stop], b[start:stop])
    assert streamed.compute() == pytest.approx(feature_map_similarity(a, b), abs=1e-12)


def test_equal_and_zero_maps():
    assert feature_map_similarity(A, A) == {"l1": 0.0, "l2": 0.0, "cosine": pytest.approx(1.0)}
    assert feature_map_similarity(A, torch.zeros_like(A))["cosine"] == 0.0


def test_shapes_that_differ_are_named():
    with pytest.raises(InputError, match=r"\(1, 1, 2, 2\) and \(1, 1, 1, 2\)"):
        feature_map_similarity(A, B[:, :, :1])
    with pytest.raises(InputError, match="no samples"):
        FeatureMapSimilarity().compute()


def test_discriminator_accuracy_counts_both_sides():
    result = discriminator_accuracy(torch.tensor([0.9, 0.4]), torch.tensor([0.1, 0.2, 0.6, 0.4]))
    assert {key: value.item() for key, value in result.items()} == {
        "real_accuracy": 0.5,
        "fake_accuracy": 0.75,
        "accuracy": pytest.approx(4 / 6),
    }


def test_an_undecided_discriminator_is_never_right():
    half = torch.full((3,), 0.5)
    assert discriminator_accuracy(half, half)["accuracy"] == 0.0
