"""The linear probes: SGD on augmented images, and logistic regression as a layer."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tiny_runs import digit_sources

from hfkd.data import Augmentation, keyed_permutation
from hfkd.errors import InputError
from hfkd.evaluation.linear_probe import LinearProbeSettings, fit_linear_probe
from hfkd.evaluation.sgd_probe import SGDProbeSettings, fit_sgd_probe, scale_by_trust


QUICK = SGDProbeSettings(learning_rate=0.5, batch_size=64, epochs=3, seed=5)


def pixels(images):
    return images.flatten(1)


@pytest.fixture(scope="module")
def plain():
    """200 digits to train on and 100 to test on, without augmentation."""
    sources = digit_sources()
    return sources.train.variant(augmentation=Augmentation()), sources.test


def everything(source):
    return source.materialise({"key": torch.tensor([(0, row) for row in range(len(source))])})


# -- SGD -------------------------------------------------------------------------------------------


def test_the_papers_rates():
    """30 at the start, half of it half-way, and next to nothing in the last of 90 epochs; no warm-up."""
    settings = SGDProbeSettings()
    assert (settings.batch_size, settings.epochs, settings.optimizer) == (256, 90, "sgd")
    assert settings.rate(0) == 30 and settings.rate(45) == pytest.approx(15)
    assert settings.rate(89) == pytest.approx(15 * (1 + math.cos(math.pi * 89 / 90)))


def test_it_is_plain_sgd_on_the_features(plain):
    """By hand: momentum 0.9 as v <- 0.9 v + g, no decay, from N(0, 0.01^2), the rate constant within an epoch."""
    train, test = plain
    found = fit_sgd_probe(pixels, train, test, 10, QUICK)
    known = everything(train)
    inputs, labels = known["pixel_values"].flatten(1), known["labels"]
    weight = torch.nn.init.normal_(torch.empty(10, 64), std=0.01, generator=torch.Generator().manual_seed(5))
    bias, speeds = torch.zeros(10), [torch.zeros(10, 64), torch.zeros(10)]
    for epoch, rate in enumerate([0.5, 0.375, 0.125]):
        for rows in keyed_permutation(5, epoch, 200).split(64):
            error = (inputs[rows] @ weight.T + bias).softmax(1) - F.one_hot(labels[rows], 10)
            gradients = [error.T @ inputs[rows] / len(rows), error.mean(0)]
            speeds = [0.9 * speed + gradient for speed, gradient in zip(speeds, gradients, strict=True)]
            weight, bias = weight - rate * speeds[0], bias - rate * speeds[1]
    torch.testing.assert_close(found.head.weight, weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.head.bias, bias, atol=1e-4, rtol=1e-4)
    seen = everything(test)
    right = (found.head.logits(seen["pixel_values"].flatten(1)).argmax(1) == seen["labels"]).double().mean()
    assert found.accuracy == pytest.approx(right.item()) and found.best_accuracy >= found.accuracy > 0.7


def test_each_epoch_sees_new_crops_of_every_image(plain):
    train, test = plain
    augmentation = Augmentation(crop_padding=1)
    cropped = train.variant(augmentation=augmentation, seed=3, views=2)
    batches = []

    def watched(images):
        assert not torch.is_grad_enabled()
        batches.append(images)
        return images.flatten(1)

    settings = SGDProbeSettings(learning_rate=0.5, batch_size=100, epochs=2)
    first = fit_sgd_probe(watched, cropped, test, 10, settings)
    of_test, epochs = batches[:1], (batches[1:3], batches[3:])
    torch.testing.assert_close(of_test[0], everything(test)["pixel_values"])
    for epoch, images in enumerate(epochs):
        keys = torch.tensor([(epoch, row) for row in keyed_permutation(0, epoch, 200).tolist()])
        expected = train.variant(augmentation=augmentation, seed=3).materialise({"key": keys})["pixel_values"]
        assert torch.equal(torch.cat(images), expected)
    again = fit_sgd_probe(pixels, cropped, test, 10, settings)
    assert torch.equal(first.head.weight, again.head.weight)
    still = fit_sgd_probe(pixels, train, test, 10, settings)
    assert not torch.allclose(first.head.weight, still.head.weight, atol=1e-3)


def test_features_of_unaugmented_images_are_made_once(plain):
    calls = []

    def counted(images):
        calls.append(len(images))
        return images.flatten(1)

    fit_sgd_probe(counted, *plain, 10, SGDProbeSettings(learning_rate=0.5, batch_size=100, epochs=5))
    assert calls == [100, 100, 100]


def test_lars_scales_each_tensor_by_its_own_norms():
    layer = torch.nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 4.0]]))
        layer.bias.zero_()
    layer.weight.grad, layer.bias.grad = torch.tensor([[0.0, 2.0]]), torch.tensor([7.0])
    scale_by_trust(layer)
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[0.0, 0.001 * 5 / 2 * 2]]))
    assert layer.bias.grad == 7  # of a parameter that is zero there is no ratio


def test_lars_takes_steps_of_its_own_size(plain):
    settings = {"batch_size": 100, "epochs": 1, "seed": 1}
    start = torch.nn.init.normal_(torch.empty(10, 64), std=0.01, generator=torch.Generator().manual_seed(1))
    found = fit_sgd_probe(pixels, *plain, 10, SGDProbeSettings("lars", learning_rate=1.0, **settings))
    # Two steps with momentum: at most (1 + 1.9) * 0.001 of the weight's norm, about.
    assert 0 < (found.head.weight - start).norm() < 0.0031 * start.norm()


def test_shuffled_labels_score_chance(plain):
    train, test = plain
    shuffled = train.variant()
    shuffled.labels = train.labels[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    shuffled._copies = {}
    assert fit_sgd_probe(pixels, train, test, 10, QUICK).accuracy > 0.7
    assert fit_sgd_probe(pixels, shuffled, test, 10, QUICK).accuracy < 0.35


def test_bad_settings_labels_and_rates_are_named(plain):
    train, test = plain
    for settings, message in (
        ({"epochs": 0}, "epochs=0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"optimizer": "adam"}, "choose sgd or lars"),
    ):
        with pytest.raises(InputError, match=message):
            SGDProbeSettings(**settings)
    with pytest.raises(InputError, match="diverged: give a lower one"):
        fit_sgd_probe(lambda x: 1e30 * x.flatten(1), train, test, 10, QUICK)
    unlabelled = test.variant()
    unlabelled.labels = None
    with pytest.raises(InputError, match="needs labels"):
        fit_sgd_probe(pixels, train, unlabelled, 10, QUICK)


# -- logistic regression as a layer ----------------------------------------------------------------


@pytest.mark.parametrize("classes", [10, 2])
def test_the_layer_is_the_regression_with_its_standardisation(plain, classes):
    known = everything(plain[0])
    kept = known["labels"] < classes
    features, labels = 3 + 5 * known["pixel_values"].flatten(1)[kept], known["labels"][kept]
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=1000))
    pipeline.fit(features.double().numpy(), labels.numpy())
    seen = 3 + 5 * everything(plain[1])["pixel_values"].flatten(1)
    wanted = torch.from_numpy(pipeline.predict_proba(seen.double().numpy()))
    head = fit_linear_probe(features, labels, classes)
    torch.testing.assert_close(head.logits(seen).softmax(1), wanted, atol=1e-9, rtol=1e-7)
    low = type(head)(*(value.float() for value in head)).logits(seen).softmax(1)
    torch.testing.assert_close(low.double(), wanted, atol=1e-4, rtol=1e-3)


def test_a_class_without_images_is_rare_and_the_others_are_as_without_it(plain):
    known = everything(plain[0])
    kept = known["labels"] != 4
    features, labels = known["pixel_values"].flatten(1)[kept], known["labels"][kept]
    head = fit_linear_probe(features, labels, 11, LinearProbeSettings(inverse_regularisation=0.1))
    assert head.weight.shape == (11, 64) and not head.weight[[4, 10]].any()
    assert head.logits(features).softmax(1)[:, [4, 10]].max() < 0.05
    without = fit_linear_probe(features, labels - (labels > 4).long(), 9, LinearProbeSettings(0.1))
    torch.testing.assert_close(head.weight[[0, 1, 2, 3, 5, 6, 7, 8, 9]], without.weight)
