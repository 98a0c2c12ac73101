"""What each setting of GBC does, seen from outside; those of the base are seen in `test_flags`."""

import dataclasses
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from classifier_runs import tiny_mlp, tiny_trainer, warmed_up
from pytest import approx
from test_flags import unchanged_process  # noqa: F401  a fixture
from test_online_adversarial import weights
from watched_runs import batch_sizes, logged, saved, steps_done, steps_with

from hfkd.errors import InputError
from hfkd.losses import generator_from_classifier as formulas
from hfkd.trainers import convergence
from hfkd.trainers.config import DistillationConfig
from hfkd.trainers.generator_from_classifier import GeneratorFromClassifierConfig


@pytest.fixture
def run(tmp_path):
    """run(**config) -> a trainer that has trained for four updates, the first of warm-up, and what went through it."""

    def make(train=True, output_dir="run", several=False, norm="none", **config):
        networks = [tiny_mlp(norm=norm), *([tiny_mlp(1, num_labels=3)] if several else [])]
        settings = {"max_steps": 4, "warmup_updates": 1} | config
        trainer = tiny_trainer(tmp_path / output_dir, networks, **settings)
        trainer.seen = SimpleNamespace(start=weights(trainer.model), batches=[], temperatures=[], made=[])
        step = trainer.method_step

        def watched(batch, share, last):
            trainer.seen.batches.append(batch)
            return step(batch, share, last)

        trainer.method_step = watched
        trainer.model.students[0].to_image.register_forward_hook(lambda m, x, y: trainer.seen.made.append(y))
        potential = formulas.cross_entropy_potential

        def cooled(logits, labels, temperature):
            trainer.seen.temperatures.append(float(temperature))
            return potential(logits, labels, temperature)

        if train:
            with mock.patch.object(convergence, "cross_entropy_potential", cooled):
                trainer.train()
        return trainer

    return make


def moved(t):
    return any(
        (p - t.seen.start[f"students.{name}"]).abs().max() > 1e-8 for name, p in t.model.students.named_parameters()
    )


def weight_of(name):
    """What this part weighs in the logged loss of the last update."""

    def see(t):
        entry = t.state.log_history[-2]
        rest = {"stationarity": 1.0, "duality": 1.0, "total_variation": 0.02}
        others = sum(weight * entry[part] for part, weight in rest.items() if part != name)
        return round((entry["loss"] - others) / entry[name], 4)

    return see


def turns_slowly(t):
    """Whether the latents of one update are all but those of the next."""
    updates = torch.arange(2 * t.args.train_batch_size).chunk(2)
    one, other = (t._draw(0, {"index": index, "epoch": torch.zeros_like(index)})[0] for index in updates)
    return bool(torch.nn.functional.cosine_similarity(one, other).min() > 0.9)


def has(name):
    return lambda t: name in t.state.log_history[-2]


def conditions(name):
    return lambda t: getattr(t.conditions[0], name)


def stationary(t):
    return len(t.conditions[0].stationary)


def optimizers(t):
    return list(t.optimizer.optimizers)


def chosen(t):
    return [sum(f"classifier_{k}_duality" in entry for k in (0, 1)) for entry in t.state.log_history[1:-1]]


CONSTANT = {"lr_milestones": []}
LEARNED = {"multipliers": "network"}
NO_WARMUP = {"warmup_updates": 0}

# (field, value, what is looked at, what is seen, the other settings). Without the value, something else is seen.
EFFECTS = [
    ("max_steps", 3, steps_done, 3, {}),
    ("per_device_train_batch_size", 8, batch_sizes, [8] * 4, {}),
    ("per_device_eval_batch_size", 8, lambda t: len(t.eval_dataset), 8, {"train": False}),
    ("learning_rate", 0.01, logged("learning_rate"), [0.01] * 4, CONSTANT),
    ("lr_milestones", [0.25], logged("learning_rate"), [2e-3, 4e-4, 4e-4, 4e-4], {}),
    ("lr_gamma", 0.5, logged("learning_rate"), [2e-3, 2e-3, 1e-3, 1e-3], {}),
    ("lr_gamma", 0.5, logged("learning_rate_multipliers"), [4e-3, 4e-3, 2e-3, 2e-3], LEARNED),
    ("lr_scheduler_type", "linear", logged("learning_rate"), [2e-3, 1.5e-3, 1e-3, 5e-4], CONSTANT),
    ("optim", "adamw_torch", lambda t: type(t.optimizer.optimizers["generator"]), torch.optim.AdamW, {}),
    ("max_grad_norm", 1e-12, moved, False, {"adam_epsilon": 1.0}),
    ("stationarity_weight", 3.0, weight_of("stationarity"), 3.0, {}),
    ("stationarity_weight", 0.0, has("stationarity"), False, {}),
    ("duality_weight", 0.5, weight_of("duality"), 0.5, {}),
    ("total_variation_weight", 0.5, weight_of("total_variation"), 0.5, {}),
    ("pixel_mean_weight", 64.0, lambda t: has("pixel_mean")(t) and round(weight_of("pixel_mean")(t)), 64, {}),
    ("latent_period", 50, turns_slowly, True, {}),
    ("warmup_updates", 3, steps_with("cross_entropy"), [1, 2, 3], {}),
    ("multipliers", "network", optimizers, ["generator", "multipliers"], {}),
    ("multipliers", "constant", lambda t: len(list(t.model.training_only.parameters())), 1, {}),
    ("temperature", "margin", lambda t: t.seen.temperatures, [5.0] * 3, {}),
    ("temperature", "exact", lambda t: t.seen.temperatures, [1.0] * 3, {}),
    ("margin_temperature", 4.0, lambda t: t.seen.temperatures, [2.5] * 3, {"temperature": "margin"}),
    ("multiplier_learning_rate", 0.1, logged("learning_rate_multipliers"), [0.1] * 4, LEARNED | CONSTANT),
    ("stationarity_set", "all", stationary, 6, {"train": False}),
    ("stationarity_set", "last", conditions("stationary"), ("classifier.weight",), {"train": False}),
    ("margin_scale", 3.0, conditions("margin_scale"), 3.0, {"train": False}),
    ("bf16", True, lambda t: t.seen.made[0].dtype, torch.bfloat16, {}),
    ("channels_last", True, lambda t: t.model.students[0].to_image.weight.stride()[1], 1, {}),
    ("classifiers_per_step", "one", chosen, [1, 1, 1], {"several": True}),
    ("eval_strategy", "steps", steps_with("eval_sqrt_stationarity"), [2, 4], {"eval_steps": 2}),
    ("save_strategy", "steps", saved, [2, 4], {"save_steps": 2}),
    ("logging_steps", 2, steps_with("loss"), [2, 4], {}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "see", "expected", "context"), EFFECTS)
def test_effect(run, field, value, see, expected, context):
    without = see(run(**context))
    seen = see(run(**(context | {"output_dir": "with", field: value})))
    expected = approx(expected) if isinstance(expected, list) else expected
    assert seen == expected
    assert without != expected


# -- settings whose effect is on what a batch of images is measured to be ----------------------------------------


def measured(trainer):
    """L_st and U of fixed draws."""
    metrics = trainer.evaluate()
    return metrics["eval_sqrt_stationarity"] ** 2, metrics["eval_duality"]


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A classifier with batch norm, and a generator that it agrees with."""
    classifier = tiny_mlp(norm="batch")
    return classifier, warmed_up(tmp_path_factory.mktemp("warm"), [classifier]).model.students[0]


MEASURED = {
    "per_group": (False, {}, "stationarity"),
    "zero_weight": (1.0, {}, "stationarity"),
    "gate_sharpness": (2.0, {}, "stationarity"),
    "batchnorm_statistics": ("batch", {}, "both"),
    "duality": ("walls", {}, "duality"),
    "custom_set": (["classifier.*"], {"stationarity_set": "custom", "custom_set": ["*.1.0.0.weight"]}, "stationarity"),
    "temperature": ("margin", {}, "stationarity"),
    "margin_scale": (20.0, {}, "duality"),
}


@pytest.mark.parametrize("field", MEASURED)
def test_what_is_measured(tmp_path, networks, field):
    value, context, part = MEASURED[field]
    classifier, generator = networks
    before, after = (
        measured(tiny_trainer(tmp_path / name, [classifier], generator, **settings))
        for name, settings in (("without", context), ("with", context | {field: value}))
    )
    changed = {
        name for name, one, other in zip(("stationarity", "duality"), before, after, strict=True) if one != other
    }
    assert changed == ({"stationarity", "duality"} if part == "both" else {part})


def test_smooth_gates_are_those_of_the_derivative_alone(tmp_path, networks):
    classifier, generator = networks
    sharp, smooth = (
        tiny_trainer(tmp_path / str(gate), [classifier], generator, gate_sharpness=gate).conditions[0]
        for gate in (0, 5)
    )
    images = torch.rand(9, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(sharp.logits(images), smooth.logits(images))
    labels = sharp.logits(images).argmax(dim=1)  # others would explain nothing at all, with either
    assert sharp(images, labels).stationarity != smooth(images, labels).stationarity


def test_seeds_draw_networks_and_images(run):
    """`seed` draws the learned multipliers, and what is drawn for a batch unless `data_seed` does."""
    first, data = run(output_dir="a", **LEARNED), run(output_dir="b", data_seed=1, **LEARNED)
    seed = run(output_dir="c", seed=1, data_seed=42, **LEARNED)
    names = [name for name in first.seen.start if "multipliers.0.layers.0.weight" in name]
    for name in names:
        assert torch.equal(first.seen.start[name], data.seen.start[name])
        assert not torch.equal(first.seen.start[name], seed.seen.start[name])
    assert names and torch.equal(first.seen.made[0], seed.seen.made[0])
    assert not torch.equal(first.seen.made[0], data.seen.made[0])


# -- what is refused, and that nothing is forgotten ---------------------------------------------------------------


REFUSED = [
    ("max_steps", 0, {}),
    ("max_steps", -1, {}),
    ("num_train_epochs", 2.0, {}),
    ("dataloader_drop_last", True, {}),
    ("gradient_accumulation_steps", 2, {}),
    ("optim", "sgd", {}),
    ("stationarity_weight", -1.0, {}),
    ("duality_weight", -1.0, {}),
    ("stationarity_weight", 0.0, {"duality_weight": 0.0}),
    ("total_variation_weight", -1.0, {}),
    ("pixel_mean_weight", -1.0, {}),
    ("latent_period", 0, {}),
    ("zero_weight", -1.0, {}),
    ("zero_weight", 1.0, {"stationarity_set": "all"}),
    ("warmup_updates", -1, {}),
    ("gate_sharpness", -1.0, {}),
    ("margin_scale", 0.0, {}),
    ("margin_temperature", 0.0, {"temperature": "margin"}),
    ("margin_temperature", 3.0, {}),
    ("margin_temperature", 3.0, {"temperature": "exact"}),
    ("temperature", "margin", {"multipliers": "network"}),
    ("multiplier_learning_rate", 0.1, {}),
    ("multiplier_learning_rate", -0.1, LEARNED),
    ("custom_set", ["*"], {}),
    ("stationarity_set", "custom", {}),
    ("stationarity_set", "best", {}),
    ("multipliers", "none", {}),
]


@pytest.mark.parametrize(("field", "value", "context"), REFUSED)
def test_refused(field, value, context):
    with pytest.raises(InputError, match=field) as caught:
        GeneratorFromClassifierConfig("unused", use_cpu=True, **context, **{field: value})
    assert "\n" not in str(caught.value)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(GeneratorFromClassifierConfig, "world_size", 2)
    with pytest.raises(InputError, match="2 processes are not supported: stationarity is of the mean gradient"):
        GeneratorFromClassifierConfig("unused", use_cpu=True)


def test_configs_can_be_copied_with_changes():
    config = GeneratorFromClassifierConfig("unused", use_cpu=True, multipliers="network")
    assert dataclasses.replace(config, seed=7).multipliers == "network"


def test_every_field_of_the_method_is_observed():
    inherited = {field.name for field in dataclasses.fields(DistillationConfig)}
    own = {field.name for field in dataclasses.fields(GeneratorFromClassifierConfig)} - inherited
    changed = {name for name in GeneratorFromClassifierConfig.__annotations__ if name in inherited}
    assert own | changed <= {row[0] for row in EFFECTS} | MEASURED.keys()
