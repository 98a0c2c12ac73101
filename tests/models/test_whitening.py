"""Whitened layer inputs: what is measured, what the raw weights mean, and that nothing else changes."""

import pytest
import torch
from gradient_models import NAMES, build, set_weights, trained_looking, weights
from tiny_classifiers import FAMILIES
from torch import nn
from transformers import AutoModelForImageClassification

from hfkd.errors import InputError
from hfkd.models import build_gradient_features
from hfkd.models.whitening import InputMoments, inverse_root


def random_root(size, seed=0):
    """A symmetric positive matrix that is far from the identity."""
    a = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return a @ a.T / size + torch.eye(size)


def fill_whitening(model):
    for number, root in enumerate(model.backbone.whitening.buffers()):
        root.copy_(random_root(len(root), number))


def test_the_root_by_hand():
    root = inverse_root(torch.diag(torch.tensor([6.0, 2.0, 1.0])), damping=1.0)  # of the mean 3: 2, 2/3 and 1/3
    expected = torch.diag(torch.tensor([3.0, 5 / 3, 4 / 3], dtype=torch.float64).rsqrt())
    torch.testing.assert_close(root, expected)


def test_the_root_whitens_and_does_not_depend_on_the_scale():
    moment = random_root(5)
    root = inverse_root(moment, damping=0.0)
    torch.testing.assert_close(root @ moment @ root, moment.diagonal().mean() * torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(inverse_root(1e6 * moment), inverse_root(moment))
    assert torch.equal(inverse_root(torch.zeros(3, 3)), torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3, padding=1), nn.Linear(3, 4)])
def test_moments_are_those_of_the_inputs_channels(layer):
    shape = (2, 3, 5, 5) if isinstance(layer, nn.Conv2d) else (2, 7, 3)
    first, second = torch.randn(shape), torch.randn(shape)
    with InputMoments({"name": layer}) as moments:
        layer(first)
        layer(input=second)
    layer(first)
    both = torch.cat([first, second])
    rows = both.permute(0, 2, 3, 1).reshape(-1, 3) if isinstance(layer, nn.Conv2d) else both.reshape(-1, 3)
    expected = sum(torch.outer(row, row) for row in rows.double())
    torch.testing.assert_close(moments.sums["name"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_raw_weights_stand_for_weights_times_the_root(name):
    """J (R P) of the whitened model is J W' of the plain one for W' = R P; and P is invertible, so nothing is lost."""
    base, images = trained_looking(name), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    plain, whitened = build(base), build(base, whiten=True)
    fill_whitening(whitened)
    set_weights(whitened, [torch.randn_like(w) for w in weights(whitened)])
    roots = dict(whitened.backbone.whitening.named_buffers())
    assert roots and set(roots) < set(whitened.config.theta2)
    raw = dict(whitened.backbone.gradient_weights.named_parameters())
    moved = {n: (w.movedim(1, -1) @ roots[n]).movedim(-1, 1) if n in roots else w for n, w in raw.items()}
    set_weights(plain, list(moved.values()))
    torch.testing.assert_close(whitened(images).logits, plain(images).logits, rtol=1e-9, atol=1e-9)


def test_convolutions_in_groups_are_left_out():
    model = build(trained_looking("convnext"), whiten=True)
    linear = {name for name, value in model.backbone.theta2().items() if value.dim() == 2}
    assert {name for name, _ in model.backbone.whitening.named_buffers()} == linear
    assert any(value.dim() == 4 for value in model.backbone.theta2().values())


def test_explicit_features_are_of_the_raw_weights():
    model = build(trained_looking("resnet"), whiten=True)
    fill_whitening(model)
    drawn = [torch.randn_like(w) for w in weights(model)]
    set_weights(model, drawn)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    tangent = model.backbone(images).tangent @ model.omega.T
    features = model.explicit_features(images)
    torch.testing.assert_close(features @ torch.cat([w.flatten() for w in drawn]), tangent, rtol=1e-9, atol=1e-9)


def test_the_roots_are_saved(tmp_path):
    model = build(trained_looking("resnet").float(), whiten=True)
    fill_whitening(model)
    set_weights(model, [torch.randn_like(w) for w in weights(model)])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images).logits, model.eval()(images).logits)
    assert loaded.config.whiten


@pytest.mark.parametrize("mode", ["activation", "finetune"])
def test_without_gradients_there_is_nothing_to_whiten(mode):
    with pytest.raises(ValueError, match="whiten=True has no effect with mode=.*: leave it out"):
        build_gradient_features(trained_looking("resnet"), class_names=NAMES, mode=mode, whiten=True)


def test_layers_without_anything_to_whiten():
    with pytest.raises(InputError, match="theta2 has no linear layer or ungrouped convolution"):
        build_gradient_features(trained_looking("resnet"), "*.bias", class_names=NAMES, whiten=True)
