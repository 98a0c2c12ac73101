"""What each setting of KDCL, ONE, PCL and FFL does, seen from outside; those of the base are in `test_flags`."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from online_peer_runs import KINDS, METHODS, tiny_trainer
from pytest import approx
from test_flags import unchanged_process  # noqa: F401  a fixture
from test_online_adversarial import assert_equal, weights
from torch import nn
from torch.nn import functional as F
from watched_runs import logged, losses, steps_done, steps_with

from hfkd.losses.kdcl import ensemble_teacher
from hfkd.trainers.branches import BranchTrainer
from hfkd.trainers.cohort import CohortConfig


@pytest.fixture
def run(tmp_path):
    """run(method, **config) -> a trainer that has trained for two steps of four per epoch, and what it did in `seen`.

    That is its batches, each student's logits of every pass, those of a teacher that is trained, a convolution's
    outputs, and all weights at the start.
    """

    def make(method, output_dir="run", **config):
        trainer = tiny_trainer(method, tmp_path / output_dir, **({"max_steps": 2} | config))
        seen = trainer.seen = SimpleNamespace(batches=[], convolved=[], start=weights(trainer.model))
        students, step = trainer.model.students, trainer.method_step
        seen.logits = [[] for _ in students]
        for student, keep in zip(students, seen.logits, strict=True):
            student.classifier.register_forward_hook(lambda m, x, y, keep=keep: keep.append(y.detach().float()))
        conv = [m for m in students[0].modules() if isinstance(m, nn.Conv2d)][-1]
        conv.register_forward_hook(lambda m, x, y: seen.convolved.append(y))
        trainer.method_step = lambda batch, *others: seen.batches.append(batch) or step(batch, *others)
        if isinstance(trainer, BranchTrainer):
            seen.teacher, teach = [], trainer.teacher_logits
            trainer.teacher_logits = lambda features: seen.teacher.append(teach(features)) or seen.teacher[-1]
        trainer.train()
        return trainer

    return make


def first_logits(t):
    """The students' (S, N, K) in the first step, which measuring on other images may have preceded."""
    labels = t.seen.batches[0]["labels"]
    return torch.stack([next(z for z in own if len(z) == len(labels)) for own in t.seen.logits]), labels


def moved(t):
    """Networks and training-only modules, such as `students.0` and `training_only.gate`."""
    now = t.model.named_parameters()
    return {".".join(n.split(".")[:2]) for n, p in now if (p - t.seen.start[n]).abs().max() > 1e-8}


def teacher_is(variant):
    """Whether the logged cross-entropy of KDCL's teacher is that of the variant, of the first step's logits."""

    def see(t):
        logits, labels = first_logits(t)
        # Within an epoch the measured weights are what they were before it.
        weights_ = t.model.training_only["ensemble"].weights if variant == "general" else None
        teacher = ensemble_teacher(logits, labels, variant, weights_)
        return math.isclose(logged("teacher_ce")(t)[0], F.cross_entropy(teacher, labels).item(), rel_tol=1e-3)

    return see


def kl_at(temperature, teacher):
    """Whether the first logged KL of student 0 is that at this temperature from the teacher's logits of that step."""

    def see(t):
        own, target = (z / temperature for z in (first_logits(t)[0][0], teacher(t)))
        kl = temperature**2 * F.kl_div(own.log_softmax(1), target.softmax(1), reduction="batchmean")
        return math.isclose(logged("student_0_kl")(t)[0], kl.item(), rel_tol=1e-3)

    return see


def minlogit(t):
    return ensemble_teacher(*first_logits(t), "minlogit")


def trained_teacher(t):
    return t.seen.teacher[0].detach()


def weight_of_kl(*terms):
    """What the KL terms weigh in each step's loss, in which there are each student's cross-entropy and the teacher's.

    KDCL's teacher is not trained.
    """

    def see(t):
        taught = type(t).__name__ != "KdclTrainer"
        found = []
        for entry in losses(t):
            rest = entry["student_0_ce"] + entry["student_1_ce"] + taught * entry["teacher_ce"]
            found.append((entry["loss"] - rest) / sum(entry[name] for name in terms))
        return found

    return see


def one_trunk(t):
    return t.model.students[0].base_model.stem is t.model.students[1].base_model.stem


def views(t):
    return sum(name.startswith("pixel_values") for name in t.seen.batches[0])


def averages_are_the_peers(t):
    averages, peers = t.model.training_only["mean_teachers"], t.model.students
    return all(torch.equal(a, b) for a, b in zip(averages.parameters(), peers.parameters(), strict=True))


FOUR = {"max_steps": 4}
CONSTANT = {"max_steps": 4, "lr_milestones": []}
STUDENT_KL = ("student_0_kl", "student_1_kl")
ALL_KL = {
    "one": STUDENT_KL,
    "pcl": (*STUDENT_KL, "student_0_mean_teacher_kl", "student_1_mean_teacher_kl"),
    "ffl": (*STUDENT_KL, "teacher_kl"),
}
# Of 10 epochs of ramp-up, at the start and after a quarter of an epoch.
RAMP = approx([math.exp(-5), math.exp(-5 * 0.975**2)], rel=0.03)
SHARED = [
    ("num_train_epochs", 0.25, steps_done, 1, {"max_steps": -1, "num_train_epochs": 0.5}),
    ("per_device_train_batch_size", 20, lambda t: [len(b["index"]) for b in t.seen.batches], [20, 20], {}),
    ("learning_rate", 0.0, moved, set(), {}),
    ("lr_milestones", [0.5], logged("learning_rate"), [0.05, 0.05, 0.005, 0.005], FOUR),
    ("lr_scheduler_type", "linear", logged("learning_rate"), [0.05, 0.0375, 0.025, 0.0125], CONSTANT),
    ("max_grad_norm", 1e-9, moved, set(), {"weight_decay": 0.0}),
    ("bf16", True, lambda t: t.seen.convolved[0].dtype, torch.bfloat16, {}),
    ("channels_last", True, lambda t: t.seen.convolved[0].stride()[1], 1, {}),
    ("eval_strategy", "steps", steps_with("eval_loss"), [1, 2], {"eval_steps": 1}),
]


def of_branches(method):
    return [
        *SHARED,
        ("temperature", 1.0, kl_at(1.0, trained_teacher), True, {}),
        ("kl_rampup_epochs", 10.0, weight_of_kl(*ALL_KL[method]), RAMP, {}),
        ("kl_rampup_epochs", 0.0, weight_of_kl(*ALL_KL[method]), approx([1, 1], rel=1e-3), {}),
        ("shared_trunk", False, one_trunk, False, {}),
    ]


EFFECTS = {
    "kdcl": [
        *SHARED,
        *[("variant", name, teacher_is(name), True, {}) for name in ("naive", "linear", "mean")],
        ("temperature", 5.0, kl_at(5.0, minlogit), True, {}),
        ("kl_weight", 0.5, weight_of_kl(*STUDENT_KL), approx([0.5, 0.5], rel=1e-3), {}),
        ("independent_views", False, views, 1, {}),
    ],
    "one": of_branches("one"),
    "pcl": [
        *of_branches("pcl"),
        ("mean_teacher_decay", 0.0, averages_are_the_peers, True, {}),
        ("independent_views", False, views, 1, {}),
    ],
    "ffl": of_branches("ffl"),
}


@pytest.mark.parametrize(
    ("method", "field", "value", "see", "expected", "context"),
    [(method, *row) for method in METHODS for row in EFFECTS[method]],
)
def test_effect(run, method, field, value, see, expected, context):
    without = see(run(method, **context))
    seen = see(run(method, **(context | {"output_dir": "with", field: value})))
    assert seen == (approx(expected) if isinstance(expected, list) else expected)
    assert without != expected


def test_the_general_teacher_has_the_measured_weights(run):
    assert teacher_is("general")(run("kdcl", variant="general"))


@pytest.mark.parametrize("method", METHODS)
def test_bf16_in_channels_last_keeps_losses_and_weights_in_float32(run, method):
    trainer = run(method, bf16=True, channels_last=True, eval_strategy="steps", eval_steps=2)
    output = trainer.seen.convolved[0]
    assert output.dtype == torch.bfloat16 and output.is_contiguous(memory_format=torch.channels_last)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert all(math.isfinite(value) for entry in trainer.state.log_history for value in entry.values())


@pytest.mark.parametrize("method", ["one", "pcl", "ffl"])
def test_the_seed_draws_what_is_trained_beside_the_students(run, method):
    first, other, data = (
        run(method, output_dir=str(n), **s) for n, s in enumerate(({}, {"seed": 1, "data_seed": 42}, {"data_seed": 1}))
    )
    drawn = [{k: v for k, v in t.seen.start.items() if "training_only" in k} for t in (first, other, data)]
    assert_equal(drawn[0], drawn[2])
    assert any(not torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])


@pytest.mark.parametrize("method", METHODS)
def test_best_model_restores_every_network(run, method):
    every_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = run(method, max_steps=3, **every_step, **best)
    assert trainer.state.best_global_step < 3  # the greatest loss, which is not the last
    assert trainer.evaluate()["eval_loss"] == approx(trainer.state.best_metric)


@pytest.mark.parametrize("method", METHODS)
def test_every_field_of_the_method_is_observed(method):
    kind = KINDS[method][1]
    own = {field.name for field in dataclasses.fields(kind)} - {f.name for f in dataclasses.fields(CohortConfig)}
    assert own and own <= {row[0] for row in EFFECTS[method]}
