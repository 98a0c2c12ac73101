"""GBC: its objective by hand, its draws, the classifiers it leaves alone, that it learns, and never sees an image."""

import copy
import inspect
import math

import pytest
import torch
from classifier_runs import (
    MEAN,
    STD,
    digits,
    processor,
    tiny_generator,
    tiny_mlp,
    tiny_trainer,
    warmed_up,
)
from test_online_adversarial import assert_equal, weights
from tiny_runs import digit_sources, tiny_resnet
from torch.nn import functional as F
from transformers import TrainerCallback

from hfkd.data import KeyedDraws, keyed_normal
from hfkd.data.keyed_random import EVALUATION, LATENT_STREAM
from hfkd.errors import InputError, RunError
from hfkd.losses.generator_from_classifier import margins
from hfkd.trainers.generator_from_classifier import GeneratorFromClassifierConfig, GeneratorFromClassifierTrainer


def losses(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def objective_by_hand(classifier, images, labels, names, gamma):
    """L_st (global, multipliers of cross-entropy at T = std) and U (symmetric), by a loop over the images."""
    pixels = ((images + 1) / 2 - MEAN) / STD
    parameters = {name: p for name, p in classifier.named_parameters() if name in names}
    for parameter in parameters.values():
        parameter.requires_grad_()
    logits = classifier(pixels).logits
    temperature = logits.detach().std()
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for z, y in zip(logits, labels, strict=True):
        found = torch.autograd.grad(-F.cross_entropy(z / temperature, y), parameters.values(), retain_graph=True)
        for name, gradient in zip(parameters, found, strict=True):
            total[name] += gradient / len(labels)
    theta, gradient = (torch.cat([one[name].detach().flatten() for name in names]) for one in (parameters, total))
    kappa = (theta @ gradient / (gradient @ gradient)).clamp(min=0)
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    ratio = margins(logits.detach(), labels) / gamma
    return (theta - kappa * gradient).square().sum() / theta.square().sum(), (1 + (ratio - 1) ** 2).log().mean()


# -- Algorithm 1 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_the_first_update_is_that_of_the_formulas(tmp_path, norm):
    classifier = tiny_mlp(dtype=torch.float64, norm=norm)
    settings = {"stationarity_set": "all", "per_group": False, "gate_sharpness": 0.0}
    generator = warmed_up(tmp_path / "warm", [classifier], **settings).model.students[0]
    trainer = tiny_trainer(
        tmp_path, [classifier], copy.deepcopy(generator).train(), max_steps=1, warmup_updates=0, **settings
    )
    trainer.train()
    (entry,) = losses(trainer)
    generator.train()
    index = torch.arange(20)
    latents = keyed_normal(trainer.args.seed, 0, index, LATENT_STREAM, 5)
    images = generator(latents, index % 4).images.detach()
    names = [name for name, _ in classifier.named_parameters()]
    stationarity, duality = objective_by_hand(classifier, images, index % 4, names, gamma=10.0)
    variation = sum(images.diff(dim=axis).abs().mean() for axis in (2, 3)) / 2
    assert 0 < stationarity < 0.98
    assert entry["stationarity"] == pytest.approx(stationarity.item(), rel=1e-6)
    assert entry["duality"] == pytest.approx(duality.item(), rel=1e-6)
    assert entry["total_variation"] == pytest.approx(variation.item(), rel=1e-6)
    assert entry["loss"] == pytest.approx((stationarity + duality + 0.02 * variation).item(), rel=1e-6)


def test_warm_up_is_cross_entropy_and_total_variation(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=4, warmup_updates=2)
    trainer.train()
    first, *_, last = losses(trainer)
    assert first["loss"] == pytest.approx(first["cross_entropy"] + 0.02 * first["total_variation"], rel=1e-6)
    assert "stationarity" not in first and "cross_entropy" not in last
    assert last["loss"] == pytest.approx(last["stationarity"] + last["duality"] + 0.02 * last["total_variation"])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"multipliers": "network"},
        {"multipliers": "constant", "duality": "walls"},
        {"batchnorm_statistics": "batch"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "ce",
)
def test_it_descends(tmp_path, settings):
    """On the fixed draws, in thirty updates after as many of warm-up, stationarity and all."""
    classifier = tiny_mlp(norm="batch" if "batchnorm_statistics" in settings else "none")
    warm = warmed_up(tmp_path / "warm", [classifier], **settings)
    trainer = tiny_trainer(
        tmp_path, [classifier], warm.model.students[0], max_steps=30, warmup_updates=0, learning_rate=0.01, **settings
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] - 0.02
    assert after["eval_sqrt_stationarity"] < before["eval_sqrt_stationarity"] - 0.01


def test_multipliers_learn_from_stationarity(tmp_path):
    trainer = tiny_trainer(tmp_path, multipliers="network", max_steps=6, warmup_updates=2)
    before = weights(trainer.model)
    trainer.train()
    moved = {name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])}
    assert {name for name in before if name.startswith("training_only.")} <= moved
    entry = losses(trainer)[-1]
    assert entry["learning_rate_multipliers"] == 2 * entry["learning_rate"] and entry["grad_norm_multipliers"] > 0
    assert not any(name.startswith("teachers.") for name in moved)


def test_the_gradient_is_the_finite_difference_of_the_loss(tmp_path):
    trainer = warmed_up(tmp_path, [tiny_mlp(dtype=torch.float64)], temperature="margin", gate_sharpness=0.0)
    trainer.optimizer.zero_grad()
    batch = {"index": torch.arange(20), "epoch": torch.zeros(20, dtype=torch.int64)}
    trainer.model.train()
    bias = trainer.model.students[0].to_image.bias
    trainer.method_step(batch, 1.0, True)
    gradient = trainer.optimizer.gradients("generator")[bias].item()
    assert trainer.method_step(batch, 1.0, True)[1]["stationarity"] < 0.99
    found = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            bias += step
        found.append(trainer.method_step(batch, 1.0, True)[0].item())
        with torch.no_grad():
            bias -= step
    assert gradient == pytest.approx((found[0] - found[1]) / 2e-6, rel=1e-4) and abs(gradient) > 1e-4


# -- draws ------------------------------------------------------------------------------------------------------------


def test_draws_are_functions_of_seed_update_and_classifier(tmp_path):
    trainer = tiny_trainer(tmp_path, [tiny_mlp(), tiny_mlp(1, num_labels=3)])
    state = torch.random.get_rng_state()

    def draw(k, index, epoch=0, of=trainer):
        index = torch.tensor(index)
        return of._draw(k, {"index": index, "epoch": torch.full_like(index, epoch)})

    latents, labels = draw(0, [0, 1, 2, 7])
    assert labels.tolist() == [0, 1, 2, 3] and draw(1, [0, 1, 2, 7])[1].tolist() == [0, 1, 2, 1]
    assert torch.equal(draw(0, [7, 1])[0], latents[[3, 1]])
    others = [draw(1, [0, 1, 2, 7]), draw(0, [20, 21, 22, 27]), draw(0, [0, 1, 2, 7], epoch=EVALUATION)]
    others.append(draw(0, [0, 1, 2, 7], of=tiny_trainer(tmp_path / "b", trainer_classifiers(), data_seed=1)))
    assert all((other - latents).abs().min() > 0 for other, _ in others)
    assert torch.equal(state, torch.random.get_rng_state())
    many, _ = draw(0, list(range(2000)))
    assert abs(many.mean()) < 0.03 and abs(many.std() - 1) < 0.03


def trainer_classifiers():
    return [tiny_mlp(), tiny_mlp(1, num_labels=3)]


def test_every_update_has_draws_of_its_own(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=3)
    seen, step = [], trainer.method_step
    trainer.method_step = lambda batch, *rest: (seen.append(batch["index"].tolist()), step(batch, *rest))[1]
    trainer.train()
    assert seen == [list(range(start, start + 20)) for start in (0, 20, 40)]


# -- evaluation -------------------------------------------------------------------------------------------------------


def test_evaluation_is_the_criterion_on_fixed_draws_and_leaves_no_trace(tmp_path):
    classifier = tiny_mlp(dtype=torch.float64)
    settings = {"stationarity_set": "all", "per_group": False, "gate_sharpness": 0.0}
    trainer = warmed_up(tmp_path, [classifier], **settings)
    before, state = weights(trainer.model), torch.random.get_rng_state()
    metrics, again = trainer.evaluate(), trainer.evaluate()
    assert {k for k in metrics if metrics[k] != again[k]} <= {k for k in metrics if "second" in k or "runtime" in k}
    assert_equal(before, weights(trainer.model))
    assert torch.equal(state, torch.random.get_rng_state()) and trainer.model.students[0].training
    index = torch.arange(40)
    latents = keyed_normal(trainer.args.seed, EVALUATION, index, LATENT_STREAM, 5)
    with torch.no_grad():
        images = trainer.model.students[0].eval()(latents, index % 4).images
    names = [name for name, _ in classifier.named_parameters()]
    stationarity, duality = objective_by_hand(classifier, images, index % 4, names, gamma=10.0)
    right = classifier(((images + 1) / 2 - MEAN) / STD).logits.argmax(dim=1) == index % 4
    assert 0 < stationarity < 0.98
    assert metrics["eval_sqrt_stationarity"] == pytest.approx(stationarity.sqrt().item(), rel=1e-6)
    assert metrics["eval_duality"] == pytest.approx(duality.item(), rel=1e-6)
    assert metrics["eval_loss"] == pytest.approx((stationarity + duality).item(), rel=1e-6)
    assert metrics["eval_self_accuracy"] == right.double().mean().item()
    assert trainer.predict(trainer.eval_dataset).predictions[:, 0].tolist() == right.double().tolist()


def test_the_best_model_is_that_of_the_criterion(tmp_path):
    every_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    settings = every_step | {"load_best_model_at_end": True, "metric_for_best_model": "sqrt_stationarity"}
    trainer = tiny_trainer(tmp_path, max_steps=4, multipliers="constant", **settings)
    trainer.train()
    found = [entry["eval_sqrt_stationarity"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.best_metric == min(found) and len(set(found)) == 4
    assert trainer.evaluate()["eval_sqrt_stationarity"] == min(found)


# -- no image, and no trace in the classifier (T12) -----------------------------------------------------------------


def test_nothing_takes_an_image(tmp_path):
    for method in (GeneratorFromClassifierTrainer.__init__, GeneratorFromClassifierConfig.__init__):
        assert not [name for name in inspect.signature(method).parameters if "dataset" in name]
    source = digit_sources().train
    with pytest.raises(TypeError, match="train_dataset"):
        GeneratorFromClassifierTrainer(tiny_generator(), tiny_mlp(), train_dataset=source)
    trainer = tiny_trainer(tmp_path)
    for look in (trainer.evaluate, trainer.predict):
        with pytest.raises(InputError, match="ResidentImages, and this method sees no data: leave it out") as caught:
            look(source)
        assert "\n" not in str(caught.value)
    assert isinstance(trainer.train_dataset, KeyedDraws) and len(trainer.train_dataset) == 12 * 20


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_the_classifier_stays_as_it_was(tmp_path, statistics):
    classifier = tiny_mlp(norm="batch")
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    trainer = tiny_trainer(tmp_path, classifier, batchnorm_statistics=statistics, eval_strategy="epoch", max_steps=4)
    fingerprint = trainer.conditions[0].fingerprint()
    trainer.train()
    assert trainer.conditions[0].fingerprint() == fingerprint
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())
    assert not any(module.training for module in classifier.modules())
    assert all(p.grad is None for p in trainer.model.parameters())
    owned = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not owned & {id(p) for p in classifier.parameters()}


def test_statistics_of_the_batch_are_those(tmp_path):
    classifier, (images, _) = tiny_mlp(norm="batch"), digits((0, 1, 2, 3), 30)
    trainer = tiny_trainer(tmp_path, [classifier], batchnorm_statistics="batch")
    by_batch = copy.deepcopy(classifier).train()(((images + 1) / 2 - MEAN) / STD).logits
    torch.testing.assert_close(trainer.conditions[0].logits(images), by_batch, atol=1e-4, rtol=1e-4)
    assert (classifier(((images + 1) / 2 - MEAN) / STD).logits - by_batch).abs().max() > 0.1


def test_a_changed_classifier_is_found_out(tmp_path):
    class Meddler(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            model.teachers[0].classifier.get_parameter("classifier.weight").data[0, 0] += 1e-6

    with pytest.raises(RunError, match="a classifier's weights or statistics changed"):
        tiny_trainer(tmp_path, callbacks=[Meddler()], max_steps=2).train()


# -- several classifiers (Algorithm 2) -------------------------------------------------------------------------------


def test_one_of_several_is_the_one_alone(tmp_path):
    """K = 1 reduces exactly to Algorithm 1."""
    alone = tiny_trainer(tmp_path / "a", tiny_mlp(), processing_classes=processor())
    listed = tiny_trainer(tmp_path / "b", [tiny_mlp()])
    for trainer in (alone, listed):
        trainer.train()
    for one, other in zip(losses(alone), losses(listed), strict=True):
        assert one == other
    assert_equal(weights(alone.model), weights(listed.model))


def test_the_loss_is_the_mean_over_the_classifiers(tmp_path):
    trainer = tiny_trainer(tmp_path, [tiny_mlp(), tiny_mlp(1, num_labels=3)], max_steps=3, warmup_updates=0)
    trainer.train()
    for entry in losses(trainer):
        for name in ("stationarity", "duality", "total_variation", "self_accuracy"):
            each = [entry[f"classifier_{k}_{name}"] for k in (0, 1)]
            assert entry[name] == pytest.approx(sum(each) / 2)
            assert each[0] != each[1] or name != "duality"
    metrics = trainer.evaluate()
    assert metrics["eval_duality"] == pytest.approx(sum(metrics[f"eval_classifier_{k}_duality"] for k in (0, 1)) / 2)


@pytest.mark.parametrize("per_step", ["all", "one"])
def test_one_batch_of_the_generator_holds_images_for_all(tmp_path, per_step):
    """Its batch norm would take away the number of a classifier that has a batch to itself."""
    trainer = tiny_trainer(tmp_path, trainer_classifiers(), classifiers_per_step=per_step, max_steps=2)
    made = []
    trainer.model.students[0].layers[0].register_forward_hook(lambda m, x, y: made.append(x[0]))
    trainer.train()
    assert [len(inputs) for inputs in made] == [40, 40]
    for inputs in made:
        one_hot = inputs[:, 5:7]  # between latents and labels
        assert torch.equal(one_hot, torch.eye(2).repeat_interleave(20, dim=0))


def test_one_classifier_at_random_in_each_update(tmp_path):
    classifiers = [tiny_mlp(), tiny_mlp(1, num_labels=3)]
    trainer = tiny_trainer(tmp_path, classifiers, classifiers_per_step="one", warmup_updates=0)
    trainer.train()
    chosen = [[k for k in (0, 1) if f"classifier_{k}_duality" in entry] for entry in losses(trainer)]
    assert all(len(one) == 1 for one in chosen) and {one[0] for one in chosen} == {0, 1}
    assert sum(trainer._chosen(update)[0] for update in range(1000)) == pytest.approx(500, abs=60)


# -- precision ------------------------------------------------------------------------------------------------------


def test_bf16_stays_in_the_generator(tmp_path):
    trainer = tiny_trainer(tmp_path, bf16=True, max_steps=3, eval_strategy="epoch", multipliers="network")
    made, seen = [], []
    trainer.model.students[0].to_image.register_forward_hook(lambda m, x, y: made.append(y.dtype))
    trainer.conditions[0].classifier.classifier.register_forward_hook(
        lambda m, x, y: seen.append((x[0].dtype, y.dtype))
    )
    trainer.train()
    assert set(made) == {torch.bfloat16} and set(seen) == {(torch.float32, torch.float32)}
    assert all(math.isfinite(value) for entry in trainer.state.log_history for value in entry.values())
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


# -- bad input --------------------------------------------------------------------------------------------------------


def unsupported():
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=4, **sizes))


@pytest.mark.parametrize(
    ("networks", "message"),
    [
        (lambda: {"classifiers": []}, r"classifiers=\[\]: a generator is born from at least one"),
        (lambda: {"classifiers": ["resnet"], "generator": tiny_generator()}, "classifier is a str"),
        (lambda: {"generator": tiny_mlp()}, "the generator is a HfkdMlp.* without config.latent_size"),
        (lambda: {"generator": tiny_generator([5])}, r"classifiers of \[5\] classes, and these have \[4\]"),
        (lambda: {"classifiers": [unsupported()]}, "layer_?norm|LayerNorm|attention"),
        (lambda: {"classifiers": [tiny_mlp(image_size=10)]}, "cannot take images of 8x8 pixels"),
        (lambda: {"classifiers": [tiny_mlp(dtype=torch.float64)], "generator": tiny_generator()}, "float32.*float64"),
        (lambda: {"processing_classes": [None, None]}, "1 classifiers have 2 processing_classes"),
        (lambda: {"classifiers": (2 * [tiny_mlp()])}, "one network twice"),
        (lambda: {"classifiers_per_step": "one"}, "classifiers_per_step=one has no effect with one classifier"),
        (lambda: {"per_device_train_batch_size": 1}, "batch of one image"),
    ],
)
def test_networks_that_do_not_fit(tmp_path, networks, message):
    given = networks()
    with pytest.raises(InputError, match=message) as caught:
        if given.get("classifiers") in ([], ["resnet"]):
            GeneratorFromClassifierTrainer(tiny_generator(), given["classifiers"])
        else:
            tiny_trainer(tmp_path, **given)
    assert "\n" not in str(caught.value)


def test_convolutional_classifiers_work_too(tmp_path):
    classifier = tiny_resnet(0, norm="none", num_labels=4)
    trainer = tiny_trainer(tmp_path, classifier, processing_classes=processor(), margin_scale=2.0, max_steps=3)
    trainer.train()
    assert len(trainer.conditions[0].stationary) > 2 and losses(trainer)[-1]["stationarity"] < 1
