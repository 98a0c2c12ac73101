"""Each field of the Config has an effect that can be seen, or is refused: tables, and a test that none is missing."""

import dataclasses
import logging
import math
import os
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from pytest import approx
from test_online_adversarial import assert_equal, weights
from tiny_runs import digit_sources, tiny_resnet
from torch.nn import functional as F
from transformers import ProgressCallback
from transformers.utils import logging as transformers_logging
from watched_runs import (
    batch_sizes,
    card_license,
    convs,
    distance,
    gan,
    kl,
    loader,
    logged,
    losses,
    matches,
    moved,
    negative_maps,
    norms,
    order,
    saved,
    scores,
    shrinkage,
    steps_done,
    steps_with,
    watch,
    weight_of,
)

from hfkd.errors import InputError
from hfkd.trainers.config import _REFUSED
from hfkd.trainers.online_adversarial import OnlineAdversarialConfig


@pytest.fixture(autouse=True)
def unchanged_process():
    """Some flags set things of the process: they end with the test."""
    verbosity, cudnn = transformers_logging.get_verbosity(), torch.backends.cudnn.deterministic
    with mock.patch.dict(os.environ):
        yield
    transformers_logging.set_verbosity(verbosity)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = cudnn


@pytest.fixture
def run(make_trainer, tmp_path):
    """run(**config) -> a trainer that has trained for two steps of four per epoch, with what it did in `seen`."""

    def make(students=None, train=True, output_dir="run", **config):
        students = students() if students else None
        trainer = make_trainer(students, output_dir=tmp_path / output_dir, **({"max_steps": 2} | config))
        watch(trainer)
        if train:
            trainer.train()
        return trainer

    return make


def unequal():
    return [tiny_resnet(0), tiny_resnet(1, width=6)]


def three():
    return [tiny_resnet(seed) for seed in range(3)]


FOUR = {"max_steps": 4}
CONSTANT = {"max_steps": 4, "lr_milestones": []}
EVERY_STEP = {"max_steps": 4, "eval_strategy": "steps", "save_strategy": "steps", "save_steps": 1}
ALONE = {"feature_loss": "none", "kl_weight": 0.0}
ONLY_DECAY = {"feature_loss_weight": 0.0, "learning_rate": 0.0, "max_steps": 1, "feature_learning_rate": 0.01}
WORKER = {"dataloader_num_workers": 1, "train": False}

# (field, value, what is looked at, what is seen, the other settings). Without the value, something else is seen.
EFFECTS = [
    # length, batches, loaders
    ("max_steps", 3, steps_done, 3, {"num_train_epochs": 1}),
    ("num_train_epochs", 2.0, steps_done, 8, {"max_steps": -1, "num_train_epochs": 0.5}),
    ("per_device_train_batch_size", 20, batch_sizes, [20, 20], {}),
    ("gradient_accumulation_steps", 2, batch_sizes, [50] * 4, {}),
    ("dataloader_drop_last", True, batch_sizes, [120, 120], {"per_device_train_batch_size": 120}),
    ("dataloader_num_workers", 1, loader("num_workers"), 1, {"train": False}),
    ("dataloader_prefetch_factor", 3, loader("prefetch_factor"), 3, WORKER),
    ("dataloader_multiprocessing_context", "fork", lambda t: "Fork" in str(loader("multiprocessing_context")(t)), True,
     WORKER),
    # when to log, evaluate and save
    ("logging_strategy", "epoch", steps_with("loss"), [4], FOUR),
    ("logging_strategy", "no", steps_with("loss"), [], FOUR),
    ("logging_steps", 2, steps_with("loss"), [2, 4], FOUR),
    ("logging_first_step", True, steps_with("loss"), [1, 3], {"max_steps": 4, "logging_steps": 3}),
    ("eval_strategy", "epoch", steps_with("eval_loss"), [4, 8], {"max_steps": 8}),
    ("eval_strategy", "steps", steps_with("eval_loss"), [1, 2, 3, 4], FOUR),
    ("eval_steps", 2, steps_with("eval_loss"), [2, 4], {"max_steps": 4, "eval_strategy": "steps"}),
    ("eval_delay", 3, steps_with("eval_loss"), [3, 4], {"max_steps": 4, "eval_strategy": "steps"}),
    ("eval_on_start", True, steps_with("eval_loss"), [0], {}),
    ("per_device_eval_batch_size", 30, lambda t: len(t.get_eval_dataloader()), 4, {"train": False}),
    ("save_strategy", "epoch", saved, [4, 8], {"max_steps": 8}),
    ("save_strategy", "steps", saved, [2, 4], {"max_steps": 4, "save_steps": 2}),
    ("save_steps", 2, saved, [2, 4], {"max_steps": 4, "save_strategy": "steps"}),
    ("save_total_limit", 1, saved, [3], {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}),
    ("output_dir", "other", lambda t: Path(t.args.output_dir).parent.joinpath("other/checkpoint-2").exists(), True,
     {"save_strategy": "steps"}),
    # learning rates
    ("learning_rate", 0.02, logged("learning_rate"), [0.02] * 4, CONSTANT),
    ("lr_milestones", [0.5], logged("learning_rate"), [0.05, 0.05, 0.005, 0.005], FOUR),
    ("lr_gamma", 0.5, logged("learning_rate"), [0.05, 0.05, 0.025, 0.0125], FOUR),
    ("lr_gamma", 0.5, logged("learning_rate_discriminator"), [2e-5, 1e-5, 5e-6, 5e-6], FOUR),
    ("lr_scheduler_type", "linear", logged("learning_rate"), [0.05, 0.0375, 0.025, 0.0125], CONSTANT),
    ("lr_scheduler_type", "cosine", logged("learning_rate"),
     [0.025 * (1 + math.cos(math.pi * step / 4)) for step in range(4)], CONSTANT),
    ("warmup_steps", 2, logged("learning_rate"), [0, 0.025, 0.05, 0.05],
     CONSTANT | {"lr_scheduler_type": "constant_with_warmup"}),
    ("warmup_steps", 0.5, logged("learning_rate"), [0, 0.025, 0.05, 0.025],
     CONSTANT | {"lr_scheduler_type": "linear"}),
    ("feature_learning_rate", 1e-3, logged("learning_rate_feature"), [1e-3, 1e-4, 1e-5, 1e-5], FOUR),
    ("feature_learning_rate", 1e-3, logged("learning_rate_discriminator"), [1e-3, 1e-4, 1e-5, 1e-5], FOUR),
    ("feature_lr_milestones", [0.75], logged("learning_rate_feature"), [2e-5, 2e-5, 2e-5, 2e-6], FOUR),
    ("discriminator_learning_rate", 1e-3, logged("learning_rate_discriminator"), [1e-3, 1e-4, 1e-5, 1e-5], FOUR),
    ("max_grad_norm", 1e-9, moved, False, ALONE | {"momentum": 0.0, "weight_decay": 0.0}),
    # precision and layout
    ("bf16", True, lambda t: t.seen.convolved[0].dtype, torch.bfloat16, {}),
    ("channels_last", True, lambda t: t.seen.convolved[0].stride()[1], 1, {}),
    # logits
    ("temperature", 1.0, matches("student_0_kl", kl(1.0, 1)), True, {}),
    ("kl_weight", 0.5, weight_of("kl"), approx([0.5, 0.5], rel=1e-4), {}),
    ("kl_weight", 0.0, lambda t: "student_0_kl" in losses(t)[0], False, {}),
    ("kl_rampup_epochs", 10.0, weight_of("kl"), approx([math.exp(-5), math.exp(-5 * 0.975**2)], rel=0.02),
     {"feature_loss": "none"}),
    ("logit_source", "all", matches("student_0_kl", kl(3.0, 1, 2)), True, {"students": three}),
    # feature maps
    ("feature_loss", "l1", matches("student_0_feature", distance(1)), True, {}),
    ("feature_loss", "l2", matches("student_0_feature", distance(2)), True, {}),
    ("feature_loss", "none", lambda t: "student_0_feature" in losses(t)[0], False, {}),
    ("feature_normalize", True, matches("student_0_feature", distance(2, normalize=True)), True,
     {"feature_loss": "l2"}),
    ("feature_loss_weight", 0.5, weight_of("feature"), approx([0.5, 0.5], rel=1e-4), {}),
    ("feature_loss_weight", 0.0, lambda t: list(t.model.training_only), [], {}),
    ("feature_optimizer", "main", lambda t: list(t.optimizer.optimizers), ["student"], {"feature_loss": "l1"}),
    ("feature_optimizer", "adamw", shrinkage, approx(1 - 0.01 * 0.1), ONLY_DECAY),
    ("feature_weight_decay", 0.0, moved, False, ONLY_DECAY),
    ("feature_start_epoch", 0.5, lambda t: ["discriminator_0_loss" in entry for entry in losses(t)],
     [False, False, True, True], FOUR),
    ("feature_start_epoch", 0.5, lambda t: ["student_0_feature" in entry for entry in losses(t)],
     [False, False, True, True], FOUR | {"feature_loss": "l1", "feature_optimizer": "main"}),
    ("feature_tap", "pre_activation", negative_maps, True, {}),
    # discriminators and transfer layers
    ("gan_loss", "lsgan_linear", lambda t: bool((scores(t, 0)[0] < 0).any()), True, {}),
    ("gan_loss", "bce_nonsat", gan(lambda r: F.softplus(-r), F.softplus, lambda f: F.softplus(-f)), True, {}),
    ("gan_loss", "hinge", gan(lambda r: F.relu(1 - r), lambda f: F.relu(1 + f), lambda f: -f), True, {}),
    ("discriminator_norm", "instance", norms, {"InstanceNorm2d"}, {}),
    ("discriminator_norm", "none", norms, set(), {}),
    ("discriminator_batch", "joint", lambda t: [len(x) for x, _ in t.seen.judged], [100, 100], {"max_steps": 1}),
    ("discriminator_channels", 5, lambda t: convs(t)[0].out_channels, 5, {}),
    ("discriminator_layers", 3, lambda t: len(convs(t)), 3, {}),
    ("discriminator_patch", True, lambda t: scores(t, 0)[0].ndim, 2, {}),
    ("discriminator_spectral_norm", True, lambda t: convs(t)[0].weight.flatten(1).svd().S[0].item(),
     approx(1.0, rel=0.02), {}),
    ("transfer_channels", "max", lambda t: t.seen.maps[0][0].shape[1], 12, {"students": unequal}),
    ("transfer_channels", 5, lambda t: t.seen.maps[0][0].shape[1], 5, {"students": unequal}),
    ("transfer_always", True, lambda t: len(list(t.model.training_only["transfer"].parameters())) > 0, True, {}),
    ("transfer_activation", "none", negative_maps, True, {"transfer_always": True}),
    ("update_order", "generator_first", matches("student_0_feature", lambda t: (1 - scores(t, 0)[0]).square().mean()),
     True, {"discriminator_learning_rate": 0.5}),
    ("update_mode", "recompute", lambda t: torch.equal(t.seen.maps[0][0], t.seen.maps[0][-1]), False,
     {"max_steps": 1}),
    # the process, the card
    ("full_determinism", True, lambda t: torch.are_deterministic_algorithms_enabled(), True, {}),
    ("log_level", "info", lambda t: transformers_logging.get_verbosity(), logging.INFO, {}),
    ("disable_tqdm", False, lambda t: t.pop_callback(ProgressCallback) is not None, True, {"train": False}),
    ("skip_memory_metrics", False, lambda t: "train_mem_cpu_alloc_delta" in t.state.log_history[-1], True, {}),
    ("debug", "underflow_overflow", lambda t: "DebugUnderflowOverflow" in str(t.model._forward_hooks), True, {}),
    ("license", "mit", card_license, "mit", {}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "see", "expected", "context"), EFFECTS)
def test_effect(run, field, value, see, expected, context):
    without = see(run(**context))
    seen = see(run(**(context | {"output_dir": "with", field: value})))
    expected = approx(expected) if isinstance(expected, list) else expected
    assert seen == expected
    assert without != expected


# -- the students' main optimizer is torch's ------------------------------------------------------

ADAMW = {"optim": "adamw_torch"}
SGD_OF = {"momentum": 0.9, "weight_decay": 1e-4}
# field: its value, the other settings, and torch's optimizer with what it should amount to
OPTIMIZERS = {
    "momentum": (0.5, {}, torch.optim.SGD, SGD_OF | {"momentum": 0.5}),
    "nesterov": (True, {}, torch.optim.SGD, SGD_OF | {"nesterov": True}),
    "weight_decay": (0.1, {}, torch.optim.SGD, SGD_OF | {"weight_decay": 0.1}),
    "optim": ("adamw_torch", {}, torch.optim.AdamW, {"weight_decay": 1e-4}),
    "adam_beta1": (0.5, ADAMW, torch.optim.AdamW, {"betas": (0.5, 0.999), "weight_decay": 1e-4}),
    "adam_beta2": (0.9, ADAMW, torch.optim.AdamW, {"betas": (0.9, 0.9), "weight_decay": 1e-4}),
    "adam_epsilon": (0.1, ADAMW, torch.optim.AdamW, {"eps": 0.1, "weight_decay": 1e-4}),
}


@pytest.mark.parametrize("field", OPTIMIZERS)
def test_main_optimizer(run, field):
    value, context, kind, settings = OPTIMIZERS[field]
    context = ALONE | {"max_steps": 3, "lr_milestones": []} | context
    trainer = run(**context, **{field: value})
    by_hand = tiny_resnet(0).train()
    optimizer = kind(by_hand.parameters(), lr=0.05, **settings)
    for batch in trainer.seen.batches:
        optimizer.zero_grad()
        F.cross_entropy(by_hand(batch["pixel_values"]).logits, batch["labels"]).backward()
        optimizer.step()
    assert_equal(weights(trainer.model.students[0]), weights(by_hand), atol=1e-5)
    without = run(output_dir="without", **context).model.students[0].base_model.state_dict()
    assert any((value - without[name]).abs().max() > 1e-4 for name, value in by_hand.base_model.state_dict().items())


# -- flags that need more than one look -----------------------------------------------------------


def test_seed_draws_networks_and_data_seed_draws_data(run):
    first, both = run(output_dir="a"), run(output_dir="b", seed=1)
    networks, data = run(output_dir="c", seed=1, data_seed=42), run(output_dir="d", data_seed=1)
    drawn = [{k: v for k, v in t.seen.start.items() if "discriminators" in k} for t in (first, data, networks, both)]
    assert_equal(drawn[0], drawn[1])
    assert_equal(drawn[2], drawn[3])
    assert not torch.equal(drawn[0]["training_only.discriminators.0.layers.0.weight"],
                           drawn[2]["training_only.discriminators.0.layers.0.weight"])  # fmt: skip
    pixels = [[batch["pixel_values"].sum().item() for batch in t.seen.batches] for t in (first, networks, data, both)]
    assert order(first) == order(networks) and pixels[0] == pixels[1]
    assert order(data) == order(both) and pixels[2] == pixels[3]
    assert order(first) != order(data)
    # All 200 images at once: they are the same ones, cropped differently.
    whole = [run(output_dir=str(seed), data_seed=seed, per_device_train_batch_size=200) for seed in (3, 4)]
    cropped = [t.seen.batches[0]["pixel_values"][t.seen.batches[0]["index"].argsort()] for t in whole]
    assert not torch.equal(*cropped)
    assert_equal({k: v for k, v in first.seen.start.items() if "students" in k},
                 {k: v for k, v in both.seen.start.items() if "students" in k})  # fmt: skip


@pytest.mark.parametrize("waiting", [{}, {"feature_loss": "l2"}, {"feature_loss": "l1", "feature_optimizer": "main"}])
def test_before_feature_start_epoch_nothing_of_it_moves(run, waiting):
    """Neither discriminators, nor transfer layers, nor Adam's weight decay."""
    late = run(output_dir="late", max_steps=4, feature_start_epoch=1.0, transfer_always=True, **waiting)
    never = run(output_dir="never", max_steps=4, feature_loss="none")
    assert_equal(weights(late.model.students), weights(never.model.students))
    for name, parameter in late.model.training_only.named_parameters():
        assert torch.equal(parameter, late.seen.start[f"training_only.{name}"])


def test_alignment_of_no_weight_in_the_main_loss_is_none(run):
    nothing = {"feature_loss": "l1", "feature_optimizer": "main", "feature_loss_weight": 0.0}
    aligned, never = run(output_dir="a", **nothing), run(output_dir="b", feature_loss="none")
    assert_equal(weights(aligned.model.students), weights(never.model.students))


def test_bf16_in_channels_last_keeps_losses_and_weights_in_float32(run):
    trainer = run(bf16=True, channels_last=True, max_steps=3, eval_strategy="steps", eval_steps=3)
    output = trainer.seen.convolved[0]
    assert output.dtype == torch.bfloat16
    assert output.is_contiguous(memory_format=torch.channels_last) and not output.is_contiguous()
    assert {loss.dtype for loss in trainer.seen.losses} == {torch.float32}
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert all(math.isfinite(value) for entry in trainer.state.log_history for value in entry.values())


def test_accelerator_flags(run, monkeypatch):
    trainer = run(train=False)
    assert loader("pin_memory")(trainer) is False
    trainer.args.dataloader_pin_memory = True  # not in the Config: TrainingArguments drops it on a CPU
    assert loader("pin_memory")(trainer) is True
    assert OnlineAdversarialConfig("unused", use_cpu=True).device.type == "cpu"
    assert OnlineAdversarialConfig("unused").use_cpu is not torch.accelerator.is_available()
    monkeypatch.setattr(torch.backends, "fp32_precision", torch.backends.fp32_precision)
    monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
    for tf32, precision in ((True, "tf32"), (False, "ieee")):
        OnlineAdversarialConfig("unused", tf32=tf32)
        assert torch.backends.fp32_precision == precision


# -- what is refused, and that nothing is forgotten -------------------------------------------------


@pytest.mark.parametrize("field", _REFUSED)
def test_refused(field):
    default = next(f.default for f in dataclasses.fields(OnlineAdversarialConfig) if f.name == field)
    with pytest.raises(InputError, match=field) as caught:
        OnlineAdversarialConfig("unused", **{field: not default if isinstance(default, bool) else "x"},
                                **({"eval_strategy": "no"} if field == "do_eval" else {}))  # fmt: skip
    assert "\n" not in str(caught.value) and str(caught.value).endswith(_REFUSED[field])


# Refused where they would do nothing or harm: field, value, the settings.
REFUSED_WITH = [
    ("momentum", 0.5, ADAMW),
    ("nesterov", True, ADAMW),
    ("adam_beta1", 0.5, {}),
    ("warmup_steps", 2, {}),
    ("metric_for_best_model", None, {"save_strategy": "best"}),
    ("hub_strategy", "checkpoint", {}),
    ("push_to_hub", True, {}),
    ("transfer_channels", 0, {}),
    ("discriminator_channels", 0, {}),
]


@pytest.mark.parametrize(("field", "value", "context"), REFUSED_WITH)
def test_refused_with(field, value, context):
    with pytest.raises(InputError, match=field) as caught:
        OnlineAdversarialConfig("unused", **context, **{field: value})
    assert "\n" not in str(caught.value)


def test_sync_batchnorm_is_refused_on_a_cpu(run):
    with pytest.raises(InputError, match="sync_batchnorm=True needs CUDA"):
        run(sync_batchnorm=True)


def test_evaluation_without_images_is_refused(run):
    sources = SimpleNamespace(train=digit_sources().train, test=None)
    assert run(sources=sources, train=False).eval_dataset is None
    with pytest.raises(InputError, match="eval_strategy=epoch needs an eval_dataset"):
        run(sources=sources, eval_strategy="epoch")


def test_configs_can_be_copied_with_changes():
    config = OnlineAdversarialConfig("unused", eval_strategy="epoch", temperature=2.0)
    assert dataclasses.replace(config, seed=7).temperature == 2.0


# Observed in tests of their own, by name, here or in another file.
ELSEWHERE = {
    "seed": test_seed_draws_networks_and_data_seed_draws_data,
    "data_seed": test_seed_draws_networks_and_data_seed_draws_data,
    "dataloader_pin_memory": test_accelerator_flags,
    "use_cpu": test_accelerator_flags,
    "tf32": test_accelerator_flags,
    "load_best_model_at_end": "trainers/test_evaluation.py",
    "metric_for_best_model": "trainers/test_evaluation.py",
    "greater_is_better": "trainers/test_evaluation.py",
    "restore_callback_states_from_checkpoint": "trainers/test_evaluation.py",
    "sync_batchnorm": test_sync_batchnorm_is_refused_on_a_cpu,
    "resume_from_checkpoint": "scripts/test_train.py",  # `hfkd train` reads it; trainers take an argument of train()
}
_TRACKERS = "read by the tracker that report_to names"
_PROCESSES = "only read where there are several processes"
_HUB = "only read by a push to the Hub"
# Fields that change nothing in what a single, unshared run computes, logs or saves.
NOT_OBSERVED = {
    "report_to": "names trackers, which are packages of their own",
    **dict.fromkeys(("run_name", "project"), _TRACKERS),
    **dict.fromkeys(("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), _TRACKERS),
    **dict.fromkeys(("log_on_each_node", "log_level_replica", "local_rank", "ddp_backend", "ddp_timeout"), _PROCESSES),
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_token", "hub_private_repo"), _HUB),
    **dict.fromkeys(("hub_strategy", "hub_revision"), _HUB),
}


def test_no_field_is_forgotten():
    observed = {row[0] for row in EFFECTS} | OPTIMIZERS.keys()
    groups = (observed, ELSEWHERE.keys(), _REFUSED.keys(), NOT_OBSERVED.keys())
    counted = [field for group in groups for field in group]
    assert sorted(counted) == sorted(field.name for field in dataclasses.fields(OnlineAdversarialConfig))
    for field, place in ELSEWHERE.items():
        if isinstance(place, str):
            assert field in (Path(__file__).parents[1] / place).read_text()
