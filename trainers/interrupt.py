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
        self.received: int | None = None  # by this process
        self.stopped: int | None = None  # by any rank, as all of them agreed
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.received = self.stopped = None
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        self.restore()

    def agreed(self, args: TrainingArguments) -> bool:
        """Whether a signal came to any rank; asked on all ranks together, so that all stop at the same step.

        A signal that comes while the ranks agree counts the next time: what this process alone knows must not decide.
        """
        came = self.received
        if world_size() > 1 and not all_ranks(torch.tensor(came is None, device=args.device)):
            came = came or signal.SIGTERM
        self.stopped = self.stopped or came
        return self.stopped is not None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.agreed(args):
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.agreed(args):
            control.should_training_stop = True
            # The evaluation of an epoch that is complete belongs to the run: a resumed one does not make up for it.
            complete = state.epoch is not None and state.epoch == round(state.epoch)
            control.should_evaluate = control.should_evaluate and complete
            control.should_save = complete

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Give the signals back to whoever handled them before."""
        while self._previous:
            signum, handler = self._previous.popitem()
            signal.signal(signum, handler)
