"""Fast layers against `torch.func.jvp` as PyTorch has it, and what they cost."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jvp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hfkd.models import HfkdResNetConfig, HfkdResNetForImageClassification, build_gradient_features
from hfkd.models.modeling_resnet import HfkdResNetBlock
from hfkd.models.tangents import FastLayers


def chain(k, kernel_size=3, padding=1, groups=1):
    layers = [
        layer
        for _ in range(k)
        for layer in (nn.Conv2d(8, 8, kernel_size, padding=padding, groups=groups), nn.LeakyReLU(0.1))
    ]
    return nn.Sequential(*layers)


def block(in_channels, out_channels, stride):
    config = HfkdResNetConfig(norm="none", shortcut="B")
    return HfkdResNetBlock(config, in_channels, out_channels, stride)


NETWORKS = {
    "K=1": lambda: chain(1),
    "K=2": lambda: chain(2),
    "K=3": lambda: chain(3),
    "grouped": lambda: chain(2, groups=4),
    "strided, with names": lambda: nn.Sequential(nn.Conv2d(8, 6, 3, stride=2, padding="valid", dilation=2), nn.ReLU()),
    "no bias": lambda: nn.Sequential(nn.Conv2d(8, 6, 3, bias=False), nn.ReLU(), nn.Conv2d(6, 5, 3, bias=False)),
    "identity shortcut": lambda: block(8, 8, 1),
    "projected shortcut": lambda: block(8, 12, 2),
    "whole map": lambda: nn.Sequential(nn.Conv2d(8, 7, 5), nn.LeakyReLU(0.1), nn.Conv2d(7, 6, 4), nn.Flatten()),
    "whole map, padded": lambda: nn.Sequential(nn.Conv2d(8, 7, 8, padding=1), nn.ReLU()),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(512, 6), nn.GELU(), nn.Linear(6, 4)),
}
PARTS = {"all": lambda names: names, "weights": lambda names: [n for n in names if n.endswith("weight")]}


def parameters_of(network, names):
    """theta_2 and w2 by name; nothing but w2 is trained."""
    network.double().requires_grad_(False)
    theta2 = {name: network.get_parameter(name) for name in names}
    return theta2, {name: torch.randn_like(value).requires_grad_() for name, value in theta2.items()}


def derivative(network, images, theta2, w2):
    return jvp(lambda values: functional_call(network, values, (images,)), (theta2,), (w2,))


@pytest.fixture
def images():
    return torch.randn(3, 8, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("network", NETWORKS)
def test_values_tangents_and_gradients_are_those_of_jvp(network, part, layout, images):
    network = NETWORKS[network]().to(memory_format=layout)
    images = images.to(memory_format=layout)
    theta2, w2 = parameters_of(network, PARTS[part]([name for name, _ in network.named_parameters()]))
    with FastLayers():
        fast = derivative(network, images, theta2, w2)
    slow = derivative(network, images, theta2, w2)
    gradients = [torch.autograd.grad(tangent.square().sum(), list(w2.values())) for _, tangent in (fast, slow)]

    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    assert not fast[0].requires_grad


@pytest.mark.parametrize("names", [["2.weight"], ["0.bias"], ["0.weight", "4.bias"]])
def test_layers_between_and_above_may_be_fixed(names, images):
    network = chain(3)
    theta2, w2 = parameters_of(network, names)
    with FastLayers():
        fast = derivative(network, images, theta2, w2)
    torch.testing.assert_close(fast, derivative(network, images, theta2, w2), rtol=1e-12, atol=1e-12)


def test_derivatives_nest(images):
    network = chain(2)
    theta2, w2 = parameters_of(network, ["0.weight", "2.weight"])

    def tangent(pixels):
        return derivative(network, pixels, theta2, w2)[1]

    direction = torch.randn_like(images)
    with FastLayers():
        fast = jvp(tangent, (images,), (direction,))
    torch.testing.assert_close(fast, jvp(tangent, (images,), (direction,)), rtol=1e-12, atol=1e-12)


def test_autocast(images):
    network = chain(2)
    theta2, w2 = parameters_of(network, [name for name, _ in network.named_parameters()])
    network.float()
    single = [{name: value.detach().float() for name, value in values.items()} for values in (theta2, w2)]
    with torch.autocast("cpu", torch.bfloat16):
        slow = derivative(network, images.float(), *single)
        with FastLayers():
            fast = derivative(network, images.float(), *single)
    assert fast[1].dtype == torch.bfloat16
    torch.testing.assert_close(fast, slow, rtol=0.02, atol=0.02)


def test_without_derivatives_layers_are_those_of_pytorch(images):
    network = nn.Sequential(nn.Conv2d(8, 7, 3, padding=1), nn.Conv2d(7, 6, 8)).double()
    with FastLayers():
        torch.testing.assert_close(network(images), network(images).detach(), rtol=0, atol=0)
        fast = network(images)
    torch.testing.assert_close(fast, network(images), rtol=1e-12, atol=1e-12)


# -- cost ------------------------------------------------------------------------------------------------------------


def multiply_adds(network, images, k):
    theta2, w2 = parameters_of(network, [name for name, _ in network.named_parameters()])
    with FlopCounterMode(display=False) as counter:
        derivative(network, images, theta2, w2)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("k", [1, 2, 3])
def test_costs_3k_minus_1_layers(k, images):
    one_convolution = 3 * 8 * 64 * 8 * 9
    with FastLayers():
        assert multiply_adds(chain(k), images, k) == (3 * k - 1) * one_convolution
    assert multiply_adds(chain(k), images, k) == 3 * k * one_convolution  # PyTorch's own rule

    one_linear = 3 * 512 * 512
    network = nn.Sequential(nn.Flatten(), *(nn.Linear(512, 512) for _ in range(k)))
    with FastLayers():
        assert multiply_adds(network, images, k) == (3 * k - 1) * one_linear


class Allocations(TorchDispatchMode):
    """Bytes of all outputs of all operations, an upper bound of what is in memory at any time."""

    def __init__(self):
        super().__init__()
        self.bytes, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if torch.is_tensor(tensor):
                self.bytes += tensor.nbytes
                self.largest = max(self.largest, tensor.nbytes)
        return result


def test_memory_of_a_step_grows_with_the_classes_by_no_more_than_their_logits():
    used = {}
    for classes in (2, 202):
        base = HfkdResNetForImageClassification(HfkdResNetConfig(depths=[1, 1], hidden_sizes=[8, 16]))
        model = build_gradient_features(base.eval(), class_names=[str(k) for k in range(classes)])
        with Allocations() as used[classes]:
            F.cross_entropy(model(torch.randn(4, 3, 32, 32)).logits, torch.zeros(4, dtype=torch.long)).backward()
    head = 200 * (16 + 4 + 1) * 4  # weights (c, d), logits (n, c) and biases (c,)
    explicit = 200 * 4 * sum(parameter.nbytes for parameter in model.backbone.theta2().values())  # (n, c, |theta_2|)
    assert used[202].largest == used[2].largest
    assert 0 < used[202].bytes - used[2].bytes < 20 * head < explicit / 10
