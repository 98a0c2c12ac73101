"""What each setting of the methods whose students learn together does; those of the base are seen beside AFD."""

import dataclasses

import pytest
import torch
from cohort_runs import METHODS, tiny_trainer
from pytest import approx
from test_flags import unchanged_process  # noqa: F401  a fixture
from torch.nn import functional as F
from watched_runs import batch_sizes, logged, losses, steps_done, watch

from hfkd.trainers.cohort import CohortConfig


@pytest.fixture
def run(tmp_path):
    """run(method, **config) -> a trainer that trained two steps of an epoch of four, with what it did in `seen`."""

    def make(method, output_dir="run", **config):
        trainer = tiny_trainer(method, tmp_path / output_dir, **({"max_steps": 2} | config))
        watch(trainer)
        trainer.train()
        return trainer

    return make


def moved(t):
    """Networks and training-only modules, such as `students.0` and `training_only.gate`."""
    now = t.model.named_parameters()
    return {".".join(n.split(".")[:2]) for n, p in now if (p - t.seen.start[n]).abs().max() > 1e-8}


def own_weight_of(part):
    """What a part weighs in the loss of each step, where all else is the students' cross-entropies."""

    def see(t):
        rows = losses(t)
        names = [name for name in rows[0] if name.endswith(f"_{part}")]
        ces = [name for name in rows[0] if name.endswith("_ce")]
        return [(row["loss"] - sum(row[n] for n in ces)) / sum(row[n] for n in names) for row in rows]

    return see


def kl_at(temperature):
    """Whether student 0's KL term is that of its peer at this temperature."""

    def see(t):
        own, peer = (logits[0] / temperature for logits in t.seen.logits)
        expected = temperature**2 * F.kl_div(own.log_softmax(1), peer.softmax(1), reduction="batchmean")
        return bool((losses(t)[0]["student_0_kl"] - expected).abs() < 1e-4)

    return see


SHARED = [
    ("num_train_epochs", 0.25, steps_done, 1, {"max_steps": -1, "num_train_epochs": 0.5}),
    ("per_device_train_batch_size", 20, batch_sizes, [20, 20], {}),
    ("learning_rate", 0.0, moved, set(), {}),
    ("lr_milestones", [0.5], logged("learning_rate"), [0.05, 0.05, 0.005, 0.005], {"max_steps": 4}),
    ("max_grad_norm", 1e-9, moved, set(), {"weight_decay": 0.0}),
    ("bf16", True, lambda t: t.seen.convolved[0].dtype, torch.bfloat16, {}),
]
EFFECTS = {
    "supervised": SHARED,
    "mutual_learning": [
        *SHARED,
        ("temperature", 1.0, kl_at(1.0), True, {}),
        ("kl_weight", 0.5, own_weight_of("kl"), approx([0.5, 0.5], rel=1e-3), {}),
        ("update", "sequential", lambda t: list(t.optimizer.optimizers), ["student", "student_1"], {}),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "field", "value", "see", "expected", "context"),
    [(method, *row) for method in EFFECTS for row in EFFECTS[method]],
)
def test_effect(run, method, field, value, see, expected, context):
    without = see(run(method, **context))
    seen = see(run(method, **(context | {"output_dir": "with", field: value})))
    assert seen == (approx(expected) if isinstance(expected, list) else expected)
    assert without != expected


@pytest.mark.parametrize("method", METHODS)
def test_every_field_of_the_method_is_observed(method):
    kind = METHODS[method][1]
    family = {field.name for field in dataclasses.fields(CohortConfig)}
    own = {field.name for field in dataclasses.fields(kind)} - family
    changed = set(kind.__annotations__) & family
    assert own | changed <= {row[0] for row in EFFECTS[method]}


def test_decay_reaches_all_parameters(run):
    """Biases and batch norm's too, as in the papers."""
    trainer = run("supervised", weight_decay=0.5, max_steps=1)
    assert {p for group in trainer.optimizer.param_groups for p in group["params"]} == set(trainer.model.parameters())
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.5}
