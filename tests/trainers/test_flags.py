"""Every field of the Config does something that can be seen, or is refused: one table, and a test that it is complete."""

import logging
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from test_online_adversarial import weights
from tiny_runs import tiny_resnet
from torch import nn
from torch.nn import functional as F
from transformers import ProgressCallback
from transformers.utils import logging as transformers_logging


@pytest.fixture(autouse=True)
def unchanged_process(monkeypatch):
    """Some flags set things of the process: they end with the test."""
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    verbosity, cudnn = transformers_logging.get_verbosity(), torch.backends.cudnn.deterministic
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
        trainer.seen = watch(trainer)
        if train:
            trainer.train()
        return trainer

    return make


def watch(trainer):
    """Record what passes through the networks: batches, logits, maps, scores of D_0, outputs of a convolution."""
    students, training_only = trainer.model.students, trainer.model.training_only
    seen = SimpleNamespace(start=weights(trainer.model), batches=[], losses=[], convolved=[], judged=[])
    seen.logits, seen.maps = [[] for _ in students], [[] for _ in students]
    step = trainer.method_step

    def watched(batch, share, last):
        loss, parts = step(batch, share, last)
        seen.batches.append(batch)
        seen.losses += [loss, *parts.values()]
        return loss, parts

    trainer.method_step = watched
    for student, logits in zip(students, seen.logits, strict=True):
        student.classifier.register_forward_hook(lambda m, x, y, keep=logits: keep.append(y.detach().float()))
    for layer, maps in zip(training_only["transfer"] if "transfer" in training_only else (), seen.maps, strict=False):
        layer.register_forward_hook(lambda m, x, y, keep=maps: keep.append(y.detach().float()))
    for discriminator in list(training_only["discriminators"])[:1] if "discriminators" in training_only else ():
        discriminator.register_forward_hook(lambda m, x, y: seen.judged.append((x[0].detach(), y.detach())))
    last = [m for m in students[0].modules() if isinstance(m, nn.Conv2d)][-1]
    last.register_forward_hook(lambda m, x, y: seen.convolved.append(y))
    return seen


# -- what is looked at: functions of a trainer that has trained ------------------------------------


def losses(t):
    return [entry for entry in t.state.log_history if "loss" in entry]


def logged(name):
    return lambda t: [entry[name] for entry in losses(t)]


def steps_with(name):
    return lambda t: [entry["step"] for entry in t.state.log_history if name in entry]


def steps_done(t):
    return t.state.global_step


def batch_sizes(t):
    return [len(batch["index"]) for batch in t.seen.batches]


def order(t):
    return [batch["index"].tolist() for batch in t.seen.batches]


def loader(name):
    return lambda t: getattr(t.get_train_dataloader(), name)


def saved(t):
    return sorted(int(path.name.split("-")[1]) for path in Path(t.args.output_dir).glob("checkpoint-*"))


def moved(t):
    """Whether any weight of a student has."""
    return any((p - t.seen.start[f"students.{name}"]).abs().max() > 1e-8 for name, p in t.model.students.named_parameters())


def shrinkage(t):
    name = next(name for name, parameter in t.model.named_parameters() if parameter.ndim == 4)
    return (t.model.state_dict()[name] / t.seen.start[name]).mean().item()


def convs(t):
    return [m for m in t.model.training_only["discriminators"][0].modules() if isinstance(m, nn.Conv2d)]


def norms(t):
    kinds = {type(m).__name__ for m in t.model.training_only["discriminators"][0].modules()}
    return kinds & {"BatchNorm2d", "InstanceNorm2d"}


def negative_maps(t):
    return bool((t.seen.maps[0][0] < 0).any())


def matches(name, formula):
    """Whether the first logged value of a part of the loss is what the formula gives."""
    return lambda t: math.isclose(logged(name)(t)[0], formula(t).item(), rel_tol=1e-4)


def weight_of(name):
    """What this part weighs in the logged loss: an estimate for each step."""

    def see(t):
        parts = {part: [sum(e[f"student_{k}_{part}"] for k in (0, 1)) for e in losses(t)] for part in ("ce", "kl")}
        parts["feature"] = [e.get("student_0_feature", 0) + e.get("student_1_feature", 0) for e in losses(t)]
        rest = [part for part in parts if part != name]
        totals = logged("loss")(t)
        return [(total - sum(parts[p][i] for p in rest)) / parts[name][i] for i, total in enumerate(totals)]

    return see


def kl(temperature, *sources):
    def formula(t):
        learner, *teachers = (t.seen.logits[k][0] / temperature for k in (0, *sources))
        each = [F.kl_div(learner.log_softmax(1), z.softmax(1), reduction="batchmean") for z in teachers]
        return temperature**2 * torch.stack(each).mean()

    return formula


def distance(power, normalize=False):
    def formula(t):
        a, b = (F.normalize(f.flatten(1), dim=1) if normalize else f for f in (t.seen.maps[0][0], t.seen.maps[1][0]))
        return (a - b).abs().pow(power).mean()

    return formula


def scores(t, k):
    """D_0's scores of network k's maps of the first step: before and after D_0 itself has moved."""
    return [score for feature_map, score in t.seen.judged if torch.equal(feature_map, t.seen.maps[k][0])]


def gan(real_loss, fake_loss, generator_loss):
    """Whether both losses of the first step are these functions of the scores."""
    discriminator = matches(
        "discriminator_0_loss", lambda t: real_loss(scores(t, 1)[0]).mean() + fake_loss(scores(t, 0)[0]).mean()
    )
    generator = matches("student_0_feature", lambda t: generator_loss(scores(t, 0)[-1]).mean())
    return lambda t: discriminator(t) and generator(t)


def card_license(t):
    t.save_model()
    return yaml.safe_load((Path(t.args.output_dir) / "README.md").read_text().split("---")[1])["license"]


def unequal():
    return [tiny_resnet(0), tiny_resnet(1, width=6)]


def three():
    return [tiny_resnet(seed) for seed in range(3)]


DIFFERS = object()
FOUR = {"max_steps": 4}
CONSTANT = {"max_steps": 4, "lr_milestones": []}
EVERY_STEP = {"max_steps": 4, "eval_strategy": "steps", "save_strategy": "steps", "save_steps": 1}
PLAIN_SGD = {"feature_loss": "none", "kl_weight": 0.0, "momentum": 0.0, "weight_decay": 0.0}
ONLY_DECAY = {"feature_loss_weight": 0.0, "learning_rate": 0.0, "max_steps": 1, "feature_learning_rate": 0.01}
LOGITS_ONLY = {"feature_loss": "none"}
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
    ("dataloader_multiprocessing_context", "fork", lambda t: str(loader("multiprocessing_context")(t)), DIFFERS, WORKER),
    ("seed", 1, lambda t: t.seen.start["training_only.discriminators.0.layers.0.weight"].tolist(), DIFFERS, {}),
    ("seed", 1, order, DIFFERS, {}),
    ("data_seed", 1, order, DIFFERS, {}),
    ("data_seed", 1, lambda t: t.seen.batches[0]["pixel_values"].sum(), DIFFERS, {"per_device_train_batch_size": 200}),
    # when to log, evaluate and save
    ("logging_strategy", "epoch", steps_with("loss"), [4], FOUR),
    ("logging_strategy", "no", steps_with("loss"), [], FOUR),
    ("logging_steps", 2, steps_with("loss"), [2, 4], FOUR),
    ("logging_first_step", True, steps_with("loss"), [1, 3], {"max_steps": 4, "logging_steps": 3}),
    ("eval_strategy", "epoch", steps_with("eval_loss"), [4, 8], {"max_steps": 8}),
    ("eval_strategy", "steps", steps_with("eval_loss"), [1, 2, 3, 4], FOUR),
    ("eval_steps", 2, steps_with("eval_loss"), [2, 4], EVERY_STEP),
    ("eval_delay", 3, steps_with("eval_loss"), [3, 4], EVERY_STEP),
    ("eval_on_start", True, steps_with("eval_loss"), [0], {}),
    ("per_device_eval_batch_size", 30, lambda t: len(t.get_eval_dataloader()), 4, {"train": False}),
    ("save_strategy", "epoch", saved, [4, 8], {"max_steps": 8}),
    ("save_strategy", "steps", saved, [2, 4], {"max_steps": 4, "save_steps": 2}),
    ("save_steps", 2, saved, [2, 4], {"max_steps": 4, "save_strategy": "steps"}),
    ("save_total_limit", 1, saved, [4], EVERY_STEP),
    ("output_dir", "other", lambda t: (Path(t.args.output_dir).parent / "other/checkpoint-4").exists(), True, EVERY_STEP),
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
    ("max_grad_norm", 1e-9, moved, False, PLAIN_SGD),
    # precision and layout
    ("bf16", True, lambda t: t.seen.convolved[0].dtype, torch.bfloat16, {}),
    ("channels_last", True, lambda t: t.seen.convolved[0].stride()[1] == 1, True, {}),
    # logits
    ("temperature", 1.0, matches("student_0_kl", kl(1.0, 1)), True, {}),
    ("kl_weight", 0.5, weight_of("kl"), pytest.approx([0.5, 0.5], rel=1e-4), {}),
    ("kl_weight", 0.0, lambda t: "student_0_kl" in losses(t)[0], False, {}),
    ("kl_rampup_epochs", 10.0, weight_of("kl"), pytest.approx([math.exp(-5), math.exp(-5 * 0.975**2)], rel=0.02), LOGITS_ONLY),
    ("logit_source", "all", matches("student_0_kl", kl(3.0, 1, 2)), True, {"students": three}),
    # feature maps
    ("feature_loss", "l1", matches("student_0_feature", distance(1)), True, {}),
    ("feature_loss", "l2", matches("student_0_feature", distance(2)), True, {}),
    ("feature_loss", "none", lambda t: "student_0_feature" in losses(t)[0], False, {}),
    ("feature_normalize", True, matches("student_0_feature", distance(2, normalize=True)), True, {"feature_loss": "l2"}),
    ("feature_loss_weight", 0.5, weight_of("feature"), pytest.approx([0.5, 0.5], rel=1e-4), {}),
    ("feature_loss_weight", 0.0, lambda t: list(t.model.training_only), [], {}),
    ("feature_optimizer", "main", lambda t: list(t.optimizer.optimizers), ["student"], {"feature_loss": "l1"}),
    ("feature_optimizer", "adamw", shrinkage, pytest.approx(1 - 0.01 * 0.1), ONLY_DECAY),
    ("feature_weight_decay", 0.0, moved, False, ONLY_DECAY),
    ("feature_start_epoch", 0.5, lambda t: ["discriminator_0_loss" in e for e in losses(t)], [False] * 2 + [True] * 2, FOUR),
    ("feature_start_epoch", 0.5, lambda t: ["student_0_feature" in e for e in losses(t)], [False] * 2 + [True] * 2,
     FOUR | {"feature_loss": "l1", "feature_optimizer": "main"}),
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
    ("discriminator_spectral_norm", True, lambda t: convs(t)[0].weight.flatten(1).svd().S[0].item(), pytest.approx(1.0, rel=0.02), {}),
    ("transfer_channels", "max", lambda t: t.seen.maps[0][0].shape[1], 12, {"students": unequal}),
    ("transfer_channels", 5, lambda t: t.seen.maps[0][0].shape[1], 5, {"students": unequal}),
    ("transfer_always", True, lambda t: len(list(t.model.training_only["transfer"].parameters())) > 0, True, {}),
    ("transfer_activation", "none", negative_maps, True, {"transfer_always": True}),
    ("update_order", "generator_first", matches("student_0_feature", lambda t: (1 - scores(t, 0)[0]).square().mean()),
     True, {"discriminator_learning_rate": 0.5}),
    ("update_mode", "recompute", lambda t: torch.equal(t.seen.maps[0][0], t.seen.maps[0][-1]), False, {"max_steps": 1}),
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
    if expected is DIFFERS:
        assert seen != without
        return
    if all(isinstance(number, float | int) for number in expected) if isinstance(expected, list) else False:
        expected = pytest.approx(expected)
    assert seen == expected
    assert without != expected
