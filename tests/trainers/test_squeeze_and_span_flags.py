"""What each setting of Squeeze-and-Span does, seen from outside; those of the base are seen in `test_flags`."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from pytest import approx
from squeeze_runs import tiny_trainer
from test_flags import unchanged_process  # noqa: F401  a fixture
from test_online_adversarial import assert_equal, weights
from torch import nn
from watched_runs import logged, losses, order, saved, steps_done, steps_with

from hfkd.trainers.config import DistillationConfig
from hfkd.trainers.self_supervised_config import SelfSupervisedConfig
from hfkd.trainers.squeeze_and_span import SqueezeAndSpanConfig


@pytest.fixture
def run(tmp_path):
    """run(**config) -> a trainer that has trained for two steps of four per epoch, and what it did in `seen`."""

    def make(train=True, output_dir="run", **config):
        trainer = tiny_trainer(tmp_path / output_dir, **({"max_steps": 2} | config))
        trainer.seen = watch(trainer)
        if train:
            trainer.train()
        return trainer

    return make


def watch(trainer):
    networks = trainer.model
    seen = SimpleNamespace(batches=[], gradients=[], convolved=[], generated=[], views=[], banks=[], start={})
    seen.start = weights(networks)
    names = {parameter: name for name, parameter in networks.named_parameters()}
    step, view, features = trainer.method_step, trainer.synthetic_view, trainer.features

    def watched(batch, share, last):
        result = step(batch, share, last)
        seen.batches.append(batch)
        seen.gradients.append({names[p]: g.clone() for p, g in trainer.optimizer.gradients("student").items()})
        return result

    def viewed(generated, batch, number=0):
        seen.generated.append(generated.images)
        seen.views.append(view(generated, batch, number))
        return seen.views[-1]

    def counted(pixel_values):
        if not trainer.model.training:
            seen.banks.append(len(pixel_values))
        return features(pixel_values)

    trainer.method_step, trainer.synthetic_view, trainer.features = watched, viewed, counted
    second = [m for m in networks.students[0].modules() if isinstance(m, nn.Conv2d)][1]
    second.register_forward_hook(lambda m, x, y: seen.convolved.append(y))
    return seen


# -- what can be looked at: functions of a trainer that has trained ---------------------------------


def kinds(t):
    """Synthetic and real samples of each batch."""
    return [(len(batch["synthetic_index"]), len(batch["index"])) for batch in t.seen.batches]


def parts_that_moved(t):
    moved = [n for n, p in t.model.named_parameters() if (p - t.seen.start[n]).abs().max() > 1e-8]
    return {".".join(name.split(".")[:2]) for name in moved}


def is_as_generated(t):
    mean, std = t.preprocessing.mean[0], t.preprocessing.std[0]
    return torch.allclose((t.seen.generated[0] + 1) / 2, t.seen.views[0] * std + mean, atol=1e-6)


def same_view_of_same_images(t):
    generated = t.generate(t.seen.batches[0])
    same = generated._replace(images=generated.images[:1].expand_as(generated.images))
    view = t.synthetic_view(same, t.seen.batches[0])
    return bool((view == view[:1]).all())


def linears(name):
    return lambda t: [
        (m.in_features, m.out_features) for m in t.model.training_only[name].modules() if isinstance(m, nn.Linear)
    ]


def weight_of(name):
    """What a term of the squeeze loss weighs: an estimate for each step, by the other terms with their weights."""

    def see(t):
        terms = ("distillation", "variance", "covariance")
        weights = dict(zip(terms, t.args.loss_weights, strict=True))
        return [
            (entry["squeeze_loss"] - sum(weights[term] * total(entry, term) for term in terms if term != name))
            / total(entry, name)
            for entry in losses(t)
        ]

    return see


def total(entry, term):
    """Of the student and the teacher."""
    return sum(entry.get(name, 0) for name in (term, f"student_{term}", f"teacher_{term}"))


FOUR = {"max_steps": 4}
CONSTANT = FOUR | {"lr_scheduler_type": "constant"}
ALL = {"synthetic_share": 1.0}
cosine = [0.02 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]

# (field, value, what is looked at, what is seen, the other settings). Without the value, something else is seen.
EFFECTS = [
    ("num_train_epochs", 0.25, steps_done, 1, {"max_steps": -1, "num_train_epochs": 0.5}),
    ("per_device_train_batch_size", 20, kinds, [(10, 10)] * 2, {}),
    ("synthetic_share", 0.3, kinds, [(15, 35)] * 2, {}),
    ("learning_rate", 0.01, logged("learning_rate"), [0.01] * 4, CONSTANT),
    ("learning_rate", 0.0, parts_that_moved, set(), {}),
    ("lr_scheduler_type", "cosine", logged("learning_rate"), cosine, CONSTANT),
    ("max_grad_norm", 1e-9, parts_that_moved, set(), {"weight_decay": 0.0}),
    ("augment_synthetic", False, is_as_generated, True, {}),
    ("shared_augmentation", True, same_view_of_same_images, True, {}),
    ("representation_size", 9, lambda t: (linears("squeeze")(t)[-1][1], linears("projector")(t)[-1][1]), (9, 9), {}),
    ("projector_layers", 3, linears("projector"), [(8, 8), (8, 8), (8, 16)], {}),
    ("squeeze_hidden_size", 7, linears("squeeze"), [(8, 7), (4, 7), (7, 7), (7, 7), (7, 16)], {}),
    ("squeeze_depth", 1, linears("squeeze"), [(8, 12), (4, 12), (12, 16)], {}),
    ("teacher_features", "latent", lambda t: linears("squeeze")(t)[0], (5, 12), {}),
    ("regularize_teacher", False, lambda t: "teacher_variance" in losses(t)[0], False, {}),
    ("generated_pool_size", 10, lambda t: len(t.seen.generated[0].unique(dim=0)), 10, ALL),
    ("knn_bank_size", 30, lambda t: (t.seen.banks.clear(), t.evaluate(), sorted(t.seen.banks))[2], [30, 100], {}),
    ("invariance_weight", 5.0, weight_of("distillation"), approx([5.0] * 2, rel=1e-3), {}),
    ("variance_weight", 5.0, weight_of("variance"), approx([5.0] * 2, rel=1e-3), {}),
    ("covariance_weight", 5.0, weight_of("covariance"), approx([5.0] * 2, rel=1e-3), {}),
    ("bf16", True, lambda t: t.seen.convolved[-1].dtype, torch.bfloat16, {}),
    ("channels_last", True, lambda t: t.seen.convolved[0].stride()[1], 1, {}),
    ("eval_strategy", "steps", steps_with("eval_knn_accuracy"), [1, 2], {"eval_steps": 1}),
    ("save_strategy", "steps", saved, [1, 2], {"save_steps": 1}),
]
# Refused where it is off, and seen where there are several processes, in `test_squeeze_and_span_resume`.
ELSEWHERE = {"dataloader_drop_last", "gather_statistics"}


@pytest.mark.parametrize(("field", "value", "see", "expected", "context"), EFFECTS)
def test_effect(run, field, value, see, expected, context):
    without = see(run(**context))
    seen = see(run(**(context | {"output_dir": "with", field: value})))
    assert seen == (approx(expected) if field == "lr_scheduler_type" else expected)
    assert without != expected


@pytest.mark.parametrize(("field", "value"), [("weight_decay", 0.5), ("momentum", 0.5), ("nesterov", True)])
def test_the_optimizer_is_torchs_sgd_on_all_parameters(run, field, value):
    """Weight decay on norms and biases too."""
    trainer = run(max_steps=3, lr_scheduler_type="constant", **{field: value})
    without = run(train=False, output_dir="without", lr_scheduler_type="constant")
    assert goes_where_torch_goes(trainer, trainer.args)
    assert not goes_where_torch_goes(trainer, without.args)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trainer.seen.gradients[0].keys() == trained and any(name.endswith("bias") for name in trained)


def goes_where_torch_goes(trainer, args):
    own = {name: trainer.seen.start[name].clone() for name in trainer.seen.gradients[0]}
    optimizer = torch.optim.SGD(
        own.values(), args.learning_rate, args.momentum, weight_decay=args.weight_decay, nesterov=args.nesterov
    )
    for update in trainer.seen.gradients:
        for name, value in own.items():
            value.grad = update[name]
        optimizer.step()
    now = dict(trainer.model.named_parameters())
    return all((value - now[name]).abs().max() <= 1e-6 for name, value in own.items())


def test_seed_draws_heads_and_data_seed_draws_data(run):
    first, heads, data = (
        run(output_dir="a"),
        run(output_dir="b", seed=1, data_seed=42),
        run(output_dir="c", data_seed=1),
    )
    assert order(first) == order(heads) != order(data)
    assert torch.equal(first.seen.generated[0], heads.seen.generated[0])
    assert not torch.equal(first.seen.generated[0], data.seen.generated[0])
    drawn = [{k: v for k, v in t.seen.start.items() if "training_only" in k} for t in (first, heads, data)]
    assert_equal(drawn[0], drawn[2])
    assert any(not torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])


def test_cosine_is_the_codes_table_at_the_start_of_epochs(run):
    """lr_e = lr/2 (1 + cos(pi e/E)), which falls once an epoch there."""
    trainer = run(max_steps=-1, num_train_epochs=5, learning_rate=0.06)
    rates = logged("learning_rate")(trainer)[::4]
    assert rates == approx([0.03 * (1 + math.cos(math.pi * epoch / 5)) for epoch in range(5)])
    assert 0.03 * (1 + math.cos(math.pi * 799 / 800)) == approx(2.3132e-7, rel=1e-4)


def test_best_model_restores_every_network(run):
    every_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "knn_accuracy"}
    trainer = run(train=False, max_steps=4, **every_step, **best)
    script, after, metrics = [0.2, 0.9, 0.5, 0.3], [], trainer.evaluation_metrics

    def scripted(outputs, labels):
        found = metrics(outputs, labels)
        if trainer.state.global_step:
            after.append(weights(trainer.model))
            found["knn_accuracy"] = script[trainer.state.global_step - 1]
        return found

    trainer.evaluation_metrics = scripted
    trainer.train()
    assert_equal(weights(trainer.model), after[1])
    changed = {name.split(".")[0] for name in after[1] if not torch.equal(after[1][name], after[3][name])}
    assert changed == {"students", "training_only"}


def test_every_field_of_the_method_is_observed():
    of_base = {field.name for field in dataclasses.fields(DistillationConfig)}
    own = {field.name for field in dataclasses.fields(SqueezeAndSpanConfig)} - of_base
    kinds = [kind for kind in SqueezeAndSpanConfig.__mro__ if issubclass(kind, SelfSupervisedConfig)]
    changed = {name for kind in kinds for name in vars(kind).get("__annotations__", ()) if name in of_base}
    assert own and changed
    assert own | changed <= {row[0] for row in EFFECTS} | {"weight_decay"} | ELSEWHERE
