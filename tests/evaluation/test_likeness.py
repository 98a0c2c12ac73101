"""Closed forms of the pixel measures, in float64."""

import math

import pytest
import torch

from hfkd.errors import InputError
from hfkd.evaluation import likeness
from hfkd.evaluation.likeness import (
    class_mean_correlation,
    coverage,
    diversity,
    nearest_same_class,
    per_sample_correlation,
    structural_similarity,
)


# Three orthogonal patterns of mean 0 on four pixels: correlations are cosines of what is mixed of them.
A, B, C = (
    torch.tensor(p, dtype=torch.float64).view(1, 2, 2) for p in ([1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1])
)
ZEROS = torch.zeros(2, dtype=torch.long)


def test_noise_of_single_images_averages_out_of_the_class_mean_only():
    images, reference = torch.stack([A + B, A - B]), torch.stack([A, A])
    assert class_mean_correlation(images, ZEROS, reference, ZEROS) == pytest.approx(1)
    assert per_sample_correlation(images, ZEROS, reference, ZEROS) == pytest.approx(math.cos(math.pi / 4))


def test_correlations_ignore_brightness_and_contrast():
    images = torch.stack([0.1 * A + 0.3, -0.2 * A - 0.5])
    assert per_sample_correlation(images[:1], ZEROS[:1], A[None], ZEROS[:1]) == pytest.approx(1)
    assert per_sample_correlation(images[1:], ZEROS[:1], A[None], ZEROS[:1]) == pytest.approx(-1)


def test_classes_weigh_alike_in_the_class_mean_and_images_in_the_per_sample_correlation():
    images, labels = torch.stack([A, A, A, C]), torch.tensor([4, 4, 4, 7])
    reference, of = torch.stack([B, A, B]), torch.tensor([7, 4, 0])
    assert class_mean_correlation(images, labels, reference, of) == pytest.approx(0.5)
    assert per_sample_correlation(images, labels, reference, of) == pytest.approx(0.75)


@pytest.mark.parametrize("value", [0.0, 0.1, -0.7])
def test_a_constant_image_correlates_with_nothing(value):
    images = torch.full((1, 1, 8, 8), value)
    reference = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert per_sample_correlation(images, ZEROS[:1], reference, ZEROS[:1]) == 0


def test_nearest_images_are_of_the_same_class_and_in_order():
    training = torch.stack([B, 2 * A + B, A, A + 2 * B, C])
    labels = torch.tensor([0, 0, 1, 0, 1])
    correlations, rows = nearest_same_class(torch.stack([A, C]), torch.tensor([0, 1]), training, labels, k=2)
    assert rows.tolist() == [[1, 3], [4, 2]]
    assert correlations.flatten().tolist() == pytest.approx([2 / math.sqrt(5), 1 / math.sqrt(5), 1, 0])
    with pytest.raises(InputError, match="class 1 has 2 real images to compare with and needs 3"):
        nearest_same_class(torch.stack([A, C]), torch.tensor([0, 1]), training, labels, k=3)


def test_nearest_images_do_not_depend_on_the_chunks(monkeypatch):
    draws = torch.Generator().manual_seed(0)
    images, training = (torch.randn(n, 1, 4, 4, generator=draws, dtype=torch.float64) for n in (23, 17))
    labels, of = torch.arange(23) % 3, torch.arange(17) % 3
    whole = nearest_same_class(images, labels, training, of)
    flat = [
        torch.corrcoef(torch.stack([image.flatten(), training[row].flatten()]))[0, 1]
        for image, row in zip(images, whole[1][:, 0], strict=True)
    ]
    assert torch.allclose(whole[0][:, 0], torch.stack(flat))
    monkeypatch.setattr(likeness, "CHUNK", 2)
    correlations, rows = nearest_same_class(images, labels, training, of)
    assert torch.equal(rows, whole[1]) and torch.allclose(correlations, whole[0])


def test_coverage_counts_training_images_that_nothing_is_like():
    training, of = torch.stack([A, B, A, C]), torch.tensor([0, 0, 1, 2])
    images, labels = torch.stack([A, A + B, B]), torch.tensor([0, 0, 1])
    assert coverage(images, labels, training, of) == pytest.approx((1 + math.cos(math.pi / 4) + 0 + 0) / 4)


def test_diversity_is_the_ratio_of_deviations_within_classes():
    draws = torch.Generator().manual_seed(0)
    reference = torch.randn(12, 1, 4, 4, generator=draws, dtype=torch.float64)
    labels = torch.arange(12) % 3
    shifted = 0.4 * reference + labels.view(-1, 1, 1, 1)  # between classes does not count
    assert diversity(shifted, labels, reference, labels) == pytest.approx(0.4)
    assert diversity(reference[:6], torch.zeros(6), reference[:6], torch.zeros(6)) == pytest.approx(1)


def test_diversity_leaves_out_classes_of_one_image():
    images, labels = torch.stack([A, -A, B]), torch.tensor([0, 0, 1])
    reference, of = torch.stack([A, -A, B, -9 * B]), torch.tensor([0, 0, 1, 1])
    assert diversity(images, labels, reference, of) == pytest.approx(1)
    assert diversity(reference, of, images, labels) == pytest.approx(1)
    assert math.isnan(diversity(images[:1], labels[:1], reference, of))


def test_structural_similarity_of_flat_images_is_its_luminance_term():
    dark, bright = (
        torch.full((3, 1, 8, 8), -0.5, dtype=torch.float64),
        torch.full((3, 1, 8, 8), 0.5, dtype=torch.float64),
    )
    a, b, c1 = 0.25, 0.75, 0.01**2
    assert structural_similarity(dark, bright) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1))
    assert structural_similarity(dark, dark) == pytest.approx(1)


def test_structural_similarity_is_the_mean_over_pairs(monkeypatch):
    draws = torch.Generator().manual_seed(0)
    images, others = (torch.rand(5, 3, 8, 8, generator=draws) * 2 - 1 for _ in range(2))
    others[0] = images[0]
    single = [structural_similarity(images[n : n + 1], others[n : n + 1]) for n in range(5)]
    assert single[0] == pytest.approx(1) and max(single[1:]) < 0.5
    monkeypatch.setattr(likeness, "CHUNK", 2)
    assert structural_similarity(images, others) == pytest.approx(sum(single) / 5)


@pytest.mark.parametrize(("shape", "other"), [((2, 1, 5, 8), (2, 1, 5, 8)), ((2, 1, 8, 8), (3, 1, 8, 8))])
def test_structural_similarity_wants_pairs_of_pictures(shape, other):
    with pytest.raises(InputError, match="6 pixels or more"):
        structural_similarity(torch.zeros(shape), torch.zeros(other))


@pytest.mark.parametrize("measure", [class_mean_correlation, per_sample_correlation])
def test_a_class_without_real_images(measure):
    with pytest.raises(InputError, match="class 3 has no real image to compare with"):
        measure(torch.stack([A, B]), torch.tensor([0, 3]), A[None], torch.tensor([0]))
