"""A trainer's steps against those of a loop written by hand, taken in turn within one run."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hfkd.trainers.base import DistillationTrainer


WARMUP = 3  # steps that are not counted


def time_against(trainer: DistillationTrainer, bare_step: Callable[[], object]) -> float:
    """Trains, and gives the median over steps of the trainer's time over that of the `bare_step` that follows.

    The first three steps are not counted, so the run must be longer.
    """
    turns = _Turns(bare_step)
    trainer.add_callback(turns)
    trainer.train()
    rounds = zip(turns.trainer_seconds[WARMUP:], turns.bare_seconds[WARMUP:], strict=True)
    return statistics.median(own / bare for own, bare in rounds)


class _Turns(TrainerCallback):
    """Takes a bare step after each of the trainer's, and times both."""

    def __init__(self, bare_step: Callable[[], object]) -> None:
        self.bare_step = bare_step
        self.trainer_seconds: list[float] = []
        self.bare_seconds: list[float] = []
        self._mark = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._mark = _now()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        after_trainer = _now()
        self.bare_step()
        after_bare = _now()
        self.trainer_seconds.append(after_trainer - self._mark)
        self.bare_seconds.append(after_bare - after_trainer)
        self._mark = after_bare


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
