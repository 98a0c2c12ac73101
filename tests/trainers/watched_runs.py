"""Runs that are watched, and what there is to see of them."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from test_online_adversarial import weights
from torch import nn
from torch.nn import functional as F

from hfkd.errors import RunError


def watch(trainer):
    """Have a trainer record in its `seen` what passes through it.

    That is its batches and losses, the logits and transferred maps of each network (of every pass), D_0's inputs with
    their scores, the outputs of a convolution, and all weights at the start.
    """
    students, training_only = trainer.model.students, trainer.model.training_only
    seen = SimpleNamespace(start=weights(trainer.model), batches=[], losses=[], convolved=[], judged=[])
    seen.logits, seen.maps = [[] for _ in students], [[] for _ in students]
    step = trainer.method_step

    def watched(batch, share, last):
        loss, parts = step(batch, share, last)
        seen.batches.append(batch)
        seen.losses += [loss, *(value for name, value in parts.items() if not name.endswith("accuracy"))]
        return loss, parts

    trainer.method_step = watched
    for student, logits in zip(students, seen.logits, strict=True):
        student.classifier.register_forward_hook(lambda m, x, y, keep=logits: keep.append(y.detach().float()))
    if "transfer" in training_only:
        for layer, maps in zip(training_only["transfer"], seen.maps, strict=False):
            layer.register_forward_hook(lambda m, x, y, keep=maps: keep.append(y.detach().float()))
    if "discriminators" in training_only:
        for first in training_only["discriminators"][:1]:
            first.register_forward_hook(lambda m, x, y: seen.judged.append((x[0].detach(), y.detach())))
    last = [m for m in students[0].modules() if isinstance(m, nn.Conv2d)][-1]
    last.register_forward_hook(lambda m, x, y: seen.convolved.append(y))
    trainer.seen = seen


def assert_stops_at_nan(trainer):
    """A pixel of the third update is NaN: the run, which saves every second one, stops there and keeps the second."""
    step = trainer.method_step

    def poisoned(batch, share, last):
        if trainer.state.global_step == 2:
            batch["pixel_values"][0] = math.nan
        return step(batch, share, last)

    trainer.method_step = poisoned
    with pytest.raises(RunError, match="not finite by step 3") as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    assert saved(trainer) == [2]


# -- what can be looked at: functions of a trainer that has trained ---------------------------------


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
    named = t.model.students.named_parameters()
    return any((p - t.seen.start[f"students.{name}"]).abs().max() > 1e-8 for name, p in named)


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
