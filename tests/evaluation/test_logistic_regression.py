"""The fit of omega: a stationary point of the loss it says it minimises, on features as they are."""

import logging
import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from hfkd.errors import InputError
from hfkd.evaluation import logistic_regression
from hfkd.evaluation.logistic_regression import fit_logistic_regression
from hfkd.losses.gradient_features import classification_loss


@pytest.fixture
def warnings_of_fit(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logistic_regression.logger, "propagate", True)
    return caplog


def data(classes=4, n=300, d=5):
    """Overlapping classes in features of unequal scale and offset, one of them constant."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, d, generator=generator, dtype=torch.float64)
    features = centres[labels] + torch.randn(n, d, generator=generator, dtype=torch.float64)
    features = features * torch.logspace(-2, 2, d, dtype=torch.float64) + torch.arange(d)
    features[:, 2] = 7.0
    return features, labels


def gradients(features, labels, weight, bias, weight_decay):
    """Of the mean loss with decay, by weight and bias of the features as they are."""
    w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    loss = classification_loss(F.linear(features, w, b), labels) * (labels.shape[1] if labels.dim() == 2 else 1)
    return torch.autograd.grad(loss + weight_decay * w.square().sum() / 2, (w, b))


def assert_stationary(features, labels, weight, bias, weight_decay):
    """1e-6 is of the size of a feature: its deviation is no less than the root of the curvature along it."""
    by_weight, by_bias = gradients(features, labels, weight, bias, weight_decay)
    centred = by_weight - torch.outer(by_bias, features.mean(0))
    assert (centred.abs() <= 1e-6 * (features.std(0).norm() + weight_decay**0.5)).all()
    assert by_bias.abs().max() < 1e-6


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("weight_decay", [1e-6, 1e-1])
@pytest.mark.parametrize("several", [False, True])
def test_gradient_of_the_regularised_loss_vanishes(classes, weight_decay, several):
    features, labels = data(classes)
    if several:
        labels = torch.stack([labels == k for k in range(classes)], dim=1).double()
    weight, bias = fit_logistic_regression(features, labels, classes, weight_decay)
    assert weight.shape == (classes, 5) and bias.shape == (classes,) and weight.dtype == torch.float64
    assert_stationary(features, labels, weight, bias, weight_decay)
    assert weight[:, 2].abs().max() == 0  # of the constant feature


@pytest.mark.parametrize("images", [200, 1797])
@pytest.mark.parametrize("decades", [0, 2])
@pytest.mark.parametrize("several", [False, True])
def test_the_optimum_is_reached_on_digits(images, decades, several, warnings_of_fit):
    """Separable ones too, and pixels of very unequal scale; to 1e-6 in each component, and so in the loss."""
    pixels, digits = load_digits(return_X_y=True)
    scale = torch.logspace(-decades, 0, 64, dtype=torch.float64)
    features, labels = torch.from_numpy(pixels[:images]) / 16 * scale, torch.from_numpy(digits[:images])
    targets = F.one_hot(labels, 10).double() if several else labels
    weight, bias = fit_logistic_regression(features, targets, 10, 1e-4)
    by_weight, by_bias = gradients(features, targets, weight, bias, 1e-4)
    assert by_weight.abs().max() < 1e-6 and by_bias.abs().max() < 1e-6
    assert not warnings_of_fit.records


def test_a_feature_that_almost_never_fires_gets_a_small_weight():
    """At the optimum w is the mean gradient over the decay: what one image in 300 adds to it is bounded by that."""
    features, labels = data()
    features = features.index_fill(1, torch.tensor([3]), 0.0)
    features[0, 3] = 1e-4
    weight, bias = fit_logistic_regression(features, labels, 4, 1e-4)
    assert weight[:, 3].abs().max() <= 1e-4 / 300 / 1e-4
    assert_stationary(features, labels, weight, bias, 1e-4)


@pytest.mark.parametrize("several", [False, True])
def test_a_class_without_images_is_rare(several):
    features, labels = data(3)
    targets = F.one_hot(labels, 5)[:, [0, 1, 3, 2, 4]] if several else torch.tensor([0, 1, 3])[labels]
    weight, bias = fit_logistic_regression(features, targets.double() if several else targets, 5)
    assert weight[[2, 4]].abs().max() == 0
    logits = features.mean(0) @ weight.T + bias
    probabilities = logits.sigmoid() if several else logits.softmax(0)
    rare = 0.5 / len(features)
    assert probabilities[[2, 4]].tolist() == pytest.approx([rare if several else rare / (1 + 2 * rare)] * 2)
    assert ((features @ weight.T + bias).argmax(1) != 2).all()


def test_a_label_of_every_image_is_almost_certain():
    features, labels = data(2)
    targets = torch.stack([labels.bool(), torch.ones_like(labels, dtype=torch.bool)], dim=1)
    _, bias = fit_logistic_regression(features, targets, 2)
    assert bias[1].item() == pytest.approx(math.log((len(features) - 0.5) / 0.5))


def test_a_fit_that_does_not_converge_warns_in_one_line(monkeypatch, warnings_of_fit):
    monkeypatch.setattr(logistic_regression, "MAX_ITERATIONS", 2)
    features, labels = data()
    fit_logistic_regression(features, labels, 4)
    (record,) = warnings_of_fit.records
    assert "has not converged in 2 iterations" in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, y: (x[:0], y[:0], 1.0), "N > 0"),
        (lambda x, y: (x, y[:-1], 1.0), "needs \\(N, d\\) features"),
        (lambda x, y: (x.flatten(), y, 1.0), "needs \\(N, d\\) features"),
        (lambda x, y: (x.index_fill(0, torch.tensor([3]), math.nan), y, 1.0), "NaN"),
        (lambda x, y: (x, y, 0.0), "weight_decay=0.0"),
        (lambda x, y: (x, torch.zeros_like(y), 1.0), "one class"),
    ],
)
def test_bad_input(spoil, message):
    features, labels, weight_decay = spoil(*data())
    with pytest.raises(InputError, match=message):
        fit_logistic_regression(features, labels, 4, weight_decay)
