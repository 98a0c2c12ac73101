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

        `>` holds or fails where the difference is more than two standard errors from zero, and is open between.
        `~` holds where two standard errors leave the difference within its points, and fails where beyond them.
        """
        points = f"{100 * difference.value:+.2f}"
        if math.isnan(difference.standard_error):
            return f"open: {points} points in one seed"
        error = 2 * difference.standard_error
        found = f"{points} ± {100 * difference.standard_error:.2f} points"
        if self.relation != ">":
            close = float(self.relation[1:] or 1) / 100
            if abs(difference.value) + error <= close:
                return f"holds: {found}"
            return f"does not hold: {found}" if abs(difference.value) - error > close else f"open: {found}"
        if abs(difference.value) <= error:
            return f"open: {found}"
        return f"holds: {found}" if difference.value > 0 else f"does not hold: {found}"


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
