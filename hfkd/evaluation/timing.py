"""Timing several callables fairly."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from hfkd.errors import InputError


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
