"""Squeeze-and-Span: a resumed run is the run that never stopped, ranks add up to the joined batch, NaN stops."""

import json

import pytest
from processes import differences, in_a_process, with_older_state
from resume_run import STEPS
from squeeze_runs import rank_run, run, tiny_generator, tiny_trainer
from test_distributed import assert_same, launch
from watched_runs import assert_stops_at_nan

from hfkd.errors import InputError


# Pools and layer noise are drawn from keys: nothing of them is in a checkpoint.
POOLED = {"generated_pool_size": 40, "projector_layers": 3}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return in_a_process(tmp_path_factory.mktemp("straight"), target=run)


def resume_from(folder, step, tmp_path, **arguments):
    """Go on with nothing but the checkpoint; saves only the last step."""
    checkpoint = str(folder / f"checkpoint-{step}")
    return in_a_process(tmp_path / "resumed", target=run, resume=checkpoint, save_steps=STEPS, **arguments)


def unequal(straight, resumed):
    found = (folder / f"checkpoint-{STEPS}" for folder in (straight, resumed))
    return differences(*found, students=1, others=7)  # the teacher's fingerprint too


@pytest.mark.parametrize(("step", "workers"), [(3, 0), (4, 0), (6, 2), (11, 0)])
def test_resume_is_exact(straight, tmp_path, step, workers):
    """In the middle and at the end of an epoch of four steps."""
    resumed = resume_from(straight, step, tmp_path, workers=workers)
    assert unequal(straight, resumed) == []
    seen, again = (json.loads((folder / "batches.json").read_text()) for folder in (straight, resumed))
    assert again == {number: batch for number, batch in seen.items() if int(number) > step}


def test_resume_is_exact_in_the_middle_of_a_pool(tmp_path):
    whole = in_a_process(tmp_path / "whole", target=run, **POOLED)
    assert unequal(whole, resume_from(whole, 6, tmp_path, **POOLED)) == []


# The rng is not among them: nothing here draws from the global generators.
@pytest.mark.parametrize("name", ["training_state/networks", "training_state/optimizers", "model"])
def test_no_state_can_be_lost_unnoticed(straight, tmp_path, name):
    """What the tests above compare does depend on each part of a checkpoint."""
    with_older_state(straight, name, tmp_path)
    assert unequal(straight, resume_from(tmp_path, 6, tmp_path)) != []


def test_another_teacher_is_refused(straight, tmp_path):
    other = tiny_trainer(tmp_path, generator=tiny_generator(seed=1))
    with pytest.raises(InputError, match="generator 0 is not the one that .*checkpoint-6 was trained on") as caught:
        other.train(resume_from_checkpoint=str(straight / "checkpoint-6"))
    assert "\n" not in str(caught.value)


# -- ranks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_two_processes_are_one_with_the_joined_batch(tmp_path, share):
    settings = {"target": rank_run, "synthetic_share": share, "max_grad_norm": 1.0}
    (one,) = launch(1, tmp_path / "a", tmp_path / "one", per_device_train_batch_size=40, **settings)
    two = launch(2, tmp_path / "b", tmp_path / "two", per_device_train_batch_size=20, **settings)
    assert_same(two[0]["weights"], two[1]["weights"])
    assert_same(one["weights"], two[0]["weights"], atol=1e-11)
    logs = [[entry for entry in found["logs"] if "loss" in entry] for found in (one, two[0])]
    for alone, together in zip(*logs, strict=True):
        for name in ("loss", "student_covariance", "teacher_variance", "representation_rank", "representation_std"):
            assert alone[name] == pytest.approx(together[name], rel=1e-5), name
    for name in ("eval_knn_accuracy", "eval_representation_rank"):
        assert two[1]["metrics"][name] == pytest.approx(one["metrics"][name], abs=1e-6)


def test_without_gathering_each_process_has_its_own_statistics(tmp_path):
    """The released code's way: the ranks agree, and are not what the joined batch would make of them."""
    settings = {"target": rank_run, "gather_statistics": False, "max_steps": 2}
    (one,) = launch(1, tmp_path / "a", tmp_path / "one", per_device_train_batch_size=40, **settings)
    two = launch(2, tmp_path / "b", tmp_path / "two", per_device_train_batch_size=20, **settings)
    assert_same(two[0]["weights"], two[1]["weights"])
    assert any((value - two[0]["weights"][name]).abs().max() > 1e-6 for name, value in one["weights"].items())


# -- failures --------------------------------------------------------------------------------------


def test_nan_stops_the_run_and_is_not_saved(tmp_path):
    assert_stops_at_nan(tiny_trainer(tmp_path, save_strategy="steps", save_steps=2))
