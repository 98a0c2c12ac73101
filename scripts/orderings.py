"""What a paper says about its arms, held against a study's results."""

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from hfkd.errors import InputError
from hfkd.evaluation.statistics import Estimate

from .suggest import nearest


RELATION = re.compile(r">|~(?!0+(\.0*)?$)(\d+(\.\d+)?)?")


@dataclass(frozen=True)
class Ordering:
    """A claim about two arms: `first > second`, or about equal: `first ~ second` within 1 point, `~2` within 2."""

    first: str
    relation: str
    second: str

    def __str__(self) -> str:
        return f"{self.first} {self.relation} {self.second}"

    def verdict(self, difference: Estimate) -> str:
        """Whether the claim holds, from the paired difference of shares (first minus second) over the seeds.

        `>` holds or fails where the 95 % confidence interval excludes zero, and is open otherwise. `~` holds where
        the interval lies within its points, fails where it lies beyond them, and is open otherwise.
        """
        low, high = difference.interval
        if math.isnan(low):
            return f"open: {100 * difference.value:+.2f} points in one seed"
        if self.relation == ">":
            holds, fails = low > 0, high < 0
        else:
            close = float(self.relation[1:] or 1) / 100
            holds, fails = -close <= low and high <= close, low > close or high < -close
        found = f"{100 * difference.value:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}] points"
        return f"{'holds' if holds else 'does not hold' if fails else 'open'}: {found}"


def read_orderings(texts: Sequence[str], arms: Collection[str], source: str) -> list[Ordering]:
    """Orderings from lines such as `full > activation`, `full ~ gradient` or `random ~2 activation`.

    Raises:
        InputError: a line of another form, or an arm that the study lacks.
    """
    orderings = []
    for text in texts:
        parts = text.split()
        if len(parts) != 3 or not RELATION.fullmatch(parts[1]):
            raise InputError(
                f"{source}: orderings: {text!r} is not of the form 'arm > arm', 'arm ~ arm' (within 1 point) or "
                "'arm ~2 arm' (within 2)."
            )
        for arm in (parts[0], parts[2]):
            if arm not in arms:
                raise InputError(f"{source}: orderings: {arm!r} is no arm{nearest(arm, arms)}.")
        orderings.append(Ordering(*parts))
    return orderings
