"""A folder with what another run has left is refused before the first step, and nothing in it is touched."""

import shutil
from pathlib import Path

import pytest

from hfkd.errors import InputError


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def finished(make_trainer, tmp_path):
    """A run that was saved at its end only, as another process has left it."""
    trainer = make_trainer(output_dir=tmp_path / "finished", max_steps=1)
    trainer.train()
    trainer.save_model()
    return tmp_path / "finished"


def assert_refused(trainer, folder, match, **arguments):
    before = contents(folder)
    with pytest.raises(InputError, match=match) as caught:
        trainer.train(**arguments)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert trainer.state.global_step == 0 and contents(folder) == before


def test_students_of_another_run_are_not_replaced(make_trainer, finished):
    trainer = make_trainer(output_dir=finished, max_steps=1)
    assert_refused(trainer, finished, "holds the students of another run.*choose another folder, or move them away")


def test_sharded_students_are_students_too(make_trainer, finished):
    (finished / "model.safetensors").rename(finished / "model-00001-of-00002.safetensors")
    assert_refused(make_trainer(output_dir=finished), finished, "students of another run")


def test_a_checkpoint_from_elsewhere_does_not_open_the_folder(make_trainer, finished, tmp_path):
    saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(output_dir=tmp_path / "run", **saving).train()
    start = str(tmp_path / "run/checkpoint-1")
    trainer = make_trainer(output_dir=finished, **saving)
    assert_refused(trainer, finished, "students of another run", resume_from_checkpoint=start)
    shutil.copytree(tmp_path / "run/checkpoint-2", tmp_path / "third/checkpoint-2")
    trainer = make_trainer(output_dir=tmp_path / "third", **saving)
    assert_refused(trainer, tmp_path / "third", "another run's checkpoint-2", resume_from_checkpoint=start)


def test_a_run_goes_on_beside_its_own_students(make_trainer, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(max_steps=1, **saving)
    trainer.train()
    trainer.save_model()
    before = contents(tmp_path / "run")["model.safetensors"]
    again = make_trainer(max_steps=2, **saving)
    again.train(resume_from_checkpoint=True)
    again.save_model()
    assert contents(tmp_path / "run")["model.safetensors"] != before


def test_a_trainer_trains_again_over_what_it_has_saved_itself(make_trainer, finished, tmp_path):
    trainer = make_trainer(max_steps=1)
    for _ in range(2):
        trainer.train()
        trainer.save_model()
    # Saved elsewhere, which makes other students no more its own.
    trainer = make_trainer(output_dir=finished, max_steps=1)
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert_refused(trainer, finished, "students of another run")


def test_a_folder_with_other_files_is_taken(make_trainer, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    (tmp_path / "run/notes.txt").write_text("mine")
    trainer = make_trainer(max_steps=1)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "run/notes.txt").read_text() == "mine"
