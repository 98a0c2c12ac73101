"""Scaling exponents of networks that are written only here: identities, the table of the specification, refusals."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hfkd.errors import InputError
from hfkd.models import HfkdResNetConfig, HfkdResNetForImageClassification
from hfkd.models.scaling_exponents import rescale, solve_exponents


NO_EPS = 1e-30  # lost in the rounding of any variance; PyTorch refuses a plain 0 with batch statistics
BIASES = {"none": (False, False, False), "first": (True, False, False), "all": (True, True, True)}


class Mlp(nn.Module):
    """Three linear layers, with or without biases and batch norm."""

    def __init__(self, bias="all", norm=False, batch_statistics=False):
        super().__init__()
        first, second, third = BIASES[bias]
        self.fc1, self.fc2, self.fc3 = nn.Linear(5, 7, first), nn.Linear(7, 6, second), nn.Linear(6, 4, third)
        for name, width in (("norm1", 7), ("norm2", 6)):
            layer = nn.BatchNorm1d(width, eps=NO_EPS, track_running_stats=not batch_statistics)
            self.add_module(name, layer if norm else nn.Identity())

    def forward(self, x):
        x = F.relu(self.norm1(self.fc1(x)))
        return self.fc3(torch.relu(self.norm2(self.fc2(x))))


class Residual(nn.Module):
    """A projected branch sum, an identity shortcut, functional and in-place activations."""

    def __init__(self):
        super().__init__()
        self.stem, self.projection, self.head = nn.Linear(5, 6), nn.Linear(6, 7, bias=False), nn.Linear(7, 3)
        self.branch = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 7))
        self.second = nn.Linear(7, 7)

    def forward(self, x):
        x = self.stem(x).relu_()
        x = F.leaky_relu(sum([self.branch(x), self.projection(x)]), 0.1)
        y = self.second(x)
        y += x
        return self.head(y)


class Convolutions(nn.Module):
    """Every kind of layer that has a rule and is not in the other networks."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(2, 4, 3, padding="same"), nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.groups, self.slopes = nn.GroupNorm(2, 4, eps=NO_EPS), nn.PReLU(3)
        self.scale, self.shift = nn.Parameter(torch.ones(3, 1, 1)), nn.Parameter(torch.zeros(3, 1, 1))
        self.mixing = nn.Parameter(torch.ones(5, 27))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = (x - 0.3) / 0.7  # of degree 0, as the image
        x = F.max_pool2d(self.groups(self.down(x)), 2)
        x = self.slopes(self.up(x.clamp(min=0)))
        x = F.pad(self.scale * x + self.shift, (1, 1, 0, 0)) * 2
        x = F.adaptive_avg_pool2d(F.avg_pool2d(x, 2).permute(0, 1, 3, 2), 3)
        return self.drop(x.flatten(1)) @ self.mixing.t() / 3


class Concatenated(nn.Module):
    """Two branches side by side, and one layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(5, 3), nn.Linear(5, 3, bias=False)
        self.twice, self.head = nn.Linear(6, 6, bias=False), nn.Linear(6, 4)

    def forward(self, x):
        x = torch.cat([self.left(x).relu(), F.relu(self.right(x))], dim=1)
        for _ in range(2):
            x = self.twice(x).relu()
        first, second = x.chunk(2, dim=1)
        return self.head(torch.stack([first, second], 1).reshape(len(x), 6))


def resnet(norm, depths=(1, 1, 1), shortcut="B"):
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 6, 8], "depths": depths}
    config = HfkdResNetConfig(**sizes, norm=norm, shortcut=shortcut, num_labels=3)
    model = HfkdResNetForImageClassification(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            module.eps = NO_EPS
    return model


def scrambled(model):
    """Random values in every tensor, running variances positive; float64."""
    model.double()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                tensor.normal_(std=1 / math.sqrt(max(tensor[0].numel(), 1)))
                if name.endswith("running_var"):
                    tensor.abs_().add_(0.5)
    return model.eval()


def logits(model, x):
    output = model(x)
    return getattr(output, "logits", output)


def identity_error(model, x, exponents, a):
    """Largest error of f(psi_a theta; x) = e^a f(theta; x), relative to the largest logit."""
    with torch.no_grad():
        expected = math.exp(a) * logits(model, x)
        return float((logits(rescale(model, exponents, a), x) - expected).abs().max() / expected.abs().max())


NETWORKS = {
    **{f"mlp_{bias}": lambda bias=bias: Mlp(bias) for bias in BIASES},
    **{f"mlp_{bias}_norm": lambda bias=bias: Mlp(bias, norm=True) for bias in BIASES},
    **{f"mlp_{bias}_batch": lambda bias=bias: Mlp(bias, norm=True, batch_statistics=True) for bias in BIASES},
    "residual": Residual,
    "convolutions": Convolutions,
    "concatenated": Concatenated,
    "resnet_none": lambda: resnet("none"),
    "resnet_batch": lambda: resnet("batch", depths=(1, 1, 2)),
    "resnet_group": lambda: resnet("group", shortcut="A"),
}
IMAGES = {"convolutions": (2, 8, 8), "resnet_none": (3, 8, 8), "resnet_batch": (3, 8, 8), "resnet_group": (3, 8, 8)}


@pytest.fixture(params=NETWORKS)
def network(request):
    model = scrambled(NETWORKS[request.param]())
    return model, torch.randn(6, *IMAGES.get(request.param, (5,)), dtype=torch.float64)


def mixture_gradients(model, x):
    """A fixed mixture of the logits, and its gradient in every parameter."""
    outputs = logits(model, x)
    mixture = (outputs * torch.linspace(-1, 2, outputs.numel(), dtype=outputs.dtype).view_as(outputs)).sum()
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(mixture, [*parameters.values()], materialize_grads=True)
    return mixture.detach(), dict(zip(parameters, found, strict=True))


def test_identities(network):
    """The definition; and that gradients then scale as e^(a (1 - lambda))."""
    model, x = network
    found = solve_exponents(model, x)
    assert all(identity_error(model, x, found, a) < 1e-10 for a in (-1.0, 0.7))
    before, after = mixture_gradients(model, x)[1], mixture_gradients(rescale(model, found, 0.7), x)[1]
    largest = max(float(gradient.abs().max()) for gradient in before.values())
    for name, exponent in found.exponents.items():
        expected = math.exp(0.7 * (1 - exponent)) * before[name]
        assert (after[name] - expected).abs().max() < 1e-10 * largest


# The remaining network's running statistics have exponents too, and autograd does not differentiate in them.
@pytest.mark.parametrize("network", [name for name in NETWORKS if name != "resnet_batch"], indirect=True)
def test_euler(network):
    """The sum of lambda theta df / dtheta is f."""
    model, x = network
    found = solve_exponents(model, x)
    assert not any(found.statistics.values())
    value, gradients = mixture_gradients(model, x)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    euler = sum(e * (parameters[name] * gradients[name]).sum() for name, e in found.exponents.items())
    assert (euler - value).abs() < 1e-10 * value.abs()


def test_wrong_exponents_break_the_identity():
    model, x = scrambled(Mlp("all")), torch.randn(6, 5, dtype=torch.float64)
    right = solve_exponents(model, x)
    wrong = dataclasses.replace(right, exponents={**right.exponents, "fc2.bias": 1 / 3})
    assert identity_error(model, x, wrong, 0.7) > 1e-3


def test_weights_before_batch_statistics_may_have_any_exponent():
    model = scrambled(Mlp("all", norm=True, batch_statistics=True))
    x = torch.randn(6, 5, dtype=torch.float64)
    found = solve_exponents(model, x)
    other = dataclasses.replace(found, exponents={**found.exponents, "fc1.weight": 5.0, "fc2.weight": 5.0})
    assert identity_error(model, x, other, 0.7) < 1e-10


THIRD, HALF = 1 / 3, 1 / 2
# Exponents in the order W1 b1 g1 c1 W2 b2 g2 c2 W3 b3 as far as the network has them, and the core set.
TABLE = [
    ("none", False, [THIRD] * 3, ["fc1.weight", "fc2.weight", "fc3.weight"]),
    ("first", False, [THIRD] * 4, ["fc1.weight", "fc1.bias", "fc2.weight", "fc3.weight"]),
    ("all", False, [THIRD] * 3 + [2 / 3, THIRD, 1], ["fc1.weight", "fc1.bias", "fc2.weight", "fc3.weight"]),
    ("all", True, [0] * 6 + [HALF] * 3 + [1], ["norm2.weight", "norm2.bias", "fc3.weight"]),
]
ORDER = [f"{layer}{k}.{kind}" for k in (1, 2, 3) for layer in ("fc", "norm") for kind in ("weight", "bias")]


def in_order(names):
    return [name for name in ORDER if name in names]


@pytest.mark.parametrize(("bias", "norm", "exponents", "core"), TABLE)
def test_exact_table(bias, norm, exponents, core):
    found = solve_exponents(Mlp(bias, norm), torch.zeros(1, 5))
    values = [found.exponents[name] for name in in_order(found.exponents)]
    assert values == pytest.approx(exponents, abs=1e-12)
    assert set(found.core) == set(core)
    free = {"fc1.bias", "fc2.bias"} if norm else set()
    assert set(found.free) == free
    low = {name for name, value in zip(in_order(found.exponents), exponents, strict=True) if value < exponents[-2]}
    assert norm is False or set(found.zero_force) == low - free
    assert set(found.above) == {n for n in ("fc2.bias", "fc3.bias") if n in found.exponents} - free - set(core)


def test_pinned_norms_leave_the_last_layer():
    pinned = {f"norm{k}.{kind}": 0.0 for k in (1, 2) for kind in ("weight", "bias")}
    found = solve_exponents(Mlp("all", norm=True), torch.zeros(1, 5), pinned)
    last = {"fc3.weight", "fc3.bias"}
    assert {n: round(v, 12) for n, v in found.exponents.items()} == {n: float(n in last) for n in found.exponents}
    assert set(found.core) == last


def test_residual_network_without_norms():
    """Identity shortcuts leave their branch no exponent; stem, projections and classifier share the degree of 1."""
    found = solve_exponents(resnet("none"), torch.zeros(1, 3, 8, 8))
    weights = {n: v for n, v in found.exponents.items() if n.endswith("weight")}
    stages = "backbone.stages"
    expected = dict.fromkeys(weights, 1 / 8)
    expected |= {f"{stages}.0.0.branch.{k}.weight": 0 for k in (0, 3)}
    quarter = ["backbone.stem.0", f"{stages}.1.0.shortcut.0", f"{stages}.2.0.shortcut.0", "classifier"]
    expected |= {f"{name}.weight": 1 / 4 for name in quarter}
    assert weights == pytest.approx(expected, abs=1e-9)
    biases = {"backbone.stem.0.bias", *(f"{stages}.0.0.branch.{k}.bias" for k in (0, 3))}
    assert set(found.core) == {f"{name}.weight" for name in quarter} | biases
    assert set(found.zero_force) == {n for n in weights if weights[n] < 0.2}
    assert found.free == ()


def test_residual_network_with_batch_norm():
    """The last stage's norms, which one sum ties together, and the classifier; running statistics scale along."""
    found = solve_exponents(resnet("batch", depths=(1, 1, 2)), torch.zeros(1, 3, 8, 8))
    stage = "backbone.stages.2"
    last = [f"{stage}.{name}" for name in ("0.branch.4", "0.shortcut.1", "1.branch.4")]
    moving = {name: exponent for name, exponent in found.statistics.items() if exponent}
    assert moving == {f"{stage}.1.branch.1.running_mean": 0.5, f"{stage}.1.branch.1.running_var": 1.0}
    core = {"classifier.weight", *(f"{name}.{kind}" for name in last for kind in ("weight", "bias"))}
    assert set(found.core) == core
    assert found.above == ("classifier.bias",)
    assert all(found.exponents[name] == 0 for name in found.zero_force)


def test_a_level_that_the_network_can_do_without_is_no_core():
    """A single linear layer beside a chain of three has the exponent 1, but the chain alone can classify."""

    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.chain, self.short = Mlp("none"), nn.Linear(5, 4, bias=False)

        def forward(self, x):
            return self.chain(x) + self.short(x)

    found = solve_exponents(Parallel(), torch.zeros(1, 5))
    assert found.above == ("short.weight",)
    assert found.core == tuple(f"chain.fc{k}.weight" for k in (1, 2, 3))


def test_parameters_without_effect():
    """Their gradients are zero, and weights before batch statistics have none along themselves."""
    model = scrambled(Mlp("all", norm=True, batch_statistics=True))
    model.idle = nn.Parameter(torch.ones(3, dtype=torch.float64))
    x = torch.randn(9, 5, dtype=torch.float64)
    found = solve_exponents(model, x)
    assert set(found.free) == {"fc1.bias", "fc2.bias", "idle"}
    names = ["fc1.bias", "fc2.bias", "fc1.weight", "fc2.weight", "fc3.weight"]
    parameters = [model.get_parameter(name) for name in names]
    for k in range(4):
        gradients = dict(zip(names, torch.autograd.grad(model(x)[:, k].pow(2).sum(), parameters), strict=True))
        assert all(gradients[name].abs().max() < 1e-10 for name in ("fc1.bias", "fc2.bias"))
        for name in ("fc1.weight", "fc2.weight"):
            assert gradients[name].abs().max() > 1e-3
            assert (gradients[name] * model.get_parameter(name)).sum(dim=1).abs().max() < 1e-10


def test_nothing_in_the_model_changes():
    model = Mlp("all", norm=True).train()
    model.norm1.eval()
    before = copy.deepcopy(model.state_dict())
    exponents = solve_exponents(model, torch.randn(1, 5))
    rescale(model, exponents, 2.0)
    assert model.training and model.norm2.training and not model.norm1.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_table_explains():
    text = solve_exponents(Mlp("all"), torch.zeros(1, 5)).explain().splitlines()
    assert text[:7] == [
        "tensor      shape  lambda  role",
        "fc1.weight  7x5    1/3     core",
        "fc1.bias    7      1/3     core",
        "fc2.weight  6x7    1/3     core",
        "fc2.bias    6      2/3     above",
        "fc3.weight  4x6    1/3     core",
        "fc3.bias    4      1       above",
    ]
    assert [line.split(":")[0] for line in text[8:]] == ["core", "above"]


def test_stock_residual_network(make_classifier):
    found = solve_exponents(make_classifier("resnet"), torch.randn(1, 3, 32, 32))
    assert "classifier.1.weight" in found.core and found.above == ("classifier.1.bias",)


class SkipToTheLogits(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) + x


def test_contradictions_are_named():
    with pytest.raises(InputError, match="add in the forward pass of SkipToTheLogits; the logits, of degree 1,"):
        solve_exponents(SkipToTheLogits(), torch.randn(1, 4))
    with pytest.raises(InputError, match=r"linear in module 'fc3' \(Linear\); .*the pinned exponent of 'fc3.bias'"):
        solve_exponents(Mlp("all"), torch.zeros(1, 5), {"fc3.bias": 0.5})


def test_rescale_refuses_exponents_of_another_model():
    exponents = solve_exponents(Mlp("none"), torch.zeros(1, 5))
    with pytest.raises(InputError, match="they differ in 'fc1.bias'"):
        rescale(Mlp("first"), exponents, 1.0)
