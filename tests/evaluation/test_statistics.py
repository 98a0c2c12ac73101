import math

import numpy as np
import pytest

from hfkd.errors import InputError
from hfkd.evaluation.statistics import (
    Estimate,
    describe_difference,
    mean_over_seeds,
    paired_accuracy_difference,
    paired_difference,
    proportion,
)


def test_standard_error_of_a_proportion():
    assert proportion(0.9, 6000).standard_error == pytest.approx(0.003873, abs=1e-6)
    for share, n in [(1.2, 10), (0.5, 0)]:
        with pytest.raises(InputError, match="share"):
            proportion(share, n)


def test_mean_over_seeds():
    estimate = mean_over_seeds([1.0, 2.0, 3.0])
    assert (estimate.value, estimate.n) == (2.0, 3)
    assert estimate.standard_error == pytest.approx(1 / math.sqrt(3))
    assert math.isnan(mean_over_seeds([1.0]).standard_error)
    with pytest.raises(InputError, match="no seeds"):
        mean_over_seeds([])


def test_pairing_removes_what_seeds_share():
    a, b = [0.71, 0.81, 0.91], [0.70, 0.80, 0.90]
    difference = paired_difference(a, b)
    assert difference.value == pytest.approx(0.01)
    assert difference.standard_error == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(InputError, match="2 values against 1"):
        paired_difference([1.0, 2.0], [1.0])


def test_two_classifiers_on_the_same_images():
    a = [True] * 5 + [False] * 5
    b = [True] * 3 + [False] * 6 + [True]
    estimate = paired_accuracy_difference(a, b)  # 2 right for a alone, 1 for b alone
    assert estimate.value == pytest.approx(0.1)
    assert estimate.standard_error == pytest.approx(math.sqrt(3 - 0.1) / 10)
    # The same as the deviation of the per-image differences.
    differences = np.array(a, dtype=float) - np.array(b, dtype=float)
    assert estimate.standard_error == pytest.approx(differences.std() / math.sqrt(10))
    with pytest.raises(InputError, match="same N > 0"):
        paired_accuracy_difference([True], [True, False])


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (
            Estimate(0.004, 0.006, 3),
            "AFD is 0.40 points above vanilla, ± 2.58 at 95 % confidence: no difference is shown",
        ),
        (
            Estimate(-0.02, 0.006, 3),
            "vanilla is 2.00 points above AFD, ± 2.58 at 95 % confidence: no difference is shown",
        ),
        (Estimate(0.02, 0.006, 5), "AFD is 2.00 points above vanilla, ± 1.67 at 95 % confidence."),
        (Estimate(0.02, math.nan, 1), "one seed gives no standard error"),
        (Estimate(0.0, 0.006, 3), "AFD and vanilla are level."),
    ],
)
def test_differences_in_words(difference, words):
    assert words in describe_difference(difference, "AFD", "vanilla")


@pytest.mark.parametrize(
    ("n", "standard_errors"), [(2, 12.706), (3, 4.303), (5, 2.776), (10_000, 1.960), (1, math.nan)]
)  # Student's t table
def test_confidence_intervals_know_how_few_the_seeds_are(n, standard_errors):
    estimate = Estimate(0.5, 0.01, n)
    assert estimate.margin == pytest.approx(0.01 * standard_errors, rel=1e-3, nan_ok=True)
    assert estimate.interval == pytest.approx((0.5 - estimate.margin, 0.5 + estimate.margin), nan_ok=True)
