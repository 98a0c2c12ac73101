"""What each setting of BiGAN, the GAN and the VAE does, seen from outside; those of the base are in `test_flags`."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from generative_runs import tiny_trainer
from pytest import approx
from test_flags import unchanged_process  # noqa: F401  a fixture
from test_online_adversarial import assert_equal, weights
from torch import nn
from watched_runs import batch_sizes, logged, losses, order, saved, steps_done, steps_with

from hfkd.trainers.bigan import BiGanConfig
from hfkd.trainers.config import DistillationConfig
from hfkd.trainers.gan import GanConfig, GanTrainer
from hfkd.trainers.vae import VaeConfig


CONFIGS = {"bigan": BiGanConfig, "gan": GanConfig, "vae": VaeConfig}
METHODS = sorted(CONFIGS)


@pytest.fixture
def run(tmp_path):
    """run(method, **config) -> a trainer that has trained for two steps of four per epoch, and what it did in `seen`.

    That is its batches, the gradients of each update by optimizer and parameter, a convolution's outputs, the share
    that each dropout of the discriminator dropped, what a GAN's discriminator is shown, and all weights at the start.
    """

    def make(method, train=True, output_dir="run", **config):
        trainer = tiny_trainer(method, tmp_path / output_dir, **({"max_steps": 2} | config))
        trainer.seen = watch(trainer)
        if train:
            trainer.train()
        return trainer

    return make


def watch(trainer):
    seen = SimpleNamespace(batches=[], gradients=[], convolved=[], dropped=[], shown=[], start=weights(trainer.model))
    step, networks = trainer.method_step, trainer.model
    names = {parameter: name for name, parameter in networks.named_parameters()}

    def watched(batch, share, last):
        result = step(batch, share, last)
        seen.batches.append(batch)
        owned = {name: trainer.optimizer.gradients(name) for name in trainer.optimizer.optimizers}
        seen.gradients.append({o: {names[p]: g.clone() for p, g in own.items()} for o, own in owned.items()})
        return result

    def dropped(module, args, output):
        present = args[0] != 0
        seen.dropped.append(((output == 0) & present).sum().item() / present.sum().item())

    trainer.method_step = watched
    convolutions = [m for m in networks.students.modules() if isinstance(m, nn.Conv2d)]
    # A GAN has them in its discriminator alone; elsewhere the first one has a single channel to read.
    one = 0 if isinstance(trainer, GanTrainer) else 1
    convolutions[one].register_forward_hook(lambda m, x, y: seen.convolved.append(y))
    if isinstance(trainer, GanTrainer):
        networks.students[1].register_forward_hook(lambda m, x, y: seen.shown.append(x[0].detach()))
    for layer in networks.training_only.modules():
        if isinstance(layer, nn.Dropout):
            layer.register_forward_hook(dropped)
    return seen


# -- what can be looked at: functions of a trainer that has trained ---------------------------------


def parts_that_moved(t):
    """Networks and training-only modules, such as `students.0` and `training_only.discriminator`."""
    moved = [n for n, p in t.model.named_parameters() if (p - t.seen.start[n]).abs().max() > 1e-8]
    return {part_of(name) for name in moved}


def part_of(name):
    return ".".join(name.split(".")[:2])


def kinds_in_discriminator(t):
    return {type(m).__name__ for m in t.model.training_only["discriminator"].modules()}


def average_is(share):
    """Whether the saved generator is where it was, but for this share of what the learning one has moved."""

    def see(t):
        average, learner = t.model.students[0], t.model.training_only["generator"]
        named = zip(average.named_parameters(), learner.parameters(), strict=True)
        starts = [(t.seen.start[f"students.0.{name}"], own, new) for (name, own), new in named]
        return all(torch.allclose(own, start.lerp(new, share), atol=1e-7) for start, own, new in starts)

    return see


def only_holes(t):
    """Whether real images are shown as they are, but for what was cut out."""
    shown, images = t.seen.shown[0], t.seen.batches[0]["pixel_values"]
    return bool(((shown == images) | (shown == 0)).all() and (shown != images).any())


def weight_of(term, total, rest):
    """What a term weighs in a logged total: one number for each step, given the sum of the other terms."""
    return lambda t: [(entry[total] - rest(entry)) / entry[term] for entry in losses(t)]


FOUR = {"max_steps": 4}
CONSTANT = {"max_steps": 4, "lr_milestones": []}
WASSERSTEIN = {"gan_loss": "wasserstein"}
# A target that is always exceeded: half a probability more after each update.
ADA = {"discriminator_augmentation": "ada", "ada_target": -1.0, "ada_interval": 1, "ada_images": 0.1}
DISCRIMINATOR_RATES = [
    ("discriminator_learning_rate", 0.01, logged("learning_rate_discriminator"), [0.01] * 4, CONSTANT),
    ("discriminator_lr_milestones", [0.5], logged("learning_rate_discriminator"), [1e-3, 1e-3, 1e-4, 1e-4], FOUR),
    ("lr_gamma", 0.5, logged("learning_rate_discriminator"), [1e-3, 1e-3, 5e-4, 5e-4],
     FOUR | {"discriminator_lr_milestones": [0.5]}),
]  # fmt: skip

# (field, value, what is looked at, what is seen, the other settings). Without the value, something else is seen.
SHARED = [
    ("num_train_epochs", 0.25, steps_done, 1, {"max_steps": -1, "num_train_epochs": 0.5}),
    ("per_device_train_batch_size", 20, batch_sizes, [20, 20], {}),
    ("gradient_accumulation_steps", 2, batch_sizes, [50] * 4, {}),
    ("learning_rate", 0.02, logged("learning_rate"), [0.02] * 4, CONSTANT),
    ("learning_rate", 0.0, parts_that_moved, set(), {}),
    ("lr_milestones", [0.5], logged("learning_rate"), [1e-3, 1e-3, 1e-4, 1e-4], FOUR),
    ("lr_gamma", 0.5, logged("learning_rate"), [1e-3, 1e-3, 5e-4, 5e-4], FOUR | {"lr_milestones": [0.5]}),
    ("lr_scheduler_type", "linear", logged("learning_rate"), [1e-3, 7.5e-4, 5e-4, 2.5e-4], CONSTANT),
    ("warmup_steps", 2, logged("learning_rate"), [0, 5e-4, 1e-3, 1e-3],
     CONSTANT | {"lr_scheduler_type": "constant_with_warmup"}),
    # Adam divides by the gradient's size, but not below its epsilon.
    ("max_grad_norm", 1e-15, parts_that_moved, set(), {}),
    ("bf16", True, lambda t: t.seen.convolved[-1].dtype, torch.bfloat16, {}),
    ("channels_last", True, lambda t: t.seen.convolved[0].stride()[1], 1, {}),
    ("eval_strategy", "steps", steps_with("eval_runtime"), [1, 2], {"eval_steps": 1}),
    ("save_strategy", "steps", saved, [1, 2], {"save_steps": 1}),
]  # fmt: skip
EFFECTS = {
    "bigan": [
        *SHARED,
        ("gan_loss", "wasserstein", lambda t: "gradient_penalty" in losses(t)[0], True, {}),
        ("gradient_penalty_weight", 3.0,
         weight_of("gradient_penalty", "discriminator_loss", lambda entry: -entry["generator_loss"]),
         approx([3.0, 3.0], rel=1e-3), WASSERSTEIN),
        ("discriminator_steps", 3, lambda t: [bool(update["encoder_generator"]) for update in t.seen.gradients],
         [True, False, False, True], FOUR),
        *DISCRIMINATOR_RATES,
        ("discriminator_learning_rate", 0.0, lambda t: "training_only.discriminator" in parts_that_moved(t), False,
         {}),
        ("discriminator_activation", "leaky_relu", lambda t: kinds_in_discriminator(t) & {"Maxout", "LeakyReLU"},
         {"LeakyReLU"}, {}),
        ("discriminator_norm", "batch", lambda t: "BatchNorm2d" in kinds_in_discriminator(t), True, {}),
        ("discriminator_input_dropout", 0.4, lambda t: t.seen.dropped[0], approx(0.4, abs=0.05), {}),
        ("discriminator_dropout", 0.2, lambda t: t.seen.dropped[1], approx(0.2, abs=0.05), {}),
    ],
    "gan": [
        *SHARED,
        *DISCRIMINATOR_RATES,
        ("discriminator_learning_rate", 0.0, lambda t: "students.1" in parts_that_moved(t), False, {}),
        ("r1_weight", 0.0, steps_with("r1_penalty"), [], {}),
        ("r1_interval", 2, steps_with("r1_penalty"), [1, 3], FOUR),
        # Without a limit from the first step on; the half-life is one update.
        ("ema_half_life", 0.05, average_is(0.5), True, {"max_steps": 1, "ema_ramp_up": 0.0}),
        ("ema_ramp_up", 0.0, average_is(1), False, {"max_steps": 1}),
        ("discriminator_augmentation", "diffaugment",
         lambda t: torch.equal(t.seen.shown[0], t.seen.batches[0]["pixel_values"]), False, {}),
        ("discriminator_augmentation", "ada", lambda t: "augmentation_probability" in losses(t)[0], True, {}),
        ("augmentation_operations", ["cutout"], only_holes, True, {"discriminator_augmentation": "diffaugment"}),
        ("ada_target", 1.0, logged("augmentation_probability"), [0, 0], ADA),
        ("ada_interval", 2, logged("augmentation_probability"), [0, 0, 1, 1], FOUR | ADA),
        ("ada_images", 0.2, logged("augmentation_probability"), [0, 0.25, 0.5, 0.75], FOUR | ADA),
    ],
    "vae": [
        *SHARED,
        ("latent_channels", 5, lambda t: t.predict(t.eval_dataset).predictions.shape, (100, 5 * 4 * 4), {}),
        ("beta", 0.5, weight_of("kl", "loss", lambda entry: entry["nll"]), approx([0.5, 0.5], rel=1e-2), {}),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "field", "value", "see", "expected", "context"),
    [(method, *row) for method in METHODS for row in EFFECTS[method]],
)
def test_effect(run, method, field, value, see, expected, context):
    without = see(run(method, **context))
    seen = see(run(method, **(context | {"output_dir": "with", field: value})))
    assert seen == (approx(expected) if isinstance(expected, list) else expected)
    assert without != expected


# field: its value, and the other settings. Without decay both kinds of Adam are one.
OPTIMIZERS = {
    "optim": ("adamw_torch", {"weight_decay": 0.2}),
    "weight_decay": (0.5, {}),
    "adam_beta1": (0.7, {}),
    "adam_beta2": (0.9, {}),
    "adam_epsilon": (0.1, {}),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("field", OPTIMIZERS)
def test_optimizers_are_torchs(run, method, field):
    value, context = OPTIMIZERS[field]
    trainer = run(method, max_steps=3, **context, **{field: value})
    without = run(method, train=False, output_dir="without", **context)
    assert goes_where_torch_goes(trainer, trainer.args)
    assert not goes_where_torch_goes(trainer, without.args)


def goes_where_torch_goes(trainer, args):
    """Whether each of a run's optimizers, with its own gradients, went where torch's of these settings goes."""
    kind = {"adam": torch.optim.Adam, "adamw_torch": torch.optim.AdamW}[args.optim]
    betas = (args.adam_beta1, args.adam_beta2)
    now = dict(trainer.model.named_parameters())
    for owner in trainer.optimizer.optimizers:
        own = {name: trainer.seen.start[name].clone() for name in trainer.seen.gradients[0][owner]}
        optimizer = kind(own.values(), args.learning_rate, betas, args.adam_epsilon, args.weight_decay)
        for update in trainer.seen.gradients:
            for name, value in own.items():
                value.grad = update[owner][name]
            optimizer.step()
        if any((value - now[name]).abs().max() > 1e-6 for name, value in own.items()):
            return False
    return True


def test_the_seed_draws_no_network_of_a_gan(run):
    """All of them are given; the data's draws follow the data's seed."""
    first, other, data = (run("gan", output_dir=str(n), **s) for n, s in enumerate(({}, {"seed": 1, "data_seed": 42},
                                                                                   {"data_seed": 1})))  # fmt: skip
    assert order(first) == order(other) != order(data)
    assert_equal(weights(first.model), weights(other.model))


@pytest.mark.parametrize("method", ["bigan", "vae"])
def test_seed_draws_networks_and_data_seed_draws_data(run, method):
    first = run(method, output_dir="a")
    networks = run(method, output_dir="b", seed=1, data_seed=42)
    data = run(method, output_dir="c", data_seed=1)
    assert order(first) == order(networks) != order(data)
    drawn = [{k: v for k, v in t.seen.start.items() if "training_only" in k} for t in (first, networks, data)]
    assert_equal(drawn[0], drawn[2])
    assert any(not torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    given = [{k: v for k, v in t.seen.start.items() if "students" in k} for t in (first, networks)]
    assert_equal(*given)


@pytest.mark.parametrize("method", METHODS)
def test_best_model_restores_every_network(run, method):
    every_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    metric = "discriminator_loss" if method == "gan" else "reconstruction_error"
    best = {"load_best_model_at_end": True, "metric_for_best_model": metric}
    trainer = run(method, train=False, max_steps=4, **every_step, **best)
    script, after, metrics = [0.8, 0.1, 0.5, 0.7], [], trainer.evaluation_metrics

    def scripted(outputs, labels):
        found = metrics(outputs, labels)
        if trainer.state.global_step:
            after.append(weights(trainer.model))
            found[metric] = script[trainer.state.global_step - 1]
        return found

    trainer.evaluation_metrics = scripted
    trainer.train()
    assert_equal(weights(trainer.model), after[1])
    changed = {part_of(name) for name in after[1] if not torch.equal(after[1][name], after[3][name])}
    assert changed == {part_of(name) for name in after[1]}


@pytest.mark.parametrize("method", METHODS)
def test_every_field_of_the_method_is_observed(method):
    kind = CONFIGS[method]
    of_base = {field.name for field in dataclasses.fields(DistillationConfig)}
    own = {field.name for field in dataclasses.fields(kind)} - of_base
    changed = {name for name in kind.__annotations__ if name in of_base}
    assert own and changed
    assert own | changed <= {row[0] for row in EFFECTS[method]} | OPTIMIZERS.keys()
