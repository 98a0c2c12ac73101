"""Failures while running: one line says what and how to go on; the last good checkpoint stays, nothing half-made."""

import errno
import math
import os
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, TrainerCallback, modeling_utils

from hfkd.errors import InputError, RunError
from hfkd.hub import manifest
from hfkd.hub.manifest import verify_manifest
from hfkd.trainers import checkpointing


SAVES = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": None, "max_steps": 6}


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_kept(folder, steps):
    """The checkpoints are those of `steps`: whole, finite, and with nothing unfinished beside them."""
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {f"checkpoint-{step}" for step in steps}
    for step in steps:
        verify_manifest(folder / f"checkpoint-{step}")
        for file in (folder / f"checkpoint-{step}").rglob("*.safetensors"):
            assert all(value.isfinite().all() for value in load_file(file).values())


def tensors(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


# -- NaN -------------------------------------------------------------------------------------------------------------


def poison(trainer, step):
    """The images of `step` hold a NaN."""
    update = trainer.method_step

    def method_step(batch, share, last):
        if trainer.state.global_step + 1 == step:
            batch["pixel_values"][0, 0, 0, 0] = math.nan
        return update(batch, share, last)

    trainer.method_step = method_step
    return trainer


@pytest.mark.parametrize(("logging_steps", "noticed"), [(1, 3), (500, 4)])
def test_a_nan_loss_stops_the_run_and_is_not_saved(make_trainer, tmp_path, logging_steps, noticed):
    trainer = poison(make_trainer(**SAVES, logging_steps=logging_steps), step=3)
    with pytest.raises(RunError) as caught:
        trainer.train()
    message = one_line(caught)
    assert f"by step {noticed}" in message and "student_0_ce=nan" in message and "student_1_kl=nan" in message
    assert "lower the learning rate" in message and "--resume_from_checkpoint true" in message
    assert_kept(tmp_path / "run", [2])
    resumed = make_trainer(**SAVES)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert_kept(tmp_path / "run", [2, 4, 6])


def test_a_diverging_run_stops(make_trainer, tmp_path):
    trainer = make_trainer(**SAVES | {"save_steps": 1, "max_steps": 12}, learning_rate=1e8)
    with pytest.raises(RunError, match=r"step \d+.*lower the learning rate") as caught:
        trainer.train()
    one_line(caught)
    assert_kept(tmp_path / "run", range(1, trainer.state.global_step))


def test_a_nan_that_nobody_logs_is_noticed_at_the_end(make_trainer, tmp_path):
    trainer = poison(make_trainer(max_steps=3, logging_steps=500), step=3)
    with pytest.raises(RunError, match="not finite by step 3"):
        trainer.train()
    with pytest.raises(RunError, match="students.0.*is not finite, nothing was saved"):
        trainer.save_model()
    assert not list((tmp_path / "run").iterdir())


class Spoil(TrainerCallback):
    """Makes one weight infinite after a step whose loss was finite."""

    def __init__(self, step, name):
        self.step, self.name = step, name

    def on_step_end(self, args, state, control, model, **_):
        if state.global_step == self.step:
            dict(model.named_parameters())[self.name].data.view(-1)[0] = math.inf


@pytest.mark.parametrize("name", ["students.1.classifier.weight", "training_only.discriminators.0.layers.0.weight"])
def test_weights_that_are_not_finite_are_not_saved(make_trainer, tmp_path, name):
    trainer = make_trainer(**SAVES, callbacks=[Spoil(4, name)])
    with pytest.raises(RunError) as caught:
        trainer.train()
    assert f"step 4: {name} is not finite" in one_line(caught)
    assert_kept(tmp_path / "run", [2])


# -- full disks, closed folders --------------------------------------------------------------------------------------


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk_in_safetensors(*_, **__):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def no_permission(*_, **__):
    raise PermissionError(errno.EACCES, "Permission denied")


def after(calls, fail, function):
    """`function`, which fails from the call after `calls` on."""
    count = 0

    def wrapped(*args, **kwargs):
        nonlocal count
        count += 1
        return (function if count <= calls else fail)(*args, **kwargs)

    return wrapped


# Where a save of two students can break: the object, its function, calls in one save that are still good, the failure.
BREAKS = {
    "the folder": (manifest.Path, "mkdir", 0, no_permission),
    "student 1": (modeling_utils, "safe_save_file", 1, full_disk_in_safetensors),
    "code": (shutil, "copyfile", 2, full_disk),
    "training state": (checkpointing, "write_state", 1, full_disk),
    "flush": (os, "fsync", 3, full_disk),
    "rename": (manifest.Path, "rename", 0, no_permission),
}


class BreakSaves(TrainerCallback):
    """From a step on, saves break at one place."""

    def __init__(self, monkeypatch, place, step):
        self.monkeypatch, self.place, self.step = monkeypatch, place, step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step + 1 == self.step:
            break_saves(self.monkeypatch, self.place)


def break_saves(monkeypatch, place):
    owner, name, calls, fail = BREAKS[place]
    monkeypatch.setattr(owner, name, after(calls, fail, getattr(owner, name)))


@pytest.mark.parametrize("place", BREAKS)
def test_a_save_that_breaks_costs_no_checkpoint(make_trainer, tmp_path, monkeypatch, place):
    with monkeypatch.context() as broken:
        trainer = make_trainer(**SAVES, callbacks=[BreakSaves(broken, place, step=4)])
        with pytest.raises(RunError) as caught:
            trainer.train()
    message = one_line(caught)
    cause = "Permission denied" if BREAKS[place][3] is no_permission else "No space left on device"
    assert cause in message and "checkpoint-4: not saved" in message
    assert message.endswith(f"then resume with --resume_from_checkpoint {tmp_path / 'run/checkpoint-2'}")
    assert_kept(tmp_path / "run", [2])


def test_a_run_goes_on_after_a_full_disk_as_if_it_had_not_been_full(make_trainer, tmp_path, monkeypatch):
    with monkeypatch.context() as broken, pytest.raises(RunError):
        make_trainer(**SAVES, callbacks=[BreakSaves(broken, "student 1", step=4)]).train()
    make_trainer(**SAVES).train(resume_from_checkpoint=True)
    make_trainer(**SAVES, output_dir=tmp_path / "straight").train()
    assert tensors(tmp_path / "run/checkpoint-6") == tensors(tmp_path / "straight/checkpoint-6")


def test_the_first_save_that_breaks_says_that_there_is_nothing_to_resume(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(**SAVES, callbacks=[BreakSaves(monkeypatch, "training state", step=2)])
    with pytest.raises(RunError, match="start again: there is no checkpoint"):
        trainer.train()
    assert_kept(tmp_path / "run", [])


@pytest.mark.parametrize("place", ["student 1", "code", "flush"])
def test_a_broken_save_model_leaves_the_students_that_were_there(make_trainer, tmp_path, monkeypatch, place):
    trainer, folder = make_trainer(max_steps=2), tmp_path / "run"
    trainer.save_model()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    trainer.train()
    with monkeypatch.context() as broken:
        break_saves(broken, place)
        with pytest.raises(RunError, match="not saved .*No space left on device"):
            trainer.save_model()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    trainer.save_model()
    model = AutoModelForImageClassification.from_pretrained(folder, subfolder="student_1")
    trained = trainer.model.students[1].state_dict()
    assert all(torch.equal(value, trained[key]) for key, value in model.state_dict().items())


def test_a_card_that_cannot_be_written_is_told(make_trainer, tmp_path):
    (tmp_path / "run/README.md").mkdir(parents=True)
    trainer = make_trainer()
    with pytest.raises(RunError, match="the students are saved, their card is not") as caught:
        trainer.save_model()
    one_line(caught)
    AutoModelForImageClassification.from_pretrained(tmp_path / "run")


# -- folders that cannot take a run ----------------------------------------------------------------------------------


def test_a_file_in_the_place_of_the_folder_is_refused(make_trainer, tmp_path):
    (tmp_path / "file").write_text("kept")
    for folder in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(InputError) as caught:
            make_trainer(output_dir=folder)
        assert f"output_dir={folder}" in one_line(caught)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_closed_folder(make_trainer, tmp_path):
    folder = tmp_path / "run"
    trainer = make_trainer(**SAVES)
    trainer.train()
    folder.chmod(0o500)
    try:
        with pytest.raises(RunError, match="Permission denied"):
            trainer.save_model()
        with pytest.raises(InputError, match=f"output_dir={folder}"):
            make_trainer(**SAVES)
    finally:
        folder.chmod(0o700)
    assert_kept(folder, [2, 4, 6])
