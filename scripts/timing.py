"""Timing several callables fairly, and a results file for what was measured."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from hfkd.errors import InputError
from hfkd.hub.hardware import environment_report, hardware_line, versions_line

from .results import append_csv


COLUMNS = ("method", "what", "value", "unit", "to_reach", "met", "repeats", "hardware", "versions")


@dataclass(frozen=True)
class Timings:
    """Seconds of each callable in each round, all rounds in one order."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Median over the rounds, in seconds."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, *parts: str) -> float:
        """Median over the rounds of `name`'s time over the summed times of `parts` in the same round.

        A round's members run within moments of each other, so that a machine that slows down slows all of them.
        """
        rounds = zip(self.seconds[name], *(self.seconds[part] for part in parts), strict=True)
        return statistics.median(own / sum(others) for own, *others in rounds)


def measure(
    callables: Mapping[str, Callable[[], object]], repeats: int = 20, warmup: int = 3, synchronize: bool | None = None
) -> Timings:
    """Time the callables alternately: `repeats` rounds, each of one call to every one of them.

    The order turns by one place each round, so that none always runs first. `warmup` rounds come before and are not
    counted, and garbage is collected between rounds, not within. `synchronize`: wait for the GPU around each call;
    by default where there is one.

    Raises:
        InputError: nothing to time, or no round to time it in.
    """
    if not callables or repeats < 1:
        raise InputError(f"{len(callables)} callables in {repeats} rounds: there is nothing to measure.")
    wait = torch.cuda.synchronize if (torch.cuda.is_available() if synchronize is None else synchronize) else _nothing
    names = list(callables)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, repeats):
        gc.collect()
        gc.disable()
        try:
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                wait()
                started = time.perf_counter()
                callables[name]()
                wait()
                if number >= 0:
                    seconds[name].append(time.perf_counter() - started)
        finally:
            gc.enable()
    return Timings(seconds)


def _nothing() -> None:
    pass


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
