"""SIGINT and SIGTERM: the step is finished, all is saved, the way on is told; and a second signal is obeyed at once."""

import signal
from pathlib import Path

import pytest
from interrupted_run import KEYBOARD_INTERRUPT, interrupted_run
from processes import differences, in_a_process
from resume_run import STEPS

from hfkd.hub.manifest import verify_manifest
from hfkd.trainers.checkpointing import newest_valid_checkpoint


pytestmark = pytest.mark.xdist_group("interrupt")
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


@pytest.mark.parametrize("signum", EXIT_CODES)
@pytest.mark.parametrize("step", [1, 6, 8])
def test_a_signal_saves_and_stops_after_the_step(tmp_path, straight, signum, step):
    interrupt(tmp_path, signum, step=step, **NONE)
    assert checkpoints(tmp_path) == [step]
    verify_manifest(tmp_path / f"checkpoint-{step}")
    line, checkpoint = (tmp_path / "stopped.txt").read_text().split("\n")
    assert Path(checkpoint) == tmp_path / f"checkpoint-{step}"
    assert line == f"stopped by {signum.name}; resume with --resume_from_checkpoint {checkpoint}"
    assert_goes_on_as_if_nothing_had_been(tmp_path, straight)


@pytest.mark.parametrize("strategy", ["no", "best"])
@pytest.mark.parametrize("evaluation", [2, 4, STEPS])
def test_a_signal_during_an_evaluation_saves_and_stops(tmp_path, straight, evaluation, strategy):
    """Within an epoch, at its end, and after the last step, when no further step would save."""
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": strategy}
    if strategy == "best":  # by a number that only falls: after the first evaluation nothing is saved for it
        settings |= {"metric_for_best_model": "steps_per_second", "greater_is_better": True}
    interrupt(tmp_path, evaluation=evaluation, **settings)
    # The signal comes too late for the step that is evaluated, unless its epoch ends there.
    stopped = evaluation + 1 if evaluation == 2 else evaluation
    assert checkpoints(tmp_path)[-1] == stopped
    assert (tmp_path / "stopped.txt").read_text().endswith(f"checkpoint-{stopped}")
    assert newest_valid_checkpoint(tmp_path).name == f"checkpoint-{stopped}"
    assert_goes_on_as_if_nothing_had_been(tmp_path, straight)


@pytest.mark.parametrize("again", ["in the step", "in the save"])
@pytest.mark.parametrize("signum", EXIT_CODES)
def test_a_second_signal_is_obeyed_at_once(tmp_path, signum, again):
    code = KEYBOARD_INTERRUPT if signum == signal.SIGINT else -signum
    interrupt(tmp_path, signum, code, step=6, again=again, save_steps=4)
    assert not (tmp_path / "checkpoint-6").exists() and not (tmp_path / "stopped.txt").exists()
    assert newest_valid_checkpoint(tmp_path).name == "checkpoint-4"
