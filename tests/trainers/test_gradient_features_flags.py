"""What each setting of gradient features does, seen from outside; those of the base are seen in `test_flags`."""

import dataclasses
import math

import pytest
import torch
from gradient_feature_runs import tiny_model, tiny_trainer
from pytest import approx
from test_flags import unchanged_process  # noqa: F401  a fixture
from test_online_adversarial import assert_equal, weights
from torch import nn
from torch.nn import functional as F
from transformers import EarlyStoppingCallback
from watched_runs import batch_sizes, logged, order, saved, steps_done, steps_with

from hfkd.trainers.config import DistillationConfig
from hfkd.trainers.gradient_features import GradientFeaturesConfig


@pytest.fixture
def run(tmp_path):
    """run(**config) -> a trainer that has trained for two steps of four per epoch, with what it did in `seen`."""

    def make(mode="full", train=True, output_dir="run", callbacks=None, **config):
        model = tiny_model(mode)
        convolved = []
        last = [m for m in model.modules() if isinstance(m, nn.Conv2d)][-1]
        last.register_forward_hook(lambda m, x, y: convolved.append(y))
        trainer = tiny_trainer(tmp_path / output_dir, model, callbacks=callbacks, **({"max_steps": 2} | config))
        trainer.seen = dataclasses.make_dataclass("Seen", ["batches", "convolved", "start"])([], convolved, {})
        step = trainer.method_step

        def watched(batch, share, last):
            if not trainer.seen.start:
                trainer.seen.start = weights(model)
            trainer.seen.batches.append(batch)
            return step(batch, share, last)

        trainer.method_step = watched
        if train:
            trainer.train()
        return trainer

    return make


def moved(t):
    model = t.model.students[0]
    return any((value - t.seen.start[name]).abs().max() > 1e-8 for name, value in model.state_dict().items())


def omega_is_small(t):
    """So that all classes are about equally probable."""
    (loss,) = [entry["omega_loss"] for entry in t.state.log_history if "omega_loss" in entry]
    return loss > 0.95 * math.log(10)


def first_moments(t):
    (entry, *_) = t.optimizer.optimizers["student"].state.values()
    return sorted(entry)


FOUR = {"max_steps": 4}
CONSTANT = {"max_steps": 4, "lr_milestones": []}
SGD = {"optim": "sgd", "weight_decay": 0.0}

# (field, value, what is looked at, what is seen, the other settings). Without the value, something else is seen.
EFFECTS = [
    ("num_train_epochs", 0.25, steps_done, 1, {"max_steps": -1, "num_train_epochs": 0.5}),
    ("per_device_train_batch_size", 20, batch_sizes, [20, 20], {}),
    ("gradient_accumulation_steps", 2, batch_sizes, [50] * 4, {}),
    ("learning_rate", 0.02, logged("learning_rate"), [0.02] * 4, CONSTANT),
    ("learning_rate", 0.0, moved, False, {}),
    ("lr_milestones", [0.5], logged("learning_rate"), [1e-3, 1e-3, 5e-4, 5e-4], FOUR),
    ("lr_gamma", 0.1, logged("learning_rate"), [1e-3, 1e-4, 1e-5, 1e-6], FOUR),
    ("lr_scheduler_type", "linear", logged("learning_rate"), [1e-3, 7.5e-4, 5e-4, 2.5e-4], CONSTANT),
    ("warmup_steps", 2, logged("learning_rate"), [0, 5e-4, 1e-3, 1e-3],
     CONSTANT | {"lr_scheduler_type": "constant_with_warmup"}),
    ("max_grad_norm", 1e-9, moved, False, SGD),
    ("optim", "sgd", first_moments, ["momentum_buffer"], {}),
    ("bf16", True, lambda t: t.seen.convolved[-1].dtype, torch.bfloat16, {}),
    ("channels_last", True, lambda t: t.seen.convolved[-1].stride()[1], 1, {}),
    ("evaluation_crops", 3, lambda t: t.get_eval_dataloader().dataset.views, 3, {"train": False}),
    ("omega", "given", steps_with("omega_loss"), [], {"omega_weight_decay": 1e-6}),
    ("omega_weight_decay", 100.0, omega_is_small, True, {"omega_weight_decay": 1e-12}),
    ("eval_strategy", "steps", steps_with("eval_accuracy"), [1, 2], {"eval_steps": 1}),
    ("save_strategy", "steps", saved, [1, 2], {"save_steps": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "see", "expected", "context"), EFFECTS)
def test_effect(run, field, value, see, expected, context):
    without = see(run(**context))
    seen = see(run(**(context | {"output_dir": "with", field: value})))
    expected = approx(expected) if isinstance(expected, list) else expected
    assert seen == expected
    assert without != expected


OPTIMIZERS = {
    "adam_beta1": (0.9, {}, torch.optim.Adam, {"betas": (0.9, 0.999), "weight_decay": 1e-6}),
    "adam_beta2": (0.9, {}, torch.optim.Adam, {"betas": (0.5, 0.9), "weight_decay": 1e-6}),
    "adam_epsilon": (0.1, {}, torch.optim.Adam, {"betas": (0.5, 0.999), "eps": 0.1, "weight_decay": 1e-6}),
    "weight_decay": (0.1, {}, torch.optim.Adam, {"betas": (0.5, 0.999), "weight_decay": 0.1}),
    "optim": ("adamw_torch", {}, torch.optim.AdamW, {"betas": (0.5, 0.999), "weight_decay": 1e-6}),
    "momentum": (0.5, {"optim": "sgd"}, torch.optim.SGD, {"momentum": 0.5, "weight_decay": 1e-6}),
    "nesterov": (True, {"optim": "sgd"}, torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-6}),
}


@pytest.mark.parametrize("field", OPTIMIZERS)
def test_optimizer_is_torchs(run, field):
    value, context, kind, settings = OPTIMIZERS[field]
    context = {"max_steps": 4, "lr_milestones": [], "learning_rate": 0.05} | context
    trainer = run(**context, **{field: value})
    by_hand = tiny_model()
    by_hand.load_state_dict(trainer.seen.start)
    parameters = [p for p in by_hand.train().parameters() if p.requires_grad]
    optimizer = kind(parameters, lr=0.05, **settings)
    for batch in trainer.seen.batches:
        optimizer.zero_grad()
        F.cross_entropy(by_hand(batch["pixel_values"]).logits, batch["labels"]).backward()
        optimizer.step()
    assert_equal(weights(trainer.model.students[0]), weights(by_hand), atol=2e-5)
    without = weights(run(output_dir="without", **context).model.students[0])
    if field != "optim":  # at this decay both kinds of Adam are about one
        assert any((value - without[name]).abs().max() > 1e-4 for name, value in weights(by_hand).items())


def test_seed_and_data_seed(run):
    """The order of images is data_seed's; seed draws nothing but a random omega."""
    first, seed, data = (
        run(output_dir="a"),
        run(output_dir="b", seed=1, data_seed=42),
        run(output_dir="c", data_seed=1),
    )
    assert order(first) == order(seed) != order(data)
    assert_equal(weights(first.model), weights(seed.model))


def test_bf16_keeps_losses_and_weights_in_float32(run):
    trainer = run(bf16=True, channels_last=True, max_steps=3, eval_strategy="steps", eval_steps=3)
    assert trainer.seen.convolved[-1].dtype == torch.bfloat16
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert trainer.predict(trainer.eval_dataset).predictions.dtype == "float32"


@pytest.mark.parametrize("metric", ["accuracy", "loss", "top5_accuracy"])
def test_best_model_is_restored(run, metric):
    every_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = run(train=False, max_steps=4, load_best_model_at_end=True, metric_for_best_model=metric, **every_step)
    script, after, metrics = [0.2, 0.9, 0.5, 0.3], [], trainer.evaluation_metrics

    def scripted(outputs, labels):
        found = metrics(outputs, labels)
        if trainer.state.global_step:
            after.append(weights(trainer.model))
            value = script[trainer.state.global_step - 1]
            found[metric] = 1 - value if metric == "loss" else value
        return found

    trainer.evaluation_metrics = scripted
    trainer.train()
    assert_equal(weights(trainer.model), after[1])
    assert not torch.equal(after[1]["students.0.activation_weight"], after[3]["students.0.activation_weight"])


def test_early_stopping_stops(run):
    callback = EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=1e9)  # nothing suffices
    every_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = run(max_steps=8, callbacks=[callback], metric_for_best_model="loss", **every_step)
    assert steps_done(trainer) == 3


def test_every_field_of_the_method_is_observed():
    own = {field.name for field in dataclasses.fields(GradientFeaturesConfig)}
    own -= {field.name for field in dataclasses.fields(DistillationConfig)}
    changed = {name for name in GradientFeaturesConfig.__annotations__ if name not in own}
    elsewhere = {"activation_cache_dir"}  # test_cached_activations
    assert own | changed <= {row[0] for row in EFFECTS} | OPTIMIZERS.keys() | elsewhere
