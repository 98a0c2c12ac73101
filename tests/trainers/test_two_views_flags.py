"""What each setting of VICReg, SimSiam and encoding does; those of the family are seen beside Squeeze-and-Span."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from pytest import approx
from test_flags import unchanged_process  # noqa: F401  a fixture
from test_online_adversarial import weights
from torch import nn
from two_view_runs import CONFIGS, tiny_trainer
from watched_runs import logged, losses, steps_done

from hfkd.trainers.self_supervised_config import SelfSupervisedConfig
from hfkd.trainers.two_views import TwoViewConfig


METHODS = sorted(CONFIGS)


@pytest.fixture
def run(tmp_path):
    """run(method, **config) -> a trainer that has trained for two steps of four per epoch, and what it did in `seen`.

    That is the sizes of what its student was given, its synthetic views, the outputs of a convolution, and all weights
    at the start.
    """

    def make(method, output_dir="run", **config):
        trainer = tiny_trainer(method, tmp_path / output_dir, **({"max_steps": 2} | config))
        seen = trainer.seen = SimpleNamespace(sizes=[], views=[], convolved=[], start=weights(trainer.model))
        student, view = trainer.model.students[0], trainer.synthetic_view
        student.register_forward_hook(lambda m, x, y: seen.sizes.append(len(y[0])))
        conv = next(m for m in student.modules() if isinstance(m, nn.Conv2d))
        conv.register_forward_hook(lambda m, x, y: seen.convolved.append(y))
        trainer.synthetic_view = lambda *args: seen.views.append(view(*args)) or seen.views[-1]
        trainer.train()
        return trainer

    return make


def moved(t):
    """Networks and training-only modules, such as `students.0` and `training_only.predictor`."""
    now = t.model.named_parameters()
    return {".".join(n.split(".")[:2]) for n, p in now if (p - t.seen.start[n]).abs().max() > 1e-8}


def sizes(t):
    return t.seen.sizes[:2]


def synthetic(t):
    return [len(view) for view in t.seen.views[:2]]


def widths(head):
    """Inputs of each linear layer of a training-only network."""
    return lambda t: [m.in_features for m in t.model.training_only[head].modules() if isinstance(m, nn.Linear)]


def weight_of(term, views, **others):
    """What a term, logged as the mean of `views`, weighs in the loss of each step, given what the others weigh."""

    def see(t):
        rest = [sum(weight * entry[name] for name, weight in others.items()) for entry in losses(t)]
        terms = zip(losses(t), rest, strict=True)
        return [(entry["loss"] - other) / (views * entry[term]) for entry, other in terms]

    return see


SHARED = [
    ("num_train_epochs", 0.25, steps_done, 1, {"max_steps": -1, "num_train_epochs": 0.5}),
    ("learning_rate", 0.0, moved, set(), {}),
    ("lr_scheduler_type", "linear", logged("learning_rate"), [0.02, 0.015, 0.01, 0.005], {"max_steps": 4}),
    ("max_grad_norm", 1e-9, moved, set(), {"weight_decay": 0.0}),
    ("bf16", True, lambda t: t.seen.convolved[-1].dtype, torch.bfloat16, {}),
]
TWO_VIEWS = [
    *SHARED,
    ("synthetic_share", 0.5, synthetic, [25, 25], {}),
    ("per_device_train_batch_size", 40, sizes, [40, 40], {}),
    ("projector_layers", 3, widths("projector"), [8, 8, 8], {"projector_layers": 4}),
]
EFFECTS = {
    "vicreg": [
        *TWO_VIEWS,
        ("invariance_weight", 10.0, weight_of("invariance", 1, variance=50, covariance=2),
         approx([10] * 2, rel=1e-3), {}),
        ("variance_weight", 10.0, weight_of("variance", 2, invariance=25, covariance=2),
         approx([10] * 2, rel=1e-3), {}),
        ("covariance_weight", 9.0, weight_of("covariance", 2, invariance=25, variance=50),
         approx([9] * 2, rel=1e-2), {}),
    ],
    "simsiam": [*TWO_VIEWS, ("predictor_hidden_size", 7, widths("predictor"), [12, 7], {})],
    "latent_encoding": [
        *SHARED,
        ("synthetic_share", 1.0, sizes, [50, 50], {}),
        ("per_device_train_batch_size", 40, sizes, [20, 20], {}),
        ("projector_layers", 3, widths("projector"), [8, 8, 8], {}),
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


def test_each_optimizer_of_simsiam_is_torchs_sgd(run):
    """Momentum and decay of both; only the main rate falls."""
    trainer = run("simsiam", momentum=0.8, weight_decay=0.1, nesterov=True)
    for optimizer in trainer.optimizer.optimizers.values():
        (group,) = optimizer.param_groups
        assert type(optimizer) is torch.optim.SGD
        assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.8, 0.1, True)
    assert moved(trainer) == {"students.0", "training_only.projector", "training_only.predictor"}


@pytest.mark.parametrize("method", METHODS)
def test_every_field_of_the_method_is_observed(method):
    kind = CONFIGS[method]
    family = {field.name for field in dataclasses.fields(SelfSupervisedConfig)}
    own = {field.name for field in dataclasses.fields(kind)} - family
    changed = {name for base in (kind, TwoViewConfig) if issubclass(kind, base) for name in base.__annotations__}
    fixed = {"augment_synthetic"}  # of encoding; another value is refused
    assert own | (changed & family) <= {row[0] for row in EFFECTS[method]} | fixed
    assert own | changed
