"""FFL's fusion module: the documented layers, unequal maps, and a gradient for every map."""

import pytest
import torch
from torch import nn

from hfkd.models.fusion_module import FusionModule


def maps(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, *shape, generator=generator).relu() for shape in shapes]


def test_layers_and_size_of_the_released_code():
    """Two ResNets of CIFAR: 128 channels in, 64 out."""
    module = FusionModule([(64, 8, 8), (64, 8, 8)], 100)
    depthwise, pointwise = (layer for layer in module.layers if isinstance(layer, nn.Conv2d))
    assert (depthwise.groups, depthwise.kernel_size, depthwise.weight.shape) == (128, (3, 3), (128, 1, 3, 3))
    assert pointwise.weight.shape == (64, 128, 1, 1)
    assert sum(p.numel() for p in module.parameters()) == 128 * 9 + 2 * 128 + 128 * 64 + 2 * 64 + 65 * 100
    assert depthwise.weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.1)
    assert pointwise.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.1)


@pytest.mark.parametrize("shapes", [((4, 6, 6), (4, 6, 6)), ((4, 6, 6), (6, 3, 3), (2, 6, 5))])
def test_logits_of_maps_of_any_shape(shapes):
    module, given = FusionModule(shapes, 5), [one.requires_grad_() for one in maps(*shapes)]
    logits = module(given)
    assert logits.shape == (3, 5)
    logits.square().sum().backward()
    assert all(one.grad.abs().sum() > 0 for one in given)
    assert all(p.grad.abs().sum() > 0 for p in module.parameters())


def test_larger_maps_are_averaged_to_the_smallest():
    module = FusionModule([(4, 6, 6), (2, 3, 3)], 5).eval()
    large, small = maps((4, 6, 6), (2, 3, 3))
    torch.testing.assert_close(module([large, small]), module([nn.AvgPool2d(2)(large), small]))


def test_the_order_of_the_networks_counts():
    module, (a, b) = FusionModule([(4, 3, 3), (4, 3, 3)], 5).eval(), maps((4, 3, 3), (4, 3, 3))
    assert not torch.allclose(module([a, b]), module([b, a]))
