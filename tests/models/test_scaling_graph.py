"""What tracing refuses, and by which name: layers without a rule, contradictions, models that are no classifiers."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hfkd.errors import InputError
from hfkd.models.scaling_exponents import rescale, solve_exponents


class Forward(nn.Module):
    """Two linear layers with `function(first(x), x)` between them."""

    def __init__(self, function):
        super().__init__()
        self.first, self.head, self.function = nn.Linear(4, 4), nn.Linear(4, 4), function

    def forward(self, x):
        return self.head(self.function(self.first(x), x))


INNER = "the forward pass of Forward: "
REFUSED = {
    "gelu": (lambda h, x: F.gelu(h), INNER + "gelu has no scaling rule"),
    "module": (nn.GELU(), r"module 'function' \(GELU\): gelu has no scaling rule"),
    "layer_norm": (nn.LayerNorm(4), r"module 'function' \(LayerNorm\): layer_norm has no scaling rule"),
    "softmax": (lambda h, x: h.softmax(1), INNER + "softmax has no scaling rule"),
    "relu6": (lambda h, x: h.clamp(0, 6), INNER + r"clamp to \[0, 6\] has no"),
    "padding": (lambda h, x: F.pad(h, (1, 1), value=1.0)[:, :4], INNER + "pad with 1.0 has no"),
    "gate": (lambda h, x: h * h, INNER + "mul of two activations has no"),
    "quotient": (lambda h, x: x / h, INNER + "div by what is no constant has no"),
    "branch": (lambda h, x: h if h.sum() > 0 else -h, "Forward cannot be traced on input of shape 1x4: "),
}


class OneArgument(nn.Module):
    """Calls a module with the first of two arguments."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, h, x):
        return self.module(h)


@pytest.mark.parametrize("case", REFUSED)
def test_layers_without_a_rule_are_named(case):
    function, message = REFUSED[case]
    if isinstance(function, nn.Module):
        function, message = OneArgument(function), message.replace("function", "function.module")
    with pytest.raises(InputError, match=message) as caught:
        solve_exponents(Forward(function), torch.randn(1, 4))
    assert "\n" not in str(caught.value)


def test_transformers_are_refused_by_module(make_classifier):
    with pytest.raises(InputError, match=r"module 'vit\.layers\.0\.layernorm_before' \(LayerNorm\): layer_norm has"):
        solve_exponents(make_classifier("vit"), torch.randn(1, 3, 32, 32))


def test_constant_added_to_activations_is_a_contradiction():
    with pytest.raises(InputError, match="add in the forward pass of Forward"):
        solve_exponents(Forward(lambda h, x: h + 1), torch.randn(1, 4), {"first.weight": 0.5})


def test_tied_parameters_count_as_often_as_they_are_used():
    model = Forward(lambda h, x: h.relu()).double()
    model.head.weight = model.first.weight
    x = torch.randn(3, 4, dtype=torch.float64)
    found = solve_exponents(model, x)
    assert found.exponents == pytest.approx({"first.weight": 0.5, "first.bias": 0.5, "head.bias": 1})
    torch.testing.assert_close(rescale(model, found, 0.7)(x), math.exp(0.7) * model(x), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("model", "pinned", "message"),
    [
        (Forward(lambda h, x: torch.ones(1, 4)), None, "the logits of Forward do not depend on the image"),
        (Forward(lambda h, x: h), {"fc.weight": 0.0}, "'fc.weight': Forward has no such parameter"),
    ],
)
def test_bad_input(model, pinned, message):
    with pytest.raises(InputError, match=message):
        solve_exponents(model, torch.randn(1, 4), pinned)


def test_models_without_logits(make_classifier):
    with pytest.raises(InputError, match="ResNetModel gives no logits"):
        solve_exponents(make_classifier("resnet").resnet, torch.randn(1, 3, 32, 32))
