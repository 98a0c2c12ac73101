"""Full-batch training: it ends where margins explain the weights, says so, and refuses what would not."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from max_margin_runs import classifier, few_digits, plain_digits, tiny_trainer, whole
from scipy.optimize import nnls
from test_online_adversarial import weights
from tiny_runs import digit_sources, tiny_resnet
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F
from transformers import AutoModelForImageClassification
from transformers.utils import logging as transformers_logging

from hfkd.errors import InputError
from hfkd.models import HfkdVaeEncoderConfig, HfkdVaeEncoderForImageClassification
from hfkd.trainers import max_margin
from hfkd.trainers.max_margin import MaxMarginConfig


WIDE = {"hidden_sizes": (100, 100)}
DECAY = {"weight_decay": 5e-3, "learning_rate": 0.1}


def held_out(per_class=5):
    """As many test digits of each class as there are training digits."""
    images, labels = whole(few_digits().test)
    rows = torch.cat([(labels == digit).nonzero()[:per_class, 0] for digit in range(10)])
    return images[rows], labels[rows]


def noise_like(images):
    draws = torch.randn(images.shape, generator=torch.Generator().manual_seed(0), dtype=images.dtype)
    return draws * images.std() + images.mean()


# -- what the weights satisfy (T6 of the specification; in brackets what was measured, with seeds 0, 1 and 2) -----


@pytest.fixture(scope="module")
def decayed(tmp_path_factory):
    """A trainer that has brought a classifier to a stationary point with weight decay, and saved it."""
    folder = tmp_path_factory.mktemp("decayed")
    trainer = tiny_trainer(folder, classifier(**WIDE), few_digits().train, max_steps=800, logging_steps=800, **DECAY)
    trainer.train()
    trainer.save_model()
    return trainer


def along_the_gradient(model, images, labels):
    """Cosine of the weights and -dCE/dtheta, and the factor that fits the one to the other."""
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(F.cross_entropy(model(images).logits, labels), parameters)
    theta = torch.cat([parameter.detach().flatten() for parameter in parameters])
    force = -torch.cat([gradient.flatten() for gradient in gradients])
    return (theta @ force / theta.norm() / force.norm()).item(), (theta @ force / (force @ force)).item()


def test_with_weight_decay_the_weights_are_the_gradient(decayed):
    model, (images, labels) = decayed.model.students[0].eval(), whole(few_digits().train)
    cosine, factor = along_the_gradient(model, images, labels)
    assert cosine > 0.98  # 0.990 to 0.992
    assert factor == pytest.approx(1 / DECAY["weight_decay"], rel=0.02)  # 197.7 to 198.8
    assert abs(along_the_gradient(model, *held_out())[0]) < 0.1  # -0.03 to 0.00
    assert along_the_gradient(model, noise_like(images), labels)[0] < 0.1  # -0.30 to -0.28


def unexplained(model, images, labels, name="backbone.stages.0.0.0.weight"):
    """Relative distance from a weight to the closest sum, with multipliers >= 0, of gradients of all margins."""
    parameters = {key: parameter.detach() for key, parameter in model.named_parameters()}

    def logits(weight, image):
        return functional_call(model, {**parameters, name: weight}, (image[None],)).logits[0]

    of_logits = vmap(jacrev(logits), in_dims=(None, 0))(parameters[name], images)
    of_margins = of_logits[torch.arange(len(labels)), labels][:, None] - of_logits
    columns = of_margins[~F.one_hot(labels, of_logits.shape[1]).bool()].flatten(1).T
    _, distance = nnls(columns.numpy(), parameters[name].flatten().numpy())
    return distance / parameters[name].norm().item()


def test_a_small_start_leaves_a_first_layer_of_the_training_images(tmp_path):
    train = few_digits().train
    trainer = tiny_trainer(
        tmp_path, classifier("mlp_small_first", **WIDE), train, max_steps=1000, stop_at_loss=1e-5, logging_steps=1000
    )
    trainer.train()
    assert trainer.state.global_step == 210  # 209 at seed 0, and it is looked at every tenth
    model, (images, labels) = trainer.model.students[0].eval(), whole(train)
    assert unexplained(model, images, labels) < 0.35  # 0.27 to 0.30
    assert unexplained(model, *held_out()) > 0.5  # 0.62 to 0.64
    assert unexplained(model, noise_like(images), labels) > 0.85  # 0.96 to 0.97
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    assert unexplained(model, images, shuffled) > 0.65  # 0.71 to 0.85


# -- how it descends -------------------------------------------------------------------------------


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_scaled_gradients_go_down_evenly_to_the_smallest_losses(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 5000}
    model = classifier("mlp_bn", hidden_sizes=(32, 32))
    trainer = tiny_trainer(
        tmp_path, model, few_digits().train, max_steps=900, logging_steps=10, learning_rate=0.03, **saving
    )
    trainer.train()
    found = losses(trainer)
    assert found[-1] < 1e-29 and len(found) == trainer.state.global_step / 10 < 90  # means over ten updates
    assert all(after < before for before, after in zip(found, found[1:], strict=False))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{trainer.state.global_step}"]
    scales = [entry["gradient_scale"] for entry in trainer.state.log_history if "gradient_scale" in entry]
    assert scales[0] == 1 and scales[-1] > 1e27
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert json.loads((checkpoint / "config.json").read_text())["training_facts"]["loss"] < 2e-30


def test_single_precision_gets_far_too(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        train=few_digits().train,
        double_precision=False,
        max_steps=2000,
        stop_at_loss=1e-20,
        learning_rate=0.02,
    )
    trainer.train()
    assert losses(trainer)[-1] <= 1e-20 and trainer.state.global_step < 2000
    assert next(trainer.model.parameters()).dtype == torch.float32


@pytest.mark.parametrize(("stop_at_loss", "updates"), [(0.0, 12), (1e-300, 10)])
def test_a_loss_that_has_underflowed_stops_where_that_was_asked_for(tmp_path, monkeypatch, stop_at_loss, updates):
    monkeypatch.setattr(max_margin, "_cross_entropy", lambda logits, labels: 0 * logits.sum())
    trainer = tiny_trainer(tmp_path, stop_at_loss=stop_at_loss)
    trainer.train()
    assert trainer.state.global_step == updates


def by_hand(model, steps, threshold, decayed=(), weight_decay=0.0, rate=0.05):
    """SGD with momentum on CE times max(1, threshold / CE)."""
    model, (images, labels) = model.double().train(), whole(plain_digits())
    momenta = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for _ in range(steps):
        loss = F.cross_entropy(model(images).logits, labels)
        scale = max(1.0, threshold / loss.item())
        named = dict(model.named_parameters())
        gradients = torch.autograd.grad(scale * loss, list(named.values()))
        with torch.no_grad():
            for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
                decay = weight_decay * parameter if name in decayed else 0.0
                momenta[name] = 0.9 * momenta[name] + gradient + decay
                parameter -= rate * momenta[name]
    return weights(model)


def assert_same(one, other):
    assert all(torch.allclose(value, other[name], rtol=1e-9, atol=1e-12) for name, value in one.items())


def trained(tmp_path, model, **config):
    trainer = tiny_trainer(tmp_path, model, max_steps=4, learning_rate=0.05, **config)
    trainer.train()
    return weights(trainer.model.students[0])


@pytest.mark.parametrize("threshold", [0.0, 3.0])
def test_updates_are_the_formula(tmp_path, threshold):
    found = trained(tmp_path, classifier("mlp_bn"), loss_scaling_below=threshold)
    assert_same(found, by_hand(classifier("mlp_bn"), 4, threshold))


@pytest.mark.parametrize(
    ("decayed", "names"),
    [
        ("scale_sensitive", {"backbone.stages.1.0.1.weight", "backbone.stages.1.0.1.bias", "classifier.weight"}),
        ("all", {name for name, _ in classifier("mlp_bn").named_parameters()}),
    ],
)
def test_what_decays(tmp_path, decayed, names):
    """Of a batch-norm network the last norm and the last weight: the others' scale is taken out again."""
    found = trained(tmp_path, classifier("mlp_bn"), decayed=decayed, weight_decay=0.5)
    assert_same(found, by_hand(classifier("mlp_bn"), 4, 0.0, names, 0.5))


def test_every_update_sees_all_images_in_one_order(tmp_path):
    trainer, seen = tiny_trainer(tmp_path, max_steps=-1, num_train_epochs=3), []
    step = trainer.method_step

    def watched(batch, share, last):
        seen.append((batch["index"].tolist(), share, last))
        return step(batch, share, last)

    trainer.method_step = watched
    trainer.train()
    assert seen == [(list(range(200)), 1.0, True)] * 3
    assert trainer.state.epoch == 3


def small_convnet():
    return HfkdVaeEncoderForImageClassification(
        HfkdVaeEncoderConfig(depth=4, scales=1, num_channels=1, image_size=8, num_labels=10)
    )


@pytest.mark.parametrize("make", [lambda: tiny_resnet(0, norm="none"), small_convnet], ids=["resnet", "convnet"])
def test_other_classifiers_learn_too(tmp_path, make):
    torch.manual_seed(0)
    trainer = tiny_trainer(tmp_path, make(), few_digits().train, max_steps=60, learning_rate=0.05)
    trainer.train()
    found = losses(trainer)
    assert found[-1] < found[0] - 0.02 and all(after < before for before, after in zip(found, found[1:], strict=False))
    trainer.save_model()
    assert json.loads((tmp_path / "config.json").read_text())["training_facts"]["num_images"] == 50


# -- what is stored --------------------------------------------------------------------------------


def test_facts_are_those_of_the_saved_weights(decayed):
    folder = Path(decayed.args.output_dir)
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    facts = loaded.config.training_facts
    assert facts == decayed.model.students[0].config.training_facts
    images, labels = whole(few_digits().train, torch.float32)
    logits = loaded(images).logits
    own = logits.gather(1, labels[:, None])[:, 0]
    margins = own - logits.masked_fill(F.one_hot(labels, 10).bool(), -math.inf).amax(1)
    assert facts == {
        "loss": pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4),
        "min_margin": pytest.approx(margins.min().item(), rel=1e-4),
        "median_margin": pytest.approx(margins.median().item(), rel=1e-4),
        "accuracy": 1.0,
        "num_images": 50,
        "weight_decay": 5e-3,
        "updates": 800,
    }
    assert 1 < facts["min_margin"] < facts["median_margin"]


def test_the_card_tells_the_margins(decayed):
    card = (Path(decayed.args.output_dir) / "README.md").read_text()
    facts = decayed.model.students[0].config.training_facts
    assert f"| Model | {facts['min_margin']:.4f} | {facts['median_margin']:.4f} |" in card
    assert "On the train split:" in card and "Privacy" in card and "arxiv:1906.05890" in card


def test_facts_of_batch_norm_are_in_evaluation_mode(tmp_path):
    """A generator meets the classifier with its running statistics."""
    trainer = tiny_trainer(tmp_path, classifier("mlp_bn"), few_digits().train, save_strategy="steps", save_steps=6)
    trainer.train()
    facts = [json.loads((tmp_path / f"checkpoint-{k}/config.json").read_text())["training_facts"] for k in (6, 12)]
    assert [found["updates"] for found in facts] == [6, 12]
    images, labels = whole(few_digits().train)
    loss = F.cross_entropy(trainer.model.students[0].eval()(images).logits, labels).item()
    assert facts[1]["loss"] == pytest.approx(loss, rel=1e-9) != facts[0]["loss"]
    assert abs(facts[1]["loss"] - losses(trainer)[-1]) > 1e-3


def test_facts_do_not_outlive_the_weights(make_trainer, tmp_path):
    """A generator would be born from what is no longer so."""
    student = tiny_resnet(0)
    student.config.training_facts = {"median_margin": 9.0}
    trainer = make_trainer([student, tiny_resnet(1)], max_steps=1)
    trainer.train()
    trainer.save_model()
    assert "training_facts" not in json.loads((tmp_path / "run/config.json").read_text())


def test_evaluation_and_predictions(tmp_path):
    trainer = tiny_trainer(tmp_path, eval_strategy="steps", eval_steps=12)
    trainer.train()
    logits = torch.from_numpy(trainer.predict(digit_sources().test).predictions)
    labels = digit_sources().test.labels
    (entry,) = (entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert entry["eval_accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert entry["eval_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


# -- warnings and refusals -------------------------------------------------------------------------


@pytest.fixture
def warnings(caplog):
    transformers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield lambda: [record.message for record in caplog.records if "random in training" in record.message]
    transformers_logging.disable_propagation()


def test_randomness_in_training_is_warned_of(tmp_path, warnings):
    model = classifier("mlp_bn")
    before, state = weights(model), torch.get_rng_state()
    tiny_trainer(tmp_path, model)
    assert warnings() == []
    model.base_model.tail = nn.Sequential(nn.Dropout(0.1), model.base_model.tail)
    tiny_trainer(tmp_path, model.float())
    assert len(warnings()) == 1 and "dropout" in warnings()[0]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, weights(model)[name].to(value.dtype)) for name, value in before.items())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"per_device_train_batch_size": 199}, "=199 is smaller than the 200 training images: .*train_per_class"),
        ({"per_device_train_batch_size": -1}, "per_device_train_batch_size=-1 is out of range"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2 has no effect with one full batch"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last=True has no effect"),
        ({"optim": "adam"}, "optim=adam: only gradient descent"),
        ({"loss_scaling_below": -1.0}, "loss_scaling_below=-1.0 is out of range"),
        ({"stop_at_loss": -1.0}, "stop_at_loss=-1.0 is out of range"),
        ({"decayed": "scale_sensitive"}, "decayed=scale_sensitive has no effect with weight_decay=0"),
        ({"decayed": "last", "weight_decay": 1.0}, "decayed='last' is unknown"),
        ({"weight_decay": 0.1, "loss_scaling_below": 1.0}, "loss_scaling_below=1.0 has no effect with weight_decay"),
        ({"bf16": True}, "bf16=True rounds away"),
    ],
)
def test_bad_settings(tmp_path, config, message):
    model = classifier()
    with pytest.raises(InputError, match=message) as caught:
        tiny_trainer(tmp_path, model, **config)
    assert "\n" not in str(caught.value)
    assert next(model.parameters()).dtype == torch.float32  # a run that is refused leaves no trace


def test_bad_data_and_networks(tmp_path):
    refusals = [
        ({"train": digit_sources().train}, "the training images are augmented"),
        (
            {"train": digit_sources(3).train.variant(augmentation=plain_digits().augmentation), "model": classifier()},
            None,
        ),
        ({"model": tiny_resnet(0, num_labels=7)}, "has 10 classes and the networks have 7"),
        ({"model": "mlp"}, "model is a str"),
        ({"model": classifier().half()}, "weights are float16"),
    ]
    for arguments, message in refusals:
        if message is None:
            tiny_trainer(tmp_path, **arguments)  # grey networks average three channels
            continue
        with pytest.raises(InputError, match=message) as caught:
            tiny_trainer(tmp_path, **arguments)
        assert "\n" not in str(caught.value)


def test_any_batch_that_is_large_enough_is_the_full_one(tmp_path):
    trainer = tiny_trainer(tmp_path, per_device_train_batch_size=5000)
    assert trainer.args.per_device_train_batch_size == 200 and len(trainer.get_train_dataloader()) == 1


def test_a_network_without_scaling_exponents_cannot_say_what_is_scale_sensitive(tmp_path):
    model = classifier()
    model.base_model.stages[1][0][2] = nn.GELU()
    with pytest.raises(InputError, match="has no scaling rule"):
        tiny_trainer(tmp_path, model, decayed="scale_sensitive", weight_decay=0.1)


def test_every_field_of_the_method_is_observed():
    """By the tests above; a new field belongs into one of them."""
    observed = {"num_train_epochs", "per_device_train_batch_size", "learning_rate", "save_strategy", "save_steps"}
    observed |= {"logging_steps", "loss_scaling_below", "stop_at_loss", "decayed", "double_precision"}
    assert set(MaxMarginConfig.__annotations__) - {"return"} == observed
