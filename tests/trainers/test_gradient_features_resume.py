"""A resumed run of gradient features is the run that never stopped, and ranks are one run: to the bit."""

import json
import shutil

import pytest
import torch
from gradient_feature_runs import STEPS, rank_run, run
from processes import differences, in_a_process
from test_distributed import assert_same, launch
from test_resume import older, without_state_of

from hfkd.hub.manifest import write_manifest


def resume_from(straight, step, tmp_path, **arguments):
    checkpoint = str(straight / f"checkpoint-{step}")
    return in_a_process(tmp_path / "resumed", target=run, resume=checkpoint, save_steps=STEPS, **arguments)


def assert_the_same_run(straight, resumed, step):
    last = f"checkpoint-{STEPS}"
    assert differences(straight / last, resumed / last, students=1) == []
    seen, again = (json.loads((folder / "batches.json").read_text()) for folder in (straight, resumed))
    assert again == {number: batch for number, batch in seen.items() if int(number) > step}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return in_a_process(tmp_path_factory.mktemp("straight"), target=run)


# Workers serve batches, whatever the method: three steps of the first, second and third epoch will do.
@pytest.mark.parametrize(("step", "workers"), [*((step, 0) for step in range(1, STEPS)), (3, 2), (4, 2), (9, 2)])
def test_resume_is_exact_at_every_step(straight, tmp_path, step, workers):
    """From a model of another base: all of it comes from the checkpoint, and omega is not fitted again."""
    assert_the_same_run(straight, resume_from(straight, step, tmp_path, workers=workers), step)


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "finetune"},
        {"mode": "gradient", "omega": "random"},
        {"optim": "sgd", "bf16": True, "channels_last": True, "max_grad_norm": 1.0},
        {"per_device_train_batch_size": 20, "gradient_accumulation_steps": 3},
    ],
    ids=lambda settings: next(iter(settings.values())),
)
def test_resume_is_exact_with_other_settings(tmp_path, settings):
    whole = in_a_process(tmp_path / "whole", target=run, **settings)
    assert_the_same_run(whole, resume_from(whole, 6, tmp_path, **settings), 6)


MUTATIONS = {
    "model": lambda checkpoint, first: shutil.copy(first / "model.safetensors", checkpoint / "model.safetensors"),
    "Adam's state": without_state_of("student"),
    "optimizer and schedule": older("training_state/optimizers"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_no_state_can_be_lost_unnoticed(straight, tmp_path, mutation):
    checkpoint = tmp_path / "checkpoint-6"
    shutil.copytree(straight / "checkpoint-6", checkpoint)
    MUTATIONS[mutation](checkpoint, straight / "checkpoint-1")
    write_manifest(checkpoint)
    resumed = resume_from(tmp_path, 6, tmp_path)
    assert differences(straight / f"checkpoint-{STEPS}", resumed / f"checkpoint-{STEPS}", students=1) != []


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}])
def test_two_processes_equal_one(tmp_path, settings):
    """Also in omega: both ranks see the training images, and one of them fits."""
    per_rank = 20 // settings.get("gradient_accumulation_steps", 1)
    run_of = {"target": rank_run, **settings}
    (one,) = launch(1, tmp_path / "a", tmp_path / "one", per_device_train_batch_size=2 * per_rank, **run_of)
    two = launch(2, tmp_path / "b", tmp_path / "two", per_device_train_batch_size=per_rank, **run_of)
    assert_same(two[0]["weights"], two[1]["weights"])
    assert_same(one["weights"], two[0]["weights"], atol=1e-9)
    assert one["weights"]["students.0.omega"].abs().sum() > 0
    names = ("loss", "grad_norm", "omega_loss", "omega_accuracy")
    for alone, together in zip(one["logs"], two[0]["logs"], strict=True):
        assert {n: alone[n] for n in names if n in alone} == pytest.approx(
            {n: together[n] for n in names if n in together}, rel=1e-6
        )
    for name in ("eval_loss", "eval_accuracy", "eval_top5_accuracy"):
        assert two[1]["metrics"][name] == pytest.approx(one["metrics"][name], abs=1e-9)
    assert torch.equal(two[0]["weights"]["students.0.omega"], two[1]["weights"]["students.0.omega"])
