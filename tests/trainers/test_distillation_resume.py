"""Offline distillation: a resumed run is the run that never stopped, batches and ranks add up."""

import json

import pytest
import torch
from distillation_runs import rank_run, run, tiny_trainer
from processes import differences, in_a_process, with_older_state
from resume_run import STEPS
from test_distributed import assert_same, launch
from test_online_adversarial import assert_equal, weights
from tiny_runs import NO_AUGMENTATION, tiny_resnet
from watched_runs import assert_stops_at_nan

from hfkd.errors import InputError
from hfkd.trainers.distillation_terms import LOSSES


# Contrast remembers and draws, the fusion of review has statistics of its own; the others keep nothing.
LOSSES_OF_RUNS = {"kd": ["kd"], "contrast": ["crd", "dkd"], "review": ["review", "fitnets"]}
WARMING = {"distillation_warmup_epochs": 2.0}


@pytest.fixture(scope="module", params=LOSSES_OF_RUNS)
def losses(request):
    return LOSSES_OF_RUNS[request.param]


@pytest.fixture(scope="module")
def straight(losses, tmp_path_factory):
    return in_a_process(tmp_path_factory.mktemp("straight"), target=run, loss=losses, **WARMING)


def resume_from(folder, step, tmp_path, losses, **arguments):
    """Go on with nothing but the checkpoint; saves only the last step."""
    settings = {"loss": losses, "resume": str(folder / f"checkpoint-{step}"), "save_steps": STEPS, **WARMING}
    return in_a_process(tmp_path / "resumed", target=run, **settings, **arguments)


def unequal(straight, resumed):
    """The fingerprints of the teachers are a file of their own."""
    return differences(straight / f"checkpoint-{STEPS}", resumed / f"checkpoint-{STEPS}", 1, 7)


@pytest.mark.parametrize(("step", "workers"), [(3, 0), (6, 2)])
def test_resume_is_exact(straight, losses, tmp_path, step, workers):
    """In the middle of an epoch of four steps, with and without workers."""
    resumed = resume_from(straight, step, tmp_path, losses, workers=workers)
    assert unequal(straight, resumed) == []
    seen, again = (json.loads((folder / "batches.json").read_text()) for folder in (straight, resumed))
    assert again == {number: batch for number, batch in seen.items() if int(number) > step}


def test_no_state_can_be_lost_unnoticed(straight, losses, tmp_path):
    """What the test above compares does depend on each part of a checkpoint."""
    names = ["training_state/optimizers", "model"] + ["training_state/networks"] * (losses != ["kd"])
    for name in names:
        place = with_older_state(straight, name, tmp_path / name.replace("/", "-"))
        assert unequal(straight, resume_from(place, 6, place, losses)) != [], name


def test_another_teacher_is_refused(straight, losses, tmp_path):
    trainer = tiny_trainer(tmp_path, losses, teachers=[tiny_resnet(9, width=6)], **WARMING)
    with pytest.raises(InputError, match="teacher 0 is not the one that"):
        trainer.train(resume_from_checkpoint=str(straight / "checkpoint-6"))


def test_nan_stops_the_run_and_is_not_saved(losses, tmp_path):
    assert_stops_at_nan(tiny_trainer(tmp_path, losses, save_strategy="steps", save_steps=2))


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("fitnets", "review")])
def test_two_processes_equal_one(name, tmp_path):
    """In float64 and without norms, whose statistics are each process's own; images are related across processes."""
    settings = {"target": rank_run, "loss": [name]}
    (one,) = launch(1, tmp_path / "a", tmp_path / "one", per_device_train_batch_size=40, **settings)
    two = launch(2, tmp_path / "b", tmp_path / "two", per_device_train_batch_size=20, **settings)
    assert_same(two[0]["weights"], two[1]["weights"])
    assert_same(one["weights"], two[0]["weights"], atol=1e-9)
    logs = [[entry for entry in found["logs"] if "loss" in entry] for found in (one, two[0])]
    for alone, together in zip(*logs, strict=True):
        assert alone["loss"] == pytest.approx(together["loss"], rel=1e-5)


@pytest.mark.parametrize("losses", [["kd", "dkd"], ["attention", "logit_standardised"]], ids="+".join)
def test_one_batch_equals_four_that_are_accumulated(losses, tmp_path):
    """40 images at once, and four times 10."""
    shared = {"dtype": torch.float64, "norm": "none", "max_steps": 4, "augmentation": NO_AUGMENTATION}
    whole = tiny_trainer(tmp_path / "whole", losses, per_device_train_batch_size=40, **shared)
    parts = tiny_trainer(
        tmp_path / "parts", losses, per_device_train_batch_size=10, gradient_accumulation_steps=4, **shared
    )
    whole.train()
    parts.train()
    assert_equal(weights(parts.model), weights(whole.model), atol=1e-10)
