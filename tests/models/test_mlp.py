"""Fully connected classifiers: layers, biases, initial weights, what they refuse, and what else works on them."""

import math

import pytest
import torch
from torch import nn

from hfkd.models import ClassifierAdapter, HfkdMlpConfig, HfkdMlpForImageClassification, HfkdMlpModel


TINY = {"num_channels": 1, "image_size": 4, "hidden_sizes": [6, 5], "num_labels": 3}


def mlp(**settings):
    return HfkdMlpForImageClassification(HfkdMlpConfig(**(TINY | settings))).eval()


def linears(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize(
    ("settings", "biases", "norms"),
    [
        ({}, [True, True, True], 0),
        ({"bias": "first"}, [True, False, False], 0),
        ({"bias": "none"}, [False, False, False], 0),
        ({"norm": "batch"}, [False, False, True], 2),
        ({"norm": "batch", "bias": "none"}, [False, False, False], 2),
    ],
)
def test_layers(settings, biases, norms):
    model = mlp(**settings)
    assert [(linear.in_features, linear.out_features) for linear in linears(model)] == [(16, 6), (6, 5), (5, 3)]
    assert [linear.bias is not None for linear in linears(model)] == biases
    assert sum(isinstance(module, nn.BatchNorm1d) for module in model.modules()) == norms
    batch = torch.randn(7, 1, 4, 4)
    model.train()(batch, labels=torch.arange(7) % 3).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_forward_is_the_formula():
    model = mlp()
    images = torch.randn(7, 1, 4, 4)
    (w1, b1), (w2, b2), (w3, b3) = ((layer.weight, layer.bias) for layer in linears(model))
    with torch.no_grad():
        for bias in (b1, b2, b3):
            bias.normal_()
    hidden = (images.flatten(1) @ w1.T + b1).relu()
    last = (hidden @ w2.T + b2).relu()
    output = model.base_model(images, output_hidden_states=True)
    torch.testing.assert_close(output.hidden_states[1], hidden)
    torch.testing.assert_close(output.pooler_output, last)
    assert torch.equal(output.last_hidden_state, output.pooler_output[:, :, None, None])
    torch.testing.assert_close(model(images).logits, last @ w3.T + b3)


def test_without_biases_it_is_homogeneous_of_the_number_of_layers():
    model, images = mlp(bias="none").double(), torch.randn(7, 1, 4, 4, dtype=torch.float64)
    before = model(images).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.7)
    torch.testing.assert_close(model(images).logits, 1.7**3 * before)


def test_fresh_weights_are_kaimings_times_their_scales():
    scales = [0.05, 1.0, 2.0]
    model = mlp(image_size=8, hidden_sizes=[100, 200], num_labels=50, initial_scales=scales)
    for linear, scale in zip(linears(model), scales, strict=True):
        expected = scale * math.sqrt(2 / linear.in_features)
        assert linear.weight.std().item() == pytest.approx(expected, rel=5 / linear.weight.numel() ** 0.5)
        assert not linear.bias.any()


def test_grey_networks_average_three_channels():
    model, grey = mlp(), torch.randn(2, 1, 4, 4)
    torch.testing.assert_close(model(grey.expand(-1, 3, -1, -1)).logits, model(grey).logits)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 5, 4), "images of 5x4 pixels do not fit HfkdMlpModel, which was built with image_size=4"),
        ((1, 1, 3, 3), "images of 3x3 pixels do not fit"),
        ((1, 2, 4, 4), "2 channels"),
        ((1, 16), "expected"),
    ],
)
def test_unfit_images_are_refused(shape, message):
    with pytest.raises(ValueError, match=message) as caught:
        mlp()(torch.zeros(shape))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_sizes": []}, "hidden_sizes=.. must hold one or more"),
        ({"hidden_sizes": [4, 0]}, "each at least 1"),
        ({"bias": "last"}, "bias='last' is unknown"),
        ({"norm": "group"}, "norm='group' is unknown: choose one of batch, none"),
        ({"norm": "batch", "bias": "first"}, "batch norm cancels it"),
        ({"initial_scales": [1.0]}, "must be 3 numbers above 0"),
        ({"initial_scales": [1.0, 0.0, 1.0]}, "must be 3 numbers above 0"),
    ],
)
def test_unfit_fields_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        HfkdMlpConfig(**(TINY | settings))


def test_saving_keeps_everything(tmp_path):
    model = mlp(norm="batch", bias="none", initial_scales=[0.5, 1.0, 1.0])
    model.save_pretrained(tmp_path)
    loaded = HfkdMlpForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.initial_scales == [0.5, 1.0, 1.0] and loaded.config.hidden_sizes == [6, 5]
    images = torch.randn(3, 1, 4, 4)
    assert torch.equal(loaded(images).logits, model(images).logits)
    backbone = HfkdMlpModel.from_pretrained(tmp_path)
    assert torch.equal(backbone(images).pooler_output, model.base_model(images).pooler_output)


def test_adapter_finds_its_parts():
    model = mlp()
    adapter = ClassifierAdapter(model)
    features = adapter(torch.randn(2, 1, 4, 4))
    assert features.feature_map.shape == (2, 5, 1, 1) and features.pooled.shape == (2, 5)
    assert adapter.feature_shape(4) == (5, 1, 1) and adapter.classifier is model.classifier
    assert [name for name, _ in adapter.top_blocks(2)] == ["backbone.stages.0.0", "backbone.stages.1.0"]
