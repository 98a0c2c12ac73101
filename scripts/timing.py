"""Rows of a speed table, and a results file for them."""

from dataclasses import dataclass
from pathlib import Path

from hfkd.evaluation.timing import Timings, measure
from hfkd.hub.hardware import environment_report, hardware_line, versions_line

from .results import append_csv


__all__ = ["COLUMNS", "Measured", "Timings", "append_measured", "measure"]

COLUMNS = ("method", "what", "value", "unit", "to_reach", "met", "repeats", "hardware", "versions")


@dataclass(frozen=True)
class Measured:
    """One row of a speed table. `to_reach` is a bound on `value`, from above unless `at_least`."""

    what: str
    value: float
    unit: str = "x"
    to_reach: float | None = None
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the bound holds; None where there is none."""
        if self.to_reach is None:
            return None
        return self.value >= self.to_reach if self.at_least else self.value <= self.to_reach

    def describe(self) -> str:
        """One line for a terminal."""
        text = f"{self.what}: {self.value:.3g} {self.unit}"
        if self.to_reach is None:
            return text
        bound = "at least" if self.at_least else "at most"
        return f"{text} (to reach: {bound} {self.to_reach:g}) {'met' if self.met else 'NOT MET'}"


def append_measured(path: Path, method: str, rows: list[Measured], repeats: int) -> None:
    """Append the rows to the CSV at `path`, with the machine and the versions."""
    environment = environment_report()
    shared = {"hardware": hardware_line(environment), "versions": versions_line(environment)}
    cells = [
        {
            "method": method,
            "what": row.what,
            "value": f"{row.value:.6g}",
            "unit": row.unit,
            "to_reach": "" if row.to_reach is None else f"{'>=' if row.at_least else '<='} {row.to_reach:g}",
            "met": "" if row.met is None else str(row.met).lower(),
            "repeats": str(repeats),
            **shared,
        }
        for row in rows
    ]
    append_csv(path, COLUMNS, cells)
