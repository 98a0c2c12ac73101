"""Evaluation: the best model, early stopping, several sets, predictions; and it changes nothing."""

import math
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pytest import approx
from safetensors.torch import load_file
from test_online_adversarial import assert_equal, weights
from tiny_runs import digit_sources
from transformers import EarlyStoppingCallback
from watched_runs import saved

from hfkd.trainers.state import read_state


EVERY_STEP = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


# What evaluation is made to find after each of four steps: every metric has its own best step.
SCRIPT = {
    "student_1_accuracy": [0.2, 0.9, 0.5, 0.3],
    "mean_accuracy": [0.2, 0.5, 0.9, 0.3],
    "ensemble_accuracy": [0.9, 0.5, 0.2, 0.3],
    "loss": [3.0, 2.0, 1.0, 2.0],
}


def train_by_the_script(trainer):
    metrics = trainer.evaluation_metrics

    def scripted(*args):
        found = metrics(*args)
        assert found.keys() >= SCRIPT.keys()
        return found | {name: values[trainer.state.global_step - 1] for name, values in SCRIPT.items()}

    trainer.evaluation_metrics = scripted
    trainer.train()


def networks_of(folder):
    students = {"0": load_file(folder / "model.safetensors"), "1": load_file(folder / "student_1/model.safetensors")}
    found = {f"students.{k}.{name}": value for k, state in students.items() for name, value in state.items()}
    state = read_state(folder / "training_state", "networks")
    return found | {f"training_only.{name}": value for name, value in state.items()}


@pytest.mark.parametrize(
    ("settings", "step"),
    [
        ({}, 3),  # the loss
        ({"metric_for_best_model": "student_1_accuracy"}, 2),
        ({"metric_for_best_model": "student_1_accuracy", "greater_is_better": False}, 1),
        ({"metric_for_best_model": "eval_mean_accuracy"}, 3),
        ({"metric_for_best_model": "ensemble_accuracy"}, 1),
        ({"load_best_model_at_end": False}, 4),
    ],
)
def test_best_model_restores_every_network(make_trainer, settings, step):
    context = EVERY_STEP | {"save_total_limit": None, "load_best_model_at_end": True, "feature_learning_rate": 1e-3}
    trainer = make_trainer(**(context | settings))
    train_by_the_script(trainer)
    folders = {number: Path(trainer.args.output_dir) / f"checkpoint-{number}" for number in range(1, 5)}
    assert_equal(weights(trainer.model), networks_of(folders[step]))
    other = networks_of(folders[step % 4 + 1])
    for network in (*trainer.model.students, *trainer.model.training_only["discriminators"]):
        name, parameter = next((n, p) for n, p in trainer.model.named_parameters() if p is next(network.parameters()))
        assert not torch.equal(parameter, other[name])


@pytest.mark.parametrize(("limit", "kept"), [(None, [1, 2]), (1, [2])])
def test_save_strategy_best_saves_improvements(make_trainer, limit, kept):
    best = {"save_strategy": "best", "metric_for_best_model": "student_1_accuracy", "save_total_limit": limit}
    trainer = make_trainer(**(EVERY_STEP | best))
    train_by_the_script(trainer)
    assert saved(trainer) == kept


def test_early_stopping_and_its_restored_state(make_trainer, tmp_path):
    def last_step(name, resume=None, **config):
        callback = EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=1e9)  # nothing suffices
        context = EVERY_STEP | {"max_steps": 8, "metric_for_best_model": "loss", "save_total_limit": None}
        trainer = make_trainer(callbacks=[callback], output_dir=tmp_path / name, **context, **config)
        return trainer.train(resume_from_checkpoint=resume).global_step

    assert last_step("straight") == 3
    checkpoint = str(tmp_path / "straight/checkpoint-2")  # after one evaluation without improvement
    assert last_step("counting on", checkpoint) == 3
    assert last_step("counting afresh", checkpoint, restore_callback_states_from_checkpoint=False) == 4


# -- evaluation and prediction ---------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_no_trace(make_trainer, training):
    trainer = make_trainer(per_device_eval_batch_size=33)  # the last batch is a single image
    trainer.model.train(training)
    modes = {name: module.training for name, module in trainer.model.named_modules()}
    before, generators = weights(trainer.model), (random.getstate(), np.random.get_state()[1].tolist())
    drawn = torch.random.get_rng_state()
    metrics = trainer.evaluate()
    assert {"eval_student_0_accuracy", "eval_discriminator_1_accuracy"} <= metrics.keys()
    assert all(math.isfinite(value) for value in metrics.values())
    assert_equal(before, weights(trainer.model))
    assert torch.equal(drawn, torch.random.get_rng_state())
    assert generators == (random.getstate(), np.random.get_state()[1].tolist())
    assert modes == {name: module.training for name, module in trainer.model.named_modules()}


def test_predictions_are_those_of_student_0(make_trainer):
    trainer = make_trainer(max_steps=2)
    trainer.train()
    source = digit_sources().test
    predicted = trainer.predict(source)
    pixels = source.materialise({"key": torch.tensor([(0, row) for row in range(len(source))])})
    with torch.no_grad():
        logits = trainer.model.students[0].eval()(pixels["pixel_values"]).logits
    torch.testing.assert_close(torch.from_numpy(predicted.predictions), logits)
    assert predicted.label_ids.tolist() == pixels["labels"].tolist()
    accuracy = (logits.argmax(1) == pixels["labels"]).float().mean().item()
    assert predicted.metrics["test_student_0_accuracy"] == approx(accuracy)
    assert {"test_student_1_accuracy", "test_ensemble_accuracy"} <= predicted.metrics.keys()


def test_several_evaluation_sets(make_trainer):
    sources = digit_sources()
    sets = {"seen": sources.train, "unseen": sources.test}
    sources = SimpleNamespace(train=sources.train, test=sets)
    trainer = make_trainer(sources=sources, max_steps=2, eval_strategy="steps", eval_steps=2)
    trainer.train()
    for name, source in sets.items():
        alone = trainer.evaluate(source)
        during = next(entry for entry in trainer.state.log_history if f"eval_{name}_loss" in entry)
        assert during[f"eval_{name}_student_1_accuracy"] == alone["eval_student_1_accuracy"]
        assert trainer.evaluate()[f"eval_{name}_loss"] == approx(alone["eval_loss"])
