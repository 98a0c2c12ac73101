"""Gradient features end to end on tiny nets: omega, what is trained, accumulation, crops, labels, bad input."""

import math

import datasets
import pytest
import torch
from gradient_feature_runs import (
    DIGITS,
    SETTINGS,
    SEVERAL,
    several_label_digits,
    several_label_source,
    tiny_model,
    tiny_trainer,
)
from pytest import approx
from test_online_adversarial import assert_equal, weights
from tiny_runs import NO_AUGMENTATION, digit_sources, tiny_resnet
from torch.nn import functional as F

from hfkd.data import DataArguments, build_sources, load_image_datasets
from hfkd.errors import InputError, RunError
from hfkd.evaluation.logistic_regression import fit_logistic_regression
from hfkd.models import build_gradient_features
from hfkd.trainers import gradient_features
from hfkd.trainers.gradient_features import (
    CODE_PRESET,
    MULTI_LABEL,
    SINGLE_LABEL,
    GradientFeaturesConfig,
    GradientFeaturesTrainer,
)
from hfkd.trainers.optimizers import build_main_schedule


MODES = ["full", "gradient", "activation", "finetune"]


@pytest.fixture
def make(tmp_path):
    return lambda *args, name="run", **config: tiny_trainer(tmp_path / name, *args, **config)


def all_images(source, dtype=torch.float32):
    keys = torch.stack([torch.zeros(len(source)), torch.arange(len(source))], dim=1).long()
    return source.variant(augmentation=NO_AUGMENTATION).materialise({"key": keys}, dtype=dtype)


def losses(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# -- what is trained -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_descends(make, mode):
    rate = 1.0 if mode == "activation" else 0.3
    trainer = make(tiny_model(mode), max_steps=20, learning_rate=rate, lr_milestones=[], omega="given")
    trainer.train()
    assert sum(losses(trainer)[-3:]) < 0.8 * sum(losses(trainer)[:3])


MOVED = {
    "full": {"activation_weight", "activation_bias", "gradient_weights"},
    "gradient": {"gradient_weights"},
    "activation": {"activation_weight", "activation_bias"},
    "finetune": {"activation_weight", "activation_bias", "base"},
}


@pytest.mark.parametrize("mode", MODES)
def test_all_else_stays_bit_identical(make, mode):
    model = tiny_model(mode)
    trainer = make(model)
    trainer.fit_omega()
    trainer.args.omega, before = "given", weights(model)
    trainer.train()
    after = weights(model)
    changed = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert {name.removeprefix("backbone.").split(".")[0] for name in changed} == MOVED[mode]
    of_base = {name.removeprefix("backbone.base.") for name in changed if "base" in name}
    assert of_base == (set(model.config.theta2) if mode == "finetune" else set())
    trained = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert trained == len(changed)


def test_the_papers_optimizer(make):
    """Adam with coupled weight decay on all weights, biases included."""
    trainer = make()
    trainer.create_optimizer()
    (group,) = trainer.optimizer.param_groups
    assert type(trainer.optimizer.optimizers["student"]) is torch.optim.Adam
    assert (group["lr"], group["weight_decay"], group["betas"]) == (1e-3, 1e-6, (0.5, 0.999))


# -- omega -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_training_starts_at_logistic_regression(make, mode):
    """On the features of the images as they are, though training images are cropped."""
    model = tiny_model(mode)
    trainer = make(model, augmentation=None, max_steps=1, learning_rate=0.0)
    images = all_images(digit_sources().train)
    with torch.no_grad():
        features = model.eval().backbone.features(images["pixel_values"])
    weight, bias = fit_logistic_regression(features, images["labels"], 10, 1e-2)
    trainer.train()
    found = weights(model)
    if mode in ("full", "gradient"):
        torch.testing.assert_close(found["omega"].double(), weight, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        logits = model.eval()(images["pixel_values"]).logits
    if mode == "gradient":
        assert logits.abs().max() == 0  # w2 is zero
    else:
        expected = features.double() @ weight.T + bias
        torch.testing.assert_close(logits.double(), expected, atol=1e-3, rtol=1e-3)
        accuracy = (expected.argmax(1) == images["labels"]).double().mean().item()
        assert losses(trainer, "omega_accuracy") == [approx(accuracy)]


def test_omega_is_fitted_once(make, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        gradient_features,
        "fit_logistic_regression",
        lambda *args: calls.append(1) or fit_logistic_regression(*args),
    )
    make(max_steps=2, save_strategy="steps", save_steps=1).train()
    assert len(calls) == 1
    again = make(tiny_model(seed=1), name="again", max_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-1"))
    assert len(calls) == 1


def test_given_omega_is_kept(make):
    model = tiny_model()
    model.start_from(torch.eye(10, model.config.feature_size), torch.zeros(10))
    start = weights(model)
    trainer = make(model, omega="given", max_steps=1, learning_rate=0.0)
    trainer.train()
    assert_equal(start, weights(model))
    assert not losses(trainer, "omega_accuracy")


def test_random_omega_is_the_gradient_branchs_alone(make):
    fitted, drawn, other = tiny_model(), tiny_model(), tiny_model()
    for name, (model, settings) in enumerate(
        [(fitted, {}), (drawn, {"omega": "random"}), (other, {"omega": "random", "seed": 1})]
    ):
        make(model, name=str(name), max_steps=1, learning_rate=0.0, **settings).train()
    assert torch.equal(fitted.activation_weight, drawn.activation_weight)
    assert not torch.equal(drawn.omega, other.omega)
    assert drawn.omega.std().item() == approx(10**-0.5, rel=0.3)  # N(0, 1/classes)


def test_labels_that_no_classifier_fits_are_an_input_error(tmp_path):
    sources = digit_sources()
    sevens = load_image_datasets(DataArguments(train_split="train[:200]", validation_size=0)).train
    sevens = sevens.filter(lambda label: label == 7, input_columns="label")
    trainer = GradientFeaturesTrainer(
        tiny_model(),
        GradientFeaturesConfig(str(tmp_path / "run"), **SETTINGS),
        train_dataset=sevens,
        processing_class=sources.preprocessing.to_image_processor(),
    )
    with pytest.raises(InputError, match="one class"):
        trainer.train()


@pytest.mark.parametrize("mode", ["full", "gradient"])
def test_a_trained_model_is_not_wiped(make, mode):
    model = tiny_model(mode)
    make(model, max_steps=1).train()
    trained = weights(model)
    again = make(model, name="again", max_steps=1)
    with pytest.raises(InputError, match="omega=fitted would.*already trained: omega=given continues it") as caught:
        again.train()
    assert "\n" not in str(caught.value)
    assert_equal(trained, weights(model))
    make(model, name="given", omega="given", max_steps=1).train()


@pytest.mark.parametrize("fails", ["fit", "metrics"])
def test_a_fit_that_fails_is_one_line(make, monkeypatch, fails):
    def fail(*_):
        raise ValueError("no\n  such matrix")

    trainer = make()
    if fails == "fit":
        monkeypatch.setattr(gradient_features, "fit_logistic_regression", fail)
    else:
        trainer.evaluation_metrics = fail
    with pytest.raises(RunError) as caught:
        trainer.train()
    assert str(caught.value) == "fitting omega: ValueError: no such matrix"
    assert isinstance(caught.value.__cause__, ValueError)


# -- one update ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["full", "finetune"])
def test_accumulated_micro_batches_equal_one_batch(make, mode):
    """32x1 = 16x2 = 8x4, float64; 200 images make the last update ragged. Batch norm is folded."""

    def run(size, steps):
        trainer = make(
            tiny_model(mode, dtype=torch.float64),
            name=f"{size}x{steps}",
            augmentation=None,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=9,
            max_grad_norm=1.0,
        )
        trainer.train()
        return weights(trainer.model), losses(trainer), losses(trainer, "grad_norm")

    whole = run(32, 1)
    for size, steps in ((16, 2), (8, 4)):
        parts = run(size, steps)
        assert_equal(whole[0], parts[0], atol=1e-11)
        assert parts[1:] == (approx(whole[1], rel=1e-6), approx(whole[2], rel=1e-6))


@pytest.mark.parametrize("mode", ["full", "gradient"])
def test_trajectory_is_that_of_a_loop_by_hand(make, mode):
    model = tiny_model(mode, dtype=torch.float64)
    model.start_from(torch.eye(10, model.config.feature_size), torch.zeros(10))
    by_hand = tiny_model(mode, dtype=torch.float64)
    by_hand.load_state_dict(model.state_dict())
    trainer = make(model, max_steps=3, omega="given", lr_milestones=[], learning_rate=0.01)
    batches, step = [], trainer.method_step
    trainer.method_step = lambda batch, share, last: (batches.append(batch), step(batch, share, last))[1]
    trainer.train()
    parameters = [p for p in by_hand.train().parameters() if p.requires_grad]
    adam = torch.optim.Adam(parameters, lr=0.01, betas=(0.5, 0.999), weight_decay=1e-6)
    for batch in batches:
        adam.zero_grad()
        F.cross_entropy(by_hand(batch["pixel_values"]).logits, batch["labels"]).backward()
        adam.step()
    assert_equal(weights(model), weights(by_hand), atol=1e-10)


@pytest.mark.parametrize("batch_size", [1, 199])
def test_a_batch_of_one_image_is_fine(make, batch_size):
    """There are no batch statistics."""
    trainer = make(per_device_train_batch_size=batch_size, max_steps=2)
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(trainer))


def test_nan_stops_the_run_and_is_not_saved(make, tmp_path):
    trainer = make(max_steps=4, save_strategy="steps", save_steps=1)
    trainer.method_step = lambda batch, share, last: (torch.tensor(math.nan), {})
    with pytest.raises(RunError, match="the loss is not finite by step 1: lower the learning rate"):
        trainer.train()
    assert not list((tmp_path / "run").glob("checkpoint-*"))


# -- evaluation ------------------------------------------------------------------------------------


def test_metrics_and_predictions(make):
    trainer = make(max_steps=2)
    trainer.train()
    source = digit_sources().test
    images = all_images(source)
    metrics, predicted = trainer.evaluate(), trainer.predict(source)
    with torch.no_grad():
        logits = trainer.model.students[0].eval()(images["pixel_values"]).logits
    torch.testing.assert_close(torch.from_numpy(predicted.predictions), logits)
    assert metrics["eval_loss"] == approx(F.cross_entropy(logits, images["labels"]).item(), rel=1e-5)
    assert metrics["eval_accuracy"] == approx((logits.argmax(1) == images["labels"]).double().mean().item())
    assert predicted.metrics["test_top5_accuracy"] == metrics["eval_top5_accuracy"] >= metrics["eval_accuracy"]
    assert trainer.model.students[0].config.problem_type == SINGLE_LABEL


def streamed_digits(**settings):
    arguments = DataArguments(train_split="train[:60]", test_split="train[100:120]", validation_size=0, **settings)
    return build_sources(load_image_datasets(arguments), arguments, resident_limit=0)


@pytest.mark.parametrize("sources", [digit_sources, streamed_digits])
def test_random_crops_are_drawn_by_their_number_and_averaged(make, sources):
    sources = sources()
    trainer = make(sources=sources, name="three", evaluation_crops=3, per_device_eval_batch_size=7, max_steps=2)
    trainer.train()
    seen, step = [], trainer.evaluation_step
    trainer.evaluation_step = lambda batch: (seen.append(batch), step(batch))[1]
    metrics = trainer.evaluate()
    crops = [
        torch.cat([batch[name] for batch in seen]) for name in ("pixel_values", "pixel_values_2", "pixel_values_3")
    ]
    assert all(not torch.equal(crops[i], crops[j]) for i in range(3) for j in range(i))
    with torch.no_grad():
        probabilities = torch.stack([trainer.model.students[0](c).logits.softmax(1) for c in crops]).mean(0)
    labels = torch.cat([batch["labels"] for batch in seen])
    assert metrics["eval_loss"] == approx(F.nll_loss(probabilities.log(), labels).item(), rel=1e-4)
    assert metrics["eval_accuracy"] == approx((probabilities.argmax(1) == labels).double().mean().item())
    assert trainer.measured[sources.test.name]["images"] == len(labels) == len(sources.test)
    again = make(sources=sources, name="again", evaluation_crops=3, per_device_eval_batch_size=64)
    again.model.load_state_dict(trainer.model.state_dict())
    assert again.evaluate()["eval_loss"] == approx(metrics["eval_loss"], rel=1e-6)


# -- several labels per image ----------------------------------------------------------------------


def several_label_trainer(tmp_path, model=None, **config):
    return GradientFeaturesTrainer(
        model or tiny_model(class_names=SEVERAL),
        GradientFeaturesConfig(str(tmp_path / "run"), **(SETTINGS | config)),
        train_dataset=several_label_source(),
        eval_dataset=several_label_source(name="eval"),
    )


@pytest.mark.parametrize("crops", [1, 2])
def test_several_labels_per_image(tmp_path, crops):
    trainer = several_label_trainer(tmp_path, max_steps=20, evaluation_crops=crops)
    trainer.train()
    model, images = trainer.model.students[0], all_images(several_label_source())
    assert model.config.problem_type == MULTI_LABEL
    with torch.no_grad():
        output = model.eval()(images["pixel_values"], labels=images["labels"])
    expected = F.binary_cross_entropy_with_logits(output.logits, images["labels"])
    assert output.loss.item() == approx(expected.item(), rel=1e-5)
    metrics = trainer.evaluate()
    assert (metrics["eval_loss"] == approx(expected.item(), rel=1e-5)) == (crops == 1)
    positive = images["labels"].mean(0)[:3].mean().item()
    for name in ("mean_average_precision", "mean_average_precision_11_point"):
        assert positive + 0.1 < metrics[f"eval_{name}"] <= 1  # chance is the share of positives
    start = several_label_trainer(tmp_path)
    start.fit_omega()
    with torch.no_grad():
        logits = start.model.students[0].eval()(images["pixel_values"]).logits
    assert expected < F.binary_cross_entropy_with_logits(logits, images["labels"])


# -- bad input, before the first step --------------------------------------------------------------


def test_labels_of_the_wrong_kind(make, tmp_path):
    model = tiny_model(class_names=SEVERAL)
    model.config.problem_type = SINGLE_LABEL
    with pytest.raises(InputError, match="train_dataset has several labels.*problem_type='single_label"):
        several_label_trainer(tmp_path, model)
    model = tiny_model()
    model.config.problem_type = MULTI_LABEL
    with pytest.raises(InputError, match="train_dataset has one label.*problem_type='multi_label"):
        make(model)
    one_label = several_label_digits().map(lambda labels: {"labels": len(labels)}, input_columns="labels")
    one_label = one_label.cast_column("labels", datasets.ClassLabel(names=SEVERAL))
    with pytest.raises(InputError, match=r"eval_dataset\['b'\] has several labels.*'a'\] has problem_type='single"):
        GradientFeaturesTrainer(
            tiny_model(class_names=SEVERAL),
            GradientFeaturesConfig("unused", **SETTINGS),
            train_dataset=one_label,
            eval_dataset={"a": one_label, "b": several_label_digits()},
            processing_class=digit_sources().preprocessing.to_image_processor(),
        )
    mixed = build_gradient_features(tiny_resnet(0), class_names=SEVERAL)
    with pytest.raises(InputError, match="eval_dataset has 10 classes"):
        GradientFeaturesTrainer(
            mixed,
            GradientFeaturesConfig("unused", **SETTINGS),
            train_dataset=several_label_digits(),
            eval_dataset=digit_sources().test,
            processing_class=digit_sources().preprocessing.to_image_processor(),
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_device_train_batch_size": 201, "dataloader_drop_last": True}, "needs 201 or more"),
        ({"sync_batchnorm": True}, "sync_batchnorm=True needs CUDA"),
    ],
)
def test_a_refused_run_leaves_the_model_as_it_was(make, settings, message):
    """Also where it is refused after the labels were looked at."""
    model = tiny_model()
    before = model.config.to_dict(), weights(model)
    with pytest.raises(InputError, match=message):
        make(model, **settings)
    assert model.config.to_dict() == before[0]
    assert_equal(weights(model), before[1])
    assert make(model).model.config.problem_type == SINGLE_LABEL


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny_resnet(0), "pass one that hfkd.build_gradient_features makes"),
        (lambda: tiny_model(class_names=DIGITS[:9]), "10 classes and the networks have 9"),
        (lambda: tiny_model().half(), "float16"),
    ],
)
def test_bad_models(make, model, message):
    with pytest.raises(InputError, match=message):
        make(model())


@pytest.mark.parametrize(
    "config",
    [
        {"evaluation_crops": 0},
        {"omega": "trained"},
        {"omega_weight_decay": 0.0},
        {"omega_weight_decay": 1e-3, "omega": "given"},
        {"momentum": 0.5},
        {"adam_beta1": 0.9, "optim": "sgd"},
    ],
)
def test_bad_settings(config):
    with pytest.raises(InputError, match=next(iter(config))) as caught:
        GradientFeaturesConfig("unused", use_cpu=True, **config)
    assert "\n" not in str(caught.value)


def test_random_omega_without_gradients(make):
    with pytest.raises(InputError, match="omega=random has no effect with mode=activation"):
        make(tiny_model("activation"), omega="random")


# -- presets ---------------------------------------------------------------------------------------


def rates(config, steps, at):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    schedule = build_main_schedule(optimizer, config, steps)
    return [schedule.lr_lambdas[0](step) * config.learning_rate for step in at]


def test_the_papers_schedule():
    config = GradientFeaturesConfig("unused", use_cpu=True)
    found = rates(config, 80_000, (0, 19_999, 20_000, 40_000, 60_000, 79_999))
    assert found == approx([1e-3, 1e-3, 5e-4, 2.5e-4, 1.25e-4, 1.25e-4])
    assert (config.per_device_train_batch_size, config.max_grad_norm, config.lr_scheduler_type) == (64, 0, "constant")


def test_the_codes_presets():
    full, activation, finetune = (
        GradientFeaturesConfig("unused", use_cpu=True, **CODE_PRESET[mode])
        for mode in ("full", "activation", "finetune")
    )
    assert rates(full, 50_000, (0, 9_999, 10_000, 49_999)) == approx([0.1, 0.1, 0.05, 0.1 / 16])
    assert rates(activation, 80_000, (0, 20_000)) == approx([0.01, 0.005])
    assert (full.max_grad_norm, full.weight_decay, full.max_steps) == (10, 5e-5, 50_000)
    assert (activation.weight_decay, finetune.learning_rate, finetune.omega) == (1e-6, 1e-3, "given")
    assert CODE_PRESET["gradient"] == CODE_PRESET["full"]
