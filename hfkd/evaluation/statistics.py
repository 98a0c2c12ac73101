"""Standard errors, confidence intervals, paired differences, and what they say in words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student_t

from hfkd.errors import InputError


CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean or a difference with its standard error (nan where one observation gives none) over `n` observations."""

    value: float
    standard_error: float
    n: int

    @property
    def margin(self) -> float:
        """Half the width of the 95 % confidence interval, nan without a standard error.

        By Student's t with n - 1 degrees of freedom: 4.30 standard errors of three seeds, 2.78 of five, 1.96 of many
        images.
        """
        return float(student_t.ppf((1 + CONFIDENCE) / 2, self.n - 1)) * self.standard_error if self.n > 1 else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval."""
        return self.value - self.margin, self.value + self.margin


def proportion(share: float, n: int) -> Estimate:
    """An accuracy with its binomial standard error `sqrt(p (1 - p) / n)`: `share` right of `n` test samples."""
    if not 0 <= share <= 1 or n < 1:
        raise InputError(f"A share of {share} of {n} samples: need a share in [0, 1] and at least one sample.")
    return Estimate(share, math.sqrt(share * (1 - share) / n), n)


def mean_over_seeds(values: Sequence[float]) -> Estimate:
    """Mean of one value per seed, with the standard error `s / sqrt(n)` of the sample deviation s."""
    if len(values) == 0:
        raise InputError("A mean over no seeds: give at least one value.")
    array = np.asarray(values, dtype=np.float64)
    error = float(array.std(ddof=1)) / math.sqrt(len(array)) if len(array) > 1 else math.nan
    return Estimate(float(array.mean()), error, len(array))


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Mean of `a[i] - b[i]` over seeds shared by two arms, with its standard error.

    Pairing removes what a seed does to both arms (initialisation, data order), which an unpaired error would count.
    """
    if len(a) != len(b):
        raise InputError(f"{len(a)} values against {len(b)}: a paired difference needs the same seeds in both arms.")
    return mean_over_seeds([x - y for x, y in zip(a, b, strict=True)])


def paired_accuracy_difference(right_a: ArrayLike, right_b: ArrayLike) -> Estimate:
    """Accuracy of classifier a minus that of b on the same N test samples, with its paired standard error.

    `right_a`, `right_b`: (N,) booleans, whether each sample was classified right. Only the samples on which they
    disagree count (McNemar, 1947): with `n10` right for a alone and `n01` for b alone, the difference is
    `(n10 - n01) / N` and its standard error `sqrt(n10 + n01 - (n10 - n01)^2 / N) / N`.
    """
    a, b = np.asarray(right_a, dtype=bool), np.asarray(right_b, dtype=bool)
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise InputError(f"Outcomes of shape {a.shape} against {b.shape}: need the same N > 0 test samples.")
    only_a, only_b, n = int((a & ~b).sum()), int((b & ~a).sum()), len(a)
    variance = only_a + only_b - (only_a - only_b) ** 2 / n
    return Estimate((only_a - only_b) / n, math.sqrt(variance) / n, n)


def describe_difference(difference: Estimate, a: str, b: str) -> str:
    """One sentence in percentage points: which of `a` and `b` is ahead, and whether the error allows saying so.

    `difference` is a's share minus b's, as a fraction.
    """
    if difference.value == 0:
        return f"{a} and {b} are level."
    ahead, behind = (a, b) if difference.value > 0 else (b, a)
    lead = f"{ahead} is {100 * abs(difference.value):.2f} points above {behind}"
    if math.isnan(difference.margin):
        return f"{lead}; one seed gives no standard error, so this may be chance."
    margin = f"± {100 * difference.margin:.2f} at 95 % confidence"
    if abs(difference.value) <= difference.margin:
        return f"{lead}, {margin}: no difference is shown."
    return f"{lead}, {margin}."
