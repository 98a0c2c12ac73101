"""SIGINT and SIGTERM: finish the step, save, say how to go on."""

import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hfkd.errors import RunError

from .distributed import world_size


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


class _Question:
    """Which signal came to any rank, the highest of several, 0 for none: put to all ranks in the same order.

    It travels between the hosts, past the devices and their queues: neither asking nor reading the answer makes a
    device wait.
    """

    def __init__(self, received: int, hosts: Any) -> None:
        self._signum = torch.tensor(received, device="cpu")
        self._pending = dist.all_reduce(self._signum, dist.ReduceOp.MAX, hosts, async_op=True) if hosts else None

    def answer(self) -> int:
        if self._pending is not None:
            self._pending.wait()
        return int(self._signum)


class StopOnSignal(TrainerCallback):
    """Turns the first SIGINT or SIGTERM into a save and a stop after the running step; a second one kills.

    Several ranks stop one step later, all at the same one: at the end of a step they read what they asked each other
    at the end of the step before, so that none waits for the slowest.
    """

    def __init__(self) -> None:
        self.received = 0  # by this process; 0: no signal
        self.stopped = 0  # by any rank, as all of them agreed
        self._hosts: Any = None  # the process group of several ranks' hosts
        self._asked: _Question | None = None  # at the end of the step before
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.received = self.stopped = 0
        self._asked = None
        if world_size() > 1 and self._hosts is None:
            self._hosts = dist.new_group(backend="gloo")
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        self.restore()

    def agreed(self) -> bool:
        """Whether a signal came to any rank up to now; asked on all ranks together, which wait for the answer.

        A signal that comes while the ranks agree counts the next time: what this process alone knows must not decide.
        """
        return self._heard(_Question(self.received, self._hosts))

    def _heard(self, question: _Question | None) -> bool:
        if question is not None:
            self.stopped = self.stopped or question.answer()
        return self.stopped != 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        question: _Question | None = _Question(self.received, self._hosts)
        if self._hosts is not None:
            question, self._asked = self._asked, question
        if self._heard(question):
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.agreed():
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
