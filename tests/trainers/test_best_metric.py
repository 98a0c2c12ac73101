"""A metric that no evaluation measures is one line before the first step, and asking for it leaves no trace."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from generative_runs import tiny_trainer
from test_online_adversarial import assert_equal, weights
from tiny_runs import digit_sources, tiny_resnet
from transformers import EarlyStoppingCallback

from hfkd.errors import InputError
from hfkd.trainers.best_metric import check_metric_for_best_model


BEST = {
    "max_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
}
STOPPING = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}


def two_sets():
    sources = digit_sources()
    return SimpleNamespace(train=sources.train, test={"seen": sources.train, "unseen": sources.test})


@pytest.mark.parametrize(
    ("wanted", "nearest"),
    [
        ("student_0_acc", "student_0_accuracy"),
        ("eval_ensemble_acuracy", "ensemble_accuracy"),
        ("student_2_accuracy", "student_[01]_accuracy"),
        ("nonsense", r"\w+"),
    ],
)
@pytest.mark.parametrize("read_by", ["best model", "early stopping"])
def test_a_metric_that_is_not_measured(make_trainer, tmp_path, wanted, nearest, read_by):
    callbacks = [EarlyStoppingCallback()] if read_by == "early stopping" else []
    settings = STOPPING if callbacks else BEST
    trainer = make_trainer(callbacks=callbacks, metric_for_best_model=wanted, **settings)
    message = f"metric_for_best_model='{wanted}' is not measured .did you mean '{nearest}'.*: choose one of .*, loss, "
    with pytest.raises(InputError, match=message) as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    assert trainer.state.global_step == 0 and not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("wanted", ["student_1_accuracy", "eval_maps_0_1_cosine", "discriminator_0_accuracy", None])
def test_a_metric_that_is_measured(make_trainer, wanted):
    trainer = make_trainer(metric_for_best_model=wanted, **BEST)  # None: the loss
    trainer.train()
    name = "loss" if wanted is None else wanted.removeprefix("eval_")
    assert trainer.state.best_metric in [entry.get(f"eval_{name}") for entry in trainer.state.log_history]


def test_names_of_several_sets(make_trainer, tmp_path):
    first = tmp_path / "first"
    make_trainer(sources=two_sets(), output_dir=first, metric_for_best_model="unseen_student_0_top5", **BEST).train()
    for wanted in ("student_0_top5", "test_loss"):
        trainer = make_trainer(sources=two_sets(), metric_for_best_model=wanted, **BEST)
        with pytest.raises(InputError, match=r"did you mean '(un)?seen_.*seen_loss.*unseen_loss"):
            trainer.train()


def test_the_check_leaves_no_trace(make_trainer):
    def drawing(module, args, output):
        """A student that draws from the global generators, as one with dropout in its evaluation would."""
        output.logits = output.logits + torch.rand(1) + random.random() + np.random.rand()

    students = [tiny_resnet(0), tiny_resnet(1)]
    trainer = make_trainer(students, metric_for_best_model="loss", **BEST)
    students[0].register_forward_hook(drawing)
    trainer.model.train()
    trainer.model.students[1].eval()
    trainer.measured["before"] = {"images": 3}
    modes = {name: module.training for name, module in trainer.model.named_modules()}
    before, drawn = weights(trainer.model), [random.getstate(), np.random.get_state()[1].tolist()]
    torch_state = torch.random.get_rng_state()
    check_metric_for_best_model(trainer)
    assert_equal(before, weights(trainer.model))
    assert modes == {name: module.training for name, module in trainer.model.named_modules()}
    assert drawn == [random.getstate(), np.random.get_state()[1].tolist()]
    assert torch.equal(torch_state, torch.random.get_rng_state())
    assert trainer.measured == {"before": {"images": 3}} and trainer.state.log_history == []


def test_two_images_are_asked_and_only_where_a_metric_is_wanted(make_trainer):
    asked = []

    def watched(trainer):
        step = trainer.evaluation_step
        trainer.evaluation_step = lambda batch: asked.append(batch["index"].tolist()) or step(batch)
        return trainer

    check_metric_for_best_model(watched(make_trainer()))
    assert asked == []
    check_metric_for_best_model(watched(make_trainer(metric_for_best_model="loss")))
    assert asked == [[0, 1]]


def test_a_metric_that_two_images_do_not_define_is_left_to_the_first_evaluation(make_trainer):
    trainer = make_trainer(metric_for_best_model="rare", **BEST)
    metrics = trainer.evaluation_metrics

    def picky(outputs, labels):
        if len(labels) < 3:
            raise InputError("too few images")
        return metrics(outputs, labels) | {"rare": 1.0}

    trainer.evaluation_metrics = picky
    trainer.train()
    assert trainer.state.best_metric == 1.0


@pytest.mark.parametrize(
    ("method", "wanted", "greater"),
    [
        ("bigan", "reconstruction_error", False),
        ("bigan", "discriminator_accuracy", True),
        ("bigan", "generator_loss", False),
        ("vae", "eval_reconstruction_error", False),
        ("vae", "unseen_nll", False),
        ("vae", "kl", False),
        ("vae", "elbo", True),
        ("vae", None, None),
    ],
)
def test_errors_are_better_when_they_are_smaller(method, wanted, greater, tmp_path):
    """Trainer goes by the ending `loss` alone, and would keep the worst model."""
    assert tiny_trainer(method, tmp_path, metric_for_best_model=wanted).args.greater_is_better is greater


def test_what_the_user_says_is_better_holds(tmp_path):
    trainer = tiny_trainer("vae", tmp_path, metric_for_best_model="nll", greater_is_better=True)
    assert trainer.args.greater_is_better is True
