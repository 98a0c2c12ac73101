"""The methods whose students learn together: a resumed run is the run that never stopped, ranks and batches add up."""

import json

import pytest
import torch
from cohort_runs import IN_TURNS, METHODS, rank_run, run, tiny_trainer
from processes import differences, in_a_process, with_older_state
from resume_run import STEPS
from test_distributed import assert_same, launch
from test_online_adversarial import assert_equal, weights
from tiny_runs import NO_AUGMENTATION
from watched_runs import assert_stops_at_nan


@pytest.fixture(scope="module", params=sorted(METHODS))
def method(request):
    return request.param


@pytest.fixture(scope="module")
def straight(method, tmp_path_factory):
    return in_a_process(tmp_path_factory.mktemp(method), target=run, method=method)


def resume_from(folder, step, tmp_path, method, **arguments):
    """Go on with nothing but the checkpoint; saves only the last step."""
    settings = {"method": method, "resume": str(folder / f"checkpoint-{step}"), "save_steps": STEPS, **arguments}
    return in_a_process(tmp_path / "resumed", target=run, **settings)


def unequal(straight, resumed):
    networks = 2 if (straight / f"checkpoint-{STEPS}" / "student_1").exists() else 1
    files = len(list((straight / f"checkpoint-{STEPS}" / "training_state").iterdir()))
    return differences(straight / f"checkpoint-{STEPS}", resumed / f"checkpoint-{STEPS}", networks, files)


@pytest.mark.parametrize(("step", "workers"), [(3, 0), (6, 2)])
def test_resume_is_exact(straight, method, tmp_path, step, workers):
    """In the middle of an epoch of four steps, with and without workers."""
    resumed = resume_from(straight, step, tmp_path, method, workers=workers)
    assert unequal(straight, resumed) == []
    seen, again = (json.loads((folder / "batches.json").read_text()) for folder in (straight, resumed))
    assert again == {number: batch for number, batch in seen.items() if int(number) > step}


def test_no_state_can_be_lost_unnoticed(straight, method, tmp_path):
    """What the test above compares does depend on each part of a checkpoint."""
    names = ["training_state/optimizers", "model"]
    state = (straight / f"checkpoint-{STEPS}/training_state/networks.safetensors").stat().st_size
    names += ["training_state/networks"] if state > 1000 else []  # of methods that train something beside the students
    for name in names:
        place = with_older_state(straight, name, tmp_path / name.replace("/", "-"))
        assert unequal(straight, resume_from(place, 6, place, method)) != [], name


@pytest.mark.parametrize(("kind", "settings"), [*[(name, {}) for name in sorted(METHODS)], IN_TURNS])
def test_two_processes_equal_one(kind, settings, tmp_path):
    """In float64 and without norms, whose statistics are each process's own."""
    settings = {"target": rank_run, "method": kind, **settings}
    (one,) = launch(1, tmp_path / "a", tmp_path / "one", per_device_train_batch_size=40, **settings)
    two = launch(2, tmp_path / "b", tmp_path / "two", per_device_train_batch_size=20, **settings)
    assert_same(two[0]["weights"], two[1]["weights"])
    assert_same(one["weights"], two[0]["weights"], atol=1e-10)
    logs = [[entry for entry in found["logs"] if "loss" in entry] for found in (one, two[0])]
    for alone, together in zip(*logs, strict=True):
        assert alone["loss"] == pytest.approx(together["loss"], rel=1e-5)


def test_one_batch_equals_four_that_are_accumulated(method, tmp_path):
    """40 images at once, and four times 10."""
    shared = {"dtype": torch.float64, "norm": "none", "max_steps": 4, "augmentation": NO_AUGMENTATION}
    whole = tiny_trainer(method, tmp_path / "whole", per_device_train_batch_size=40, **shared)
    parts = tiny_trainer(
        method, tmp_path / "parts", per_device_train_batch_size=10, gradient_accumulation_steps=4, **shared
    )
    whole.train()
    parts.train()
    assert_equal(weights(parts.model), weights(whole.model), atol=1e-10)


def test_nan_stops_the_run_and_is_not_saved(method, tmp_path):
    assert_stops_at_nan(tiny_trainer(method, tmp_path, save_strategy="steps", save_steps=2))
