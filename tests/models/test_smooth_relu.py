"""Smooth gates: the same values, the gradients of a softplus to every order, in every spelling of ReLU."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfkd.errors import InputError
from hfkd.models.smooth_relu import smooth_relu_gates


SLOPE, SHARPNESS = 0.2, 5.0
SPELLINGS = {
    "nn.ReLU": (nn.ReLU(), 0.0),
    "nn.ReLU in place": (nn.ReLU(inplace=True), 0.0),
    "F.relu": (F.relu, 0.0),
    "F.relu in place": (lambda x: F.relu(x, inplace=True), 0.0),
    "F.relu_": (F.relu_, 0.0),
    "torch.relu": (torch.relu, 0.0),
    "Tensor.relu": (Tensor.relu, 0.0),
    "Tensor.relu_": (Tensor.relu_, 0.0),
    "nn.LeakyReLU": (nn.LeakyReLU(SLOPE), SLOPE),
    "nn.LeakyReLU in place": (nn.LeakyReLU(SLOPE, inplace=True), SLOPE),
    "F.leaky_relu": (F.leaky_relu, 0.01),
    "F.leaky_relu_": (lambda x: F.leaky_relu_(x, SLOPE), SLOPE),
    "_nn.leaky_relu": (lambda x: torch._C._nn.leaky_relu(x, SLOPE), SLOPE),
}


@pytest.fixture(params=SPELLINGS)
def spelling(request):
    return SPELLINGS[request.param]


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 7, dtype=torch.float64, generator=generator).requires_grad_()


def softplus(x, slope):
    """Whose gradient is the smooth gate."""
    return slope * x + (1 - slope) * F.softplus(x, beta=SHARPNESS, threshold=1e9)


def derivatives(activation, x):
    """Gradients of first and second order of a weighted sum; in-place activations need a copy of their own."""
    weights = torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x)
    (first,) = torch.autograd.grad((weights * activation(x * 1)).sum(), x, create_graph=True)
    second = torch.autograd.grad(first.square().sum(), x)[0] if first.requires_grad else torch.zeros_like(x)
    return first.detach(), second


def test_values_stay_and_gates_are_smooth(spelling, inputs):
    activation, slope = spelling
    expected = activation(inputs * 1)
    with smooth_relu_gates(SHARPNESS):
        assert torch.equal(activation(inputs * 1), expected)
        inside = derivatives(activation, inputs)
    torch.testing.assert_close(inside, derivatives(lambda x: softplus(x, slope), inputs), rtol=0, atol=1e-12)
    assert inside[1].abs().max() > 0.1
    assert derivatives(activation, inputs)[1].abs().max() == 0  # and true outside


def test_in_place_activations_write_where_they_should(inputs):
    hidden = inputs * 1
    with smooth_relu_gates(SHARPNESS):
        returned = F.relu_(hidden)
    assert returned is hidden and hidden.min() == 0
    (gradient,) = torch.autograd.grad(hidden.sum(), inputs)
    torch.testing.assert_close(gradient, torch.sigmoid(SHARPNESS * inputs), rtol=0, atol=1e-14)


def test_gradient_is_differentiable_to_second_order(spelling, inputs):
    activation, _ = spelling

    def smooth(x):
        with smooth_relu_gates(SHARPNESS):
            return activation(x * 1)

    assert torch.autograd.gradgradcheck(smooth, (inputs,))
    # Off the kink, a sharp gate is the true one: there values and gradients agree.
    far = (inputs.detach() + inputs.detach().sign()).requires_grad_()
    with smooth_relu_gates(100.0):
        assert torch.autograd.gradcheck(lambda x: activation(x * 1), (far,))


def test_gradients_of_gradients_see_the_input(inputs):
    """What it is for: d loss / d weight of a ReLU layer depends smoothly on the input."""
    weight = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def gate_part(sharpness):
        with smooth_relu_gates(sharpness):
            hidden = torch.relu(inputs @ weight.T)
        (gradient,) = torch.autograd.grad(hidden.sum(), weight, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), inputs)[0]

    smooth, by_hand = gate_part(SHARPNESS), inputs.detach().clone().requires_grad_()
    gradient = torch.sigmoid(SHARPNESS * by_hand @ weight.detach().T).T @ by_hand
    (expected,) = torch.autograd.grad(gradient.square().sum(), by_hand)
    torch.testing.assert_close(smooth, expected, rtol=0, atol=1e-12)
    assert (smooth - gate_part(None)).abs().max() > 0.1


def test_the_context_ends_with_its_block(inputs):
    true_gates = (inputs > 0).double()

    def gates():
        return torch.autograd.grad(torch.relu(inputs).sum(), inputs)[0]

    with pytest.raises(KeyError), smooth_relu_gates(SHARPNESS):
        raise KeyError
    assert torch.equal(gates(), true_gates)
    with smooth_relu_gates(None):
        assert torch.equal(gates(), true_gates)
    with smooth_relu_gates(SHARPNESS), smooth_relu_gates(2 * SHARPNESS):
        torch.testing.assert_close(gates(), torch.sigmoid(2 * SHARPNESS * inputs), rtol=0, atol=1e-14)
    with smooth_relu_gates(SHARPNESS):
        hidden = torch.relu(inputs)
    (later,) = torch.autograd.grad(hidden.sum(), inputs)
    torch.testing.assert_close(later, torch.sigmoid(SHARPNESS * inputs), rtol=0, atol=1e-14)


def test_networks_of_transformers_are_caught(classifier):
    classifier.eval()
    images = torch.randn(2, 3, 32, 32).requires_grad_()

    def logits_and_gradient(sharpness):
        with smooth_relu_gates(sharpness):
            logits = classifier(images).logits
        return logits, torch.autograd.grad(logits[:, 0].sum(), images)[0]

    (logits, true), (same, smooth) = logits_and_gradient(None), logits_and_gradient(1.0)
    assert torch.equal(logits, same)
    has_relu = any(isinstance(module, nn.ReLU) for module in classifier.modules())
    assert torch.equal(true, smooth) != has_relu


@pytest.mark.parametrize("sharpness", [0.0, -1.0, float("nan")])
def test_bad_sharpness(sharpness):
    with pytest.raises(InputError, match="sharpness") as caught:
        smooth_relu_gates(sharpness)
    assert "\n" not in str(caught.value)
