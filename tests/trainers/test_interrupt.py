"""SIGINT and SIGTERM: the step is finished, all is saved, the way on told; a second signal is obeyed at once."""

import json
import signal
from pathlib import Path

import pytest
import torch
from interrupted_run import KEYBOARD_INTERRUPT, interrupted_run
from processes import differences, in_a_process
from resume_run import STEPS
from transformers import TrainerControl

from hfkd.hub.manifest import verify_manifest
from hfkd.trainers import interrupt as interrupt_module
from hfkd.trainers.checkpointing import newest_valid_checkpoint


EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
# No checkpoint but that of the signal.
NONE = {"save_strategy": "no"}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return in_a_process(tmp_path_factory.mktemp("straight"), save_steps=STEPS)


def interrupt(folder, signum=signal.SIGTERM, expected_exit=None, **arguments):
    exit_code = EXIT_CODES[signum] if expected_exit is None else expected_exit
    in_a_process(folder, exit_code, target=interrupted_run, signum=signum, **arguments)


def checkpoints(folder):
    """The steps that were saved; nothing unfinished may lie beside them."""
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


def assert_goes_on_as_if_nothing_had_been(folder, straight):
    last = f"checkpoint-{STEPS}"
    in_a_process(folder, resume=True, save_steps=STEPS)
    assert differences(straight / last, folder / last) == []


@pytest.mark.parametrize(("signum", "step"), [(signal.SIGINT, 1), (signal.SIGTERM, 6), (signal.SIGINT, 8)])
def test_a_signal_saves_and_stops_after_the_step(tmp_path, straight, signum, step):
    interrupt(tmp_path, signum, step=step, **NONE)
    assert checkpoints(tmp_path) == [step]
    verify_manifest(tmp_path / f"checkpoint-{step}")
    line, checkpoint = (tmp_path / "stopped.txt").read_text().split("\n")
    assert Path(checkpoint) == tmp_path / f"checkpoint-{step}"
    assert line == f"stopped by {signum.name}; resume with --resume_from_checkpoint {checkpoint}"
    assert_goes_on_as_if_nothing_had_been(tmp_path, straight)


# At the end of an epoch, and after the last step, when no further step would save.
@pytest.mark.parametrize("evaluation", [4, STEPS])
def test_a_signal_during_an_evaluation_saves_and_stops(tmp_path, straight, evaluation):
    interrupt(tmp_path, evaluation=evaluation, eval_strategy="steps", eval_steps=2, **NONE)
    assert checkpoints(tmp_path) == [evaluation]
    assert (tmp_path / "stopped.txt").read_text().endswith(f"checkpoint-{evaluation}")
    assert_goes_on_as_if_nothing_had_been(tmp_path, straight)


def test_a_signal_saves_where_only_the_best_is_saved(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best"}
    interrupt(tmp_path, step=4, metric_for_best_model="loss", greater_is_better=True, **settings)
    assert checkpoints(tmp_path) == [2, 4]
    assert json.loads((tmp_path / "checkpoint-4/trainer_state.json").read_text())["best_global_step"] == 2


@pytest.mark.parametrize(
    ("signum", "again", "exit_code"),
    [(signal.SIGINT, "in the step", KEYBOARD_INTERRUPT), (signal.SIGTERM, "in the save", -signal.SIGTERM)],
)
def test_a_second_signal_is_obeyed_at_once(tmp_path, signum, again, exit_code):
    interrupt(tmp_path, signum, exit_code, step=6, again=again, save_steps=4)
    assert not (tmp_path / "checkpoint-6").exists() and not (tmp_path / "stopped.txt").exists()
    assert newest_valid_checkpoint(tmp_path).name == "checkpoint-4"


def test_a_step_waits_for_no_answer_but_that_of_the_step_before(monkeypatch):
    """What two ranks send each other, seen from one: the other's signal comes with the second answer."""
    questions = []

    class Question:
        def __init__(self, sent):
            self.sent, self.read = sent, False

        def wait(self):
            self.read = True
            self.sent.fill_(signal.SIGTERM if self is questions[1] else 0)

    def all_reduce(sent, operation, group, async_op):
        assert async_op and group == "gloo" and operation == torch.distributed.ReduceOp.MAX
        questions.append(Question(sent))
        return questions[-1]

    monkeypatch.setattr(interrupt_module, "world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "new_group", lambda backend: backend)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    callback, control = interrupt_module.StopOnSignal(), TrainerControl()
    callback.on_train_begin(None, None, control)
    try:
        for read, stopped in (([False], False), ([True, False], False), ([True, True, False], True)):
            callback.on_step_end(None, None, control)
            assert [question.read for question in questions] == read
            assert control.should_training_stop == control.should_save == stopped
    finally:
        callback.restore()
    assert callback.stopped == signal.SIGTERM
