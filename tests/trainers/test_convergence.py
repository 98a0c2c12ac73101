"""A classifier's side of GBC: what it sees, which of its parameters count, its margin, and that its images fit it."""

import math
import unittest.mock

import pytest
import torch
from classifier_runs import FACTS, digits, processor, tiny_mlp, tiny_trainer, trained_mlp
from tiny_runs import digit_sources

from hfkd.errors import InputError
from hfkd.models.scaling_exponents import solve_exponents
from hfkd.trainers import training_facts


def test_the_classifier_sees_images_normalised_as_in_its_training(tmp_path):
    classifier, (images, _) = tiny_mlp(), digits((0, 1, 2, 3), 10)
    conditions = tiny_trainer(tmp_path, classifier).conditions[0]
    source = digit_sources().train
    rows = torch.isin(source.labels, torch.arange(4)).nonzero()[:10, 0]
    stored = source.preprocessing.normalize(source.images[rows])
    torch.testing.assert_close(conditions.logits(images), classifier(stored).logits, atol=1e-5, rtol=1e-5)
    plain = tiny_trainer(tmp_path / "plain", classifier, processing_classes=[None]).conditions[0]
    torch.testing.assert_close(plain.logits(images), classifier(images).logits)


# -- which parameters must be stationary, and the margin's scale -----------------------------------------------------


def sets(tmp_path, classifier, **settings):
    conditions = tiny_trainer(tmp_path, [classifier], **settings).conditions[0]
    return {name.removeprefix("backbone.") for name in conditions.stationary}, set(conditions.forceless)


LAYERS = ["stages.0.0.0", "stages.1.0.0"]


def test_stationarity_sets(tmp_path):
    plain, normed = tiny_mlp(), tiny_mlp(norm="batch")
    everything = {name.removeprefix("backbone.") for name, _ in plain.named_parameters()}
    hidden = {f"{layer}.weight" for layer in LAYERS}
    assert sets(tmp_path, plain) == ({"classifier.weight", "stages.0.0.0.bias", *hidden}, set())
    assert sets(tmp_path, plain, stationarity_set="all") == (everything, set())
    assert sets(tmp_path, plain, stationarity_set="last") == ({"classifier.weight"}, set())
    fastest, slower = sets(tmp_path, plain, stationarity_set="lambda_max", zero_weight=1.0)
    assert fastest == {"classifier.bias"} and len(slower) == len(everything) - 1
    assert sets(tmp_path, plain, stationarity_set="custom", custom_set=["*.0.0.0.*"])[0] == {
        "stages.0.0.0.weight",
        "stages.0.0.0.bias",
    }
    core, forceless = sets(tmp_path, normed, zero_weight=1.0)
    assert core == {"classifier.weight", "stages.1.0.1.weight", "stages.1.0.1.bias"}
    exponents = solve_exponents(normed, torch.zeros(1, 1, 8, 8))
    assert forceless == set(exponents.zero_force) and len(forceless) == 4


@pytest.mark.parametrize(
    ("facts", "given", "scale", "warnings"),
    [
        ({"median_margin": 7.5, "min_margin": 5.0, "loss": 1e-3}, None, 7.5, []),
        ({"median_margin": 7.5, "min_margin": 5.0}, 3.0, 3.0, []),
        ({"loss": 1e-3, "min_margin": 5.0}, None, math.log(3 / 1e-3), []),
        ({"median_margin": 7.5, "min_margin": -0.1}, None, 7.5, ["did not separate its training images"]),
        ({"median_margin": 7.5, "min_margin": -0.1, "weight_decay": 5e-3}, None, 7.5, []),
        (None, 3.0, 3.0, ["does not say how it was trained"]),
        (None, None, math.log(300), ["does not say how it was trained", "margin_scale=5.7 is taken"]),
    ],
)
def test_the_margins_scale_and_what_is_warned_of(tmp_path, facts, given, scale, warnings):
    with unittest.mock.patch.object(training_facts.logger, "warning") as warn:
        trainer = tiny_trainer(tmp_path, [tiny_mlp(facts=facts)], margin_scale=given)
    assert trainer.conditions[0].margin_scale == pytest.approx(scale)
    said = [call.args[0] for call in warn.call_args_list]
    assert len(said) == len(warnings)
    for text, expected in zip(said, warnings, strict=True):
        assert expected in text and "\n" not in text and text.startswith("the classifier")


@pytest.mark.parametrize(
    "facts", [["loss", 0.1], "0.1", {"loss": "0.1"}, {"median_margin": [7.5]}, {"min_margin": True}]
)
def test_facts_that_are_none_are_named(tmp_path, facts):
    """config.json of a stranger's repository may hold anything under this name."""
    model = tiny_mlp(facts=FACTS)
    model.config.training_facts = facts
    with pytest.raises(InputError, match="the classifier: training_facts in its config.json .* is not") as error:
        tiny_trainer(tmp_path, [model])
    assert "\n" not in str(error.value)


def test_real_training_images_satisfy_the_conditions_and_others_do_not(tmp_path):
    """The premise, on a classifier with weight decay: its own images explain its weights, at T = 1."""
    classifier, classes = trained_mlp(), (0, 1, 2, 3)
    gamma = classifier.config.training_facts["median_margin"]
    exact = {"stationarity_set": "all", "per_group": False, "temperature": "margin", "margin_temperature": gamma}
    conditions = tiny_trainer(tmp_path, [classifier], **exact).conditions[0]
    own, labels = digits(classes, 60)
    noise = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = conditions(own.double(), labels)
    assert found.stationarity.sqrt() < 0.1 and found.duality.mean() < 0.1
    assert conditions(noise.double(), labels).stationarity.sqrt() > 0.9
    assert conditions(own.double(), labels.roll(1)).stationarity.sqrt() > 0.9


def at_a_margin_of(smallest, dtype, tmp_path):
    """L_st at T = 1, and its gradient by the images, where every margin is `smallest` or more."""
    classifier = tiny_mlp(dtype=dtype, facts=FACTS | {"median_margin": 70.0})
    conditions = tiny_trainer(tmp_path, [classifier], temperature="exact").conditions[0]
    images = digits((0, 1, 2, 3), 60)[0].to(dtype)
    labels = conditions.logits(images).argmax(dim=1)
    with torch.no_grad():
        found = conditions(images, labels, stationarity=False).margins
        rows = found.topk(10).indices
        for parameter in classifier.classifier.parameters():
            parameter *= smallest / found[rows].min()
    chosen = images[rows].requires_grad_()
    stationarity = conditions(chosen, labels[rows]).stationarity
    return stationarity.item(), torch.autograd.grad(stationarity, chosen)[0]


def test_single_precision_reaches_far_beyond_the_margin(tmp_path):
    """At 92 the multipliers of T = 1 are 1e-40, and what they are scaled by is the inverse of it."""
    (single, by_images), (double, exact) = (
        at_a_margin_of(92.0, dtype, tmp_path / str(dtype)) for dtype in (torch.float32, torch.float64)
    )
    assert double < 0.99 and single == pytest.approx(double, rel=1e-3)
    assert exact.abs().max() > 1e-4
    torch.testing.assert_close(by_images.double(), exact, rtol=1e-2, atol=1e-2 * exact.abs().max().item())


def test_a_processor_of_another_size(tmp_path):
    larger = processor()
    larger.size = {"height": 16, "width": 16}
    with pytest.raises(InputError, match="takes images of 16 pixels, by its processor, and the generator makes 8"):
        tiny_trainer(tmp_path, processing_classes=[larger])


def test_a_custom_set_that_names_nothing(tmp_path):
    with pytest.raises(InputError, match=r"no parameter of the classifier is named 'fc\.\*'"):
        tiny_trainer(tmp_path, stationarity_set="custom", custom_set=["fc.*"])
