"""SIGINT and SIGTERM: finish the step, save, say how to go on."""

import signal
import threading
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hfkd.errors import RunError

from .distributed import all_ranks, world_size


class TrainingInterrupted(RunError):
    """Training was stopped by a signal, after a checkpoint was saved.

    Args:
        signum: the signal; `exit_code` is 128 + signum (130 for SIGINT, 143 for SIGTERM).
        checkpoint: the folder to resume from.
    """

    def __init__(self, signum: int, checkpoint: str) -> None:
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name}; resume with --resume_from_checkpoint {checkpoint}")
        self.exit_code = 128 + signum
        self.checkpoint = checkpoint


class StopOnSignal(TrainerCallback):
    """Turns the first SIGINT or SIGTERM into a save and a stop after the running step; a second one kills."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.received = None
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        self.restore()

    def agreed(self, args: TrainingArguments) -> bool:
        """Whether a signal came; asked on all ranks together, as one rank's signal stops all at the same step."""
        if world_size() > 1 and not all_ranks(torch.tensor(self.received is None, device=args.device)):
            self.received = self.received or signal.SIGTERM
        return self.received is not None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.agreed(args):
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.agreed(args):  # do not keep whoever pressed Ctrl-C waiting
            control.should_evaluate = control.should_save = False
            control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Give the signals back to whoever handled them before."""
        while self._previous:
            signum, handler = self._previous.popitem()
            signal.signal(signum, handler)
