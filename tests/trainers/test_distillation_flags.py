"""What each setting of offline distillation does, seen from outside; those of the base are seen in `test_flags`."""

import dataclasses
from functools import partial

import pytest
import torch
from distillation_runs import taught, tiny_trainer
from pytest import approx
from test_cohort_flags import SHARED
from test_flags import unchanged_process  # noqa: F401  a fixture
from tiny_runs import NO_AUGMENTATION
from torch.nn import functional as F
from watched_runs import logged, losses, watch

from hfkd.losses.feature_distillation import relational_angle_loss, relational_distance_loss
from hfkd.losses.logit_distillation import decoupled_divergences, inter_class_relation, intra_class_relation
from hfkd.trainers.cached_teacher import CachedTeacherConfig
from hfkd.trainers.distillation import OfflineDistillationConfig


@pytest.fixture
def run(tmp_path):
    """run(**config) -> a trainer that has trained for two steps of four an epoch, with what it did in `seen`."""

    def make(output_dir="run", **config):
        if "teacher_cache_dir" in config:
            config["teacher_cache_dir"] = str(tmp_path / config["teacher_cache_dir"])
        trainer = tiny_trainer(tmp_path / output_dir, **({"max_steps": 2} | config))
        watch(trainer)
        trainer.seen.given, trainer.seen.taught = [], []
        term, teacher = trainer._term, trainer.model.frozen()[0].model

        def watched(name, given):
            trainer.seen.given.append(given)
            return term(name, given)

        trainer._term = watched
        teacher.register_forward_hook(lambda module, args, output: trainer.seen.taught.append(output.logits))
        trainer.seen.contrasts, trainer.seen.followed = [], []
        if "crd" in trainer.model.training_only:
            memory(trainer).register_forward_hook(partial(look_at_memory, trainer.seen))
        trainer.train()
        return trainer

    return make


def part(name, formula):
    """Whether the first logged value of a term is what the formula gives of the logits or features."""

    def see(t):
        given = t.seen.given[0]
        return bool(abs(losses(t)[0][f"student_0_{name}"] - formula(given).item()) < 1e-4)

    return see


def kd_at(temperature):
    def formula(given):
        log_p, log_q = ((z / temperature).log_softmax(1) for z in (given.logits, given.target))
        return temperature**2 * F.kl_div(log_p, log_q.exp(), reduction="batchmean")

    return part("kd", formula)


def dkd(alpha, beta):
    def formula(given):
        target, rest = decoupled_divergences(given.logits, given.target, given.labels, 4.0)
        return 16 * (alpha * target + beta * rest).mean()

    return part("dkd", formula)


def dist(beta, gamma):
    def formula(given):
        p, q = ((z / 4).softmax(1) for z in (given.logits, given.target))
        return 16 * (beta * inter_class_relation(p, q) + gamma * intra_class_relation(p, q))

    return part("dist", formula)


def rkd(distance, angle):
    def formula(given):
        pooled = given.student.pooled, given.teachers[0].pooled
        return distance * relational_distance_loss(*pooled) + angle * relational_angle_loss(*pooled)

    return part("rkd", formula)


def share_of(name, of="loss"):
    """What a term weighs in the loss of each step beside a cross-entropy of weight 1."""

    def see(t):
        return [(row["loss"] - row["student_0_ce"]) / row[f"student_0_{name}"] for row in losses(t)]

    return see


def look_at_memory(seen, module, args, output):
    """How many negatives each image had, and whether the memory now holds this batch's embeddings as they are."""
    student, _, index, negatives = args
    own = F.normalize(module.embed_student(student))
    seen.contrasts.append(negatives.shape[1])
    seen.followed.append(torch.allclose(module.memory_student[index], own, atol=1e-6))


def pairs(t):
    return t.model.training_only["attention"][0].pairs


def memory(t):
    return t.model.training_only["crd"][0].memory


ON = {name: {"loss": (name,)} for name in ("dkd", "dist", "rkd", "crd", "attention")}
UNAUGMENTED = {"augmentation": NO_AUGMENTATION}
CACHED = UNAUGMENTED | {"teacher_cache_dir": "cache"}
LAST = {"student_layers": ["-1"], "teacher_layers": ["-1"]}
EFFECTS = [
    *SHARED,
    ("loss", ("kd", "attention"), lambda t: list(t.model.training_only), ["attention"], {}),
    ("loss_weights", [0.5], share_of("kd"), approx([0.5, 0.5], rel=1e-4), {}),
    ("ce_weight", 0.0, lambda t: logged("loss")(t) == approx(logged("student_0_kd")(t), rel=1e-4), True, {}),
    ("kd_alpha", 1.0, lambda t: logged("loss")(t) == approx(logged("student_0_kd")(t), rel=1e-4), True, {}),
    ("distillation_warmup_epochs", 0.5, share_of("kd"), approx([0, 0.5], abs=1e-3), {}),
    ("temperature", 2.0, kd_at(2.0), True, {}),
    ("dkd_target_weight", 3.0, dkd(3.0, 8.0), True, ON["dkd"]),
    ("dkd_nontarget_weight", 2.0, dkd(1.0, 2.0), True, ON["dkd"]),
    ("dist_inter_weight", 0.5, dist(0.5, 2.0), True, ON["dist"]),
    ("dist_intra_weight", 0.5, dist(2.0, 0.5), True, ON["dist"]),
    ("rkd_distance_weight", 3.0, rkd(3.0, 50.0), True, ON["rkd"]),
    ("rkd_angle_weight", 3.0, rkd(25.0, 3.0), True, ON["rkd"]),
    ("crd_negatives", 7, lambda t: t.seen.contrasts, [7, 7], ON["crd"]),
    ("crd_temperature", 0.5, lambda t: bool(memory(t).log_normalisers.max() < 9), True, ON["crd"]),
    ("crd_momentum", 0.0, lambda t: t.seen.followed, [True, True], ON["crd"]),
    ("crd_embedding_size", 5, lambda t: memory(t).memory_student.shape, (200, 5), ON["crd"]),
    ("student_layers", ["1"], pairs, [("backbone.stages.0.0", "backbone.stages.1.0")], ON["attention"] | LAST),
    ("teacher_layers", ["1"], pairs, [("backbone.stages.1.0", "backbone.stages.0.0")], ON["attention"] | LAST),
    ("teacher_image_size", 12, lambda t: t.model.frozen()[0].renormalize(torch.zeros(1, 1, 8, 8)).shape[-1], 12, {}),
    # Two batches of the training images, or all of them once in one batch.
    ("teacher_cache_dir", "cache", lambda t: [len(z) for z in t.seen.taught], [200], UNAUGMENTED),
    ("teacher_cache_top_k", 3, lambda t: int((t.seen.given[0].target[0].unique()).numel()), 4, CACHED),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "see", "expected", "context"), EFFECTS)
def test_effect(run, field, value, see, expected, context):
    cached = {"teacher_cache_dir": "other"} if context.get("teacher_cache_dir") else {}
    without = see(run(**context))
    seen = see(run(**(context | cached | {"output_dir": "with", field: value})))
    assert seen == (approx(expected) if field in ("learning_rate", "lr_milestones") and expected else expected)
    assert without != expected


def test_every_field_of_the_method_is_observed():
    of_base = {field.name for field in dataclasses.fields(CachedTeacherConfig)} - {
        "teacher_cache_dir",
        "teacher_cache_top_k",
    }
    own = {field.name for field in dataclasses.fields(OfflineDistillationConfig)} - of_base
    assert own == {row[0] for row in EFFECTS} - {row[0] for row in SHARED}


def test_seed_draws_fresh_layers_and_data_seed_their_contrasts(run):
    settings = {"loss": ("crd", "review"), "max_steps": 1}
    first, layers, data = (
        run(output_dir="a", **settings),
        run(output_dir="b", seed=1, data_seed=42, **settings),
        run(output_dir="c", data_seed=1, **settings),
    )
    names = [name for name in first.seen.start if name.startswith("training_only")]
    drawn = [[t.seen.start[name] for name in names] for t in (first, layers, data)]
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[2], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert [t.seen.given[0].seed for t in (first, layers, data)] == [42, 42, 1]


def test_students_start_alike_whatever_they_learn(run):
    """Fresh layers are drawn from a generator of their own."""
    starts = [run(output_dir=str(k), loss=(name,), max_steps=1).seen.start for k, name in enumerate(("kd", "review"))]
    for name in (name for name in starts[0] if name.startswith("students")):
        assert torch.equal(starts[0][name], starts[1][name])


def test_bf16_leaves_losses_in_float32(run):
    trainer = run(loss=("kd", "attention", "rkd"), bf16=True, channels_last=True)
    given = trainer.seen.given[0]
    assert trainer.seen.convolved[0].dtype == torch.bfloat16
    tensors = [given.logits, given.target, given.student.pooled, *given.teachers[0].layers.values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert trainer.model.frozen()[0].model.classifier.weight.dtype == torch.float32
    assert taught().classifier.weight.dtype == torch.float32
