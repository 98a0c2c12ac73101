"""A resumed run is the run that never stopped, to the bit: every step, with workers, after kills, and strictly."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from processes import contents, differences, in_a_process
from resume_run import STEPS, run
from safetensors.torch import load_file, save_file
from tiny_runs import digit_sources, tiny_resnet

from hfkd.errors import InputError
from hfkd.hub.manifest import write_manifest
from hfkd.trainers.checkpointing import newest_valid_checkpoint
from hfkd.trainers.online_adversarial import OnlineAdversarialConfig, OnlineAdversarialTrainer


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return in_a_process(tmp_path_factory.mktemp("straight"))


def resume_from(straight, step, tmp_path, **arguments):
    """Go on with a copy of nothing but the checkpoint; saves only the last step."""
    checkpoint = str(straight / f"checkpoint-{step}")
    return in_a_process(tmp_path / "resumed", resume=checkpoint, save_steps=STEPS, **arguments)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", range(1, STEPS))
def test_resume_is_exact_at_every_step(straight, tmp_path, step, workers):
    resumed = resume_from(straight, step, tmp_path, workers=workers)
    assert differences(straight / f"checkpoint-{STEPS}", resumed / f"checkpoint-{STEPS}") == []
    seen, again = (json.loads((folder / "batches.json").read_text()) for folder in (straight, resumed))
    assert again == {number: batch for number, batch in seen.items() if int(number) > step}


def test_resume_is_exact_with_accumulation(tmp_path):
    settings = {
        "per_device_train_batch_size": 20,
        "gradient_accumulation_steps": 3,
    }  # 10 batches: a ragged last update
    whole = in_a_process(tmp_path / "whole", **settings)
    resumed = resume_from(whole, 6, tmp_path, **settings)
    assert differences(whole / f"checkpoint-{STEPS}", resumed / f"checkpoint-{STEPS}") == []


def older(name):
    """A mutation: one state of checkpoint 6 is that of checkpoint 1, as if it had not been saved."""

    def mutate(checkpoint, first):
        for suffix in (".json", ".safetensors"):
            shutil.copy(first / f"{name}{suffix}", checkpoint / f"{name}{suffix}")

    return mutate


def older_weights(checkpoint, first):
    shutil.copy(first / "student_1/model.safetensors", checkpoint / "student_1/model.safetensors")


def without_state_of(optimizer):
    def mutate(checkpoint, first):
        path = checkpoint / "training_state/optimizers"
        tree = json.loads(path.with_suffix(".json").read_text())
        tensors = load_file(path.with_suffix(".safetensors"))
        entries = dict(dict(tree["__dict__"])["optimizers"]["__dict__"])[optimizer]
        names = json.dumps(entries).split('"__tensor__": "')[1:]
        assert names
        for name in names:
            key = name.split('"')[0]
            tensors[key] = torch.zeros_like(tensors[key])
        save_file(tensors, path.with_suffix(".safetensors"))

    return mutate


MUTATIONS = {
    "networks": older("training_state/networks"),
    "rng": older("training_state/rng"),
    "optimizers and schedules": older("training_state/optimizers"),
    "student 1": older_weights,
    "SGD's state": without_state_of("student"),
    "Adam's state on the extractors": without_state_of("feature"),
    "Adam's state on the discriminators": without_state_of("discriminator"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_no_state_can_be_lost_unnoticed(straight, tmp_path, mutation):
    """What the tests above compare does depend on each part of a checkpoint."""
    checkpoint = tmp_path / "checkpoint-6"
    shutil.copytree(straight / "checkpoint-6", checkpoint)
    MUTATIONS[mutation](checkpoint, straight / "checkpoint-1")
    write_manifest(checkpoint)
    resumed = resume_from(tmp_path, 6, tmp_path)
    assert differences(straight / f"checkpoint-{STEPS}", resumed / f"checkpoint-{STEPS}") != []


@pytest.mark.parametrize(
    "missing", ["model.safetensors", "student_1/model.safetensors", "training_state/networks.safetensors",
                "training_state/optimizers.json", "training_state/rng.json", "student_1/config.json", "manifest.json"]
)  # fmt: skip
def test_a_missing_file_is_an_error_by_name(straight, tmp_path, missing):
    checkpoint = tmp_path / "checkpoint-6"
    shutil.copytree(straight / "checkpoint-6", checkpoint)
    (checkpoint / missing).unlink()
    with pytest.raises(InputError, match=Path(missing).name) as caught:
        run(tmp_path / "resumed", resume=str(checkpoint))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "training_state/networks.safetensors"])
def test_a_missing_key_is_an_error_by_name(straight, tmp_path, name):
    checkpoint = tmp_path / "checkpoint-6"
    shutil.copytree(straight / "checkpoint-6", checkpoint)
    if name == "model.safetensors":
        tensors = load_file(checkpoint / name)
        lost = next(key for key in tensors if key.endswith("weight"))
        save_file({key: value for key, value in tensors.items() if key != lost}, checkpoint / name, {"format": "pt"})
    else:
        path = checkpoint / "training_state/networks.json"
        tree = json.loads(path.read_text())
        lost = tree["__dict__"].pop()[0]
        path.write_text(json.dumps(tree))
    write_manifest(checkpoint)
    with pytest.raises(InputError) as caught:
        run(tmp_path / "resumed", resume=str(checkpoint))
    assert lost in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("step", [1, 5, 8])
def test_killed_inside_a_save(straight, tmp_path, step):
    """SIGKILL while checkpoint-<step> is written: the folder is not there, and the run goes on from the one before."""
    folder = tmp_path / "killed"
    in_a_process(folder, expected_exit=-signal.SIGKILL, kill_in_save_of_step=step)
    assert not (folder / f"checkpoint-{step}").exists()
    if step == 1:
        with pytest.raises(InputError, match="no valid checkpoint"):
            newest_valid_checkpoint(folder)
        return
    assert newest_valid_checkpoint(folder).name == f"checkpoint-{step - 1}"
    in_a_process(folder, resume=True)
    assert differences(straight / f"checkpoint-{STEPS}", folder / f"checkpoint-{STEPS}") == []
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_damaged_checkpoints_are_skipped_and_named(straight, tmp_path, caplog):
    folder = tmp_path / "run"
    for step in (3, 5, 10):
        shutil.copytree(straight / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    weights = folder / "checkpoint-10/student_1/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (folder / "checkpoint-5/manifest.json").unlink()
    assert newest_valid_checkpoint(folder).name == "checkpoint-3"


def test_another_runs_folder_is_refused(straight):
    before = contents(straight / f"checkpoint-{STEPS}")
    with pytest.raises(InputError, match="resume_from_checkpoint true"):
        run(straight)
    assert contents(straight / f"checkpoint-{STEPS}") == before


def test_a_changed_setting_takes_effect_on_resume(straight, tmp_path):
    """To lower the learning rate and resume means something: moments are the checkpoint's, settings the run's."""
    sources = digit_sources()
    settings = {"max_steps": 8, "per_device_train_batch_size": 50, "eval_strategy": "no", "save_strategy": "no"}
    config = OnlineAdversarialConfig(
        str(tmp_path / "run"), learning_rate=0.003, weight_decay=0.2, momentum=0.5, lr_milestones=[], **settings
    )
    trainer = OnlineAdversarialTrainer([tiny_resnet(0), tiny_resnet(1, width=6)], config, sources.train)
    trainer.train(resume_from_checkpoint=str(straight / "checkpoint-6"))
    (group,) = trainer.optimizer.optimizers["student"].param_groups
    assert (group["lr"], group["weight_decay"], group["momentum"]) == (0.003, 0.2, 0.5)


def test_going_back_beside_later_checkpoints_is_refused(straight, tmp_path):
    folder = tmp_path / "run"
    for step in (3, 5):
        shutil.copytree(straight / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    with pytest.raises(InputError, match="checkpoint-5, later than checkpoint-3"):
        run(folder, resume=str(folder / "checkpoint-3"))


def test_damaged_later_checkpoints_are_set_aside(straight, tmp_path):
    """Rotation goes by steps: left in place, a damaged checkpoint-11 would outlive every good one before it."""
    folder = tmp_path / "run"
    for step in (9, 11):
        shutil.copytree(straight / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    (folder / "checkpoint-11/student_1/model.safetensors").unlink()
    in_a_process(folder, resume=True, save_total_limit=1)
    assert sorted(path.name for path in folder.glob("*checkpoint-*")) == ["checkpoint-12", "damaged-checkpoint-11"]
