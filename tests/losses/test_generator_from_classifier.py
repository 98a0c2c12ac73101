"""GBC's losses in float64 against explicit sums over samples, finite differences, closed forms and invariances."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from hfkd.errors import InputError
from hfkd.losses.generator_from_classifier import (
    closed_form_scale,
    cross_entropy_multipliers,
    cross_entropy_potential,
    gradients_of,
    implied_margin_scale,
    margins,
    pixel_mean,
    stationarity_loss,
    symmetric_duality,
    total_variation,
    walls_duality,
    weighted_margin_potential,
)
from hfkd.models.multiplier_network import MultiplierNetwork


N, CLASSES, LATENT = 9, 4, 3
MULTIPLIERS = ["ce", "network"]


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def mlp(norm=False, sizes=(6, 7, 5, CLASSES)):
    """Three fully connected layers; a bias that batch norm would cancel is left out."""
    layers = []
    for number, (inputs, outputs) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        last = number == len(sizes) - 2
        layers.append(nn.Linear(inputs, outputs, bias=last or not norm))
        layers += [] if last else [nn.BatchNorm1d(outputs), nn.ReLU()] if norm else [nn.ReLU()]
    return nn.Sequential(*layers).double()


class Case:
    """A classifier, images, labels and a multiplier network, and the stationarity of the one over the others."""

    def __init__(self, norm=False, multipliers="ce", per_group=True):
        torch.manual_seed(3)
        self.model, self.multipliers, self.per_group = mlp(norm), multipliers, per_group
        self.parameters = dict(self.model.named_parameters())
        self.images = torch.randn(N, 6, dtype=torch.float64)
        self.labels = self.logits().argmax(dim=1)  # so that kappa is not 0, as it is for a network that errs
        self.latents = torch.randn(N, LATENT, dtype=torch.float64)
        self.network = MultiplierNetwork(LATENT, CLASSES, hidden_size=8).double()

    def logits(self, images=None):
        return functional_call(self.model, self.parameters, (self.images if images is None else images,))

    def gradients(self, images=None):
        logits = self.logits(images)
        if self.multipliers == "network":
            weights = self.network(self.latents, self.labels)
            return gradients_of(weighted_margin_potential(logits, self.labels, weights), self.parameters)
        gradients = gradients_of(cross_entropy_potential(logits, self.labels, 1.5), self.parameters)
        scale = closed_form_scale(self.parameters, gradients, per_group=self.per_group)
        return {name: scale * gradient for name, gradient in gradients.items()}

    def loss(self, images=None):
        gradients = self.gradients(images)
        return stationarity_loss(
            self.parameters,
            gradients,
            per_group=self.per_group,
            zero_gradients=[gradients["0.weight"]],
            zero_weight=0.3,
        )


def slope_of(function, tensor, direction, step=1e-6):
    """Central difference of `function` when `tensor` moves in place along `direction`."""
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            tensor += sign * step * direction
        values.append(function().item())
        with torch.no_grad():
            tensor -= sign * step * direction
    return (values[0] - values[1]) / (2 * step)


# -- potentials against explicit sums (T4) ---------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
def test_one_backward_pass_is_the_weighted_sum_of_per_sample_gradients(norm):
    case = Case(norm, "network")
    mu = case.network(case.latents, case.labels)
    expected = {name: torch.zeros_like(value) for name, value in case.parameters.items()}
    margin = margins(case.logits(), case.labels)
    for i in range(N):
        of_sample = torch.autograd.grad(margin[i], case.parameters.values(), retain_graph=True)
        for name, gradient in zip(case.parameters, of_sample, strict=True):
            expected[name] += mu[i] * gradient / N
    torch.testing.assert_close(case.gradients(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", [False, True])
def test_cross_entropy_weighs_every_margin_by_its_probability(norm):
    case, temperature = Case(norm), 1.5
    logits = case.logits()
    probabilities = (logits / temperature).softmax(1)
    expected = {name: torch.zeros_like(value) for name, value in case.parameters.items()}
    for i, y in enumerate(case.labels):
        for j in set(range(CLASSES)) - {int(y)}:
            margin = logits[i, y] - logits[i, j]
            of_pair = torch.autograd.grad(margin, case.parameters.values(), retain_graph=True)
            for name, gradient in zip(case.parameters, of_pair, strict=True):
                expected[name] += probabilities[i, j] * gradient / temperature / N
    potential = cross_entropy_potential(logits, case.labels, torch.tensor(temperature))
    torch.testing.assert_close(gradients_of(potential, case.parameters), expected, rtol=0, atol=1e-12)
    own = probabilities[torch.arange(N), case.labels]
    weights = cross_entropy_multipliers(logits, case.labels, temperature)
    torch.testing.assert_close(weights, 1 - own, rtol=0, atol=1e-14)
    assert potential.item() == pytest.approx(-F.cross_entropy(logits / temperature, case.labels).item(), abs=1e-14)


def test_margin_is_to_the_second_best_class():
    logits = double([2.0, 0.5, -1.0], [2.0, 0.5, -1.0], [1.0, 3.0, 3.0])
    assert margins(logits, torch.tensor([0, 2, 0])).tolist() == [1.5, -3.0, -2.0]


def test_cross_entropy_of_far_margins_keeps_its_precision_in_float32():
    """At a margin of 60 log-softmax in float32 gives the own class no gradient at all, and kappa would be nonsense."""
    torch.manual_seed(0)
    labels = torch.arange(N) % CLASSES
    logits = torch.randn(N, CLASSES, dtype=torch.float64) + 60 * F.one_hot(labels, CLASSES)
    theta = torch.randn(CLASSES, CLASSES, dtype=torch.float64) + 2 * torch.eye(CLASSES, dtype=torch.float64)

    def scaled(dtype):
        parameters = {"theta": torch.eye(CLASSES, dtype=dtype).requires_grad_()}
        potential = cross_entropy_potential(logits.to(dtype) @ parameters["theta"], labels, 1.0)
        gradients = gradients_of(potential, parameters)
        assert 0 < gradients["theta"].abs().max() < 1e-20
        kappa = closed_form_scale({"theta": theta.to(dtype)}, gradients, per_group=True)
        return kappa * gradients["theta"]

    exact = scaled(torch.float64)
    assert exact.abs().max() > 0.1
    torch.testing.assert_close(scaled(torch.float32).double(), exact, rtol=1e-4, atol=1e-5)


def test_gradients_of_what_a_potential_does_not_depend_on_are_zero():
    parameters = {"used": double(2.0).requires_grad_(), "unused": double(1.0, 1.0).requires_grad_()}
    gradients = gradients_of(parameters["used"].square().sum(), parameters)
    assert gradients["used"].item() == 4 and gradients["used"].requires_grad
    assert gradients["unused"].tolist() == [0, 0]


# -- second order (T4) -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multipliers", MULTIPLIERS)
@pytest.mark.parametrize("per_group", [True, False])
@pytest.mark.parametrize("norm", [False, True])
def test_stationarity_is_differentiable_by_the_images(norm, per_group, multipliers):
    case = Case(norm, multipliers, per_group)
    images = case.images.requires_grad_()
    (gradient,) = torch.autograd.grad(case.loss(), images)
    for seed in range(3):
        direction = torch.randn(N, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        measured = slope_of(case.loss, images, direction)
        assert (gradient * direction).sum().item() == pytest.approx(measured, rel=1e-6, abs=1e-7)
    assert gradient.abs().max() > 1e-4


@pytest.mark.parametrize("norm", [False, True])
def test_stationarity_is_differentiable_by_the_multipliers(norm):
    case = Case(norm, "network")
    for name, parameter in case.network.named_parameters():
        (gradient,) = torch.autograd.grad(case.loss(), parameter)
        direction = torch.ones_like(parameter)
        measured = slope_of(case.loss, parameter, direction)
        assert (gradient * direction).sum().item() == pytest.approx(measured, rel=1e-6, abs=1e-8), name
        assert gradient.abs().max() > 0, name


# -- stationarity (T8, T9) -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_group", [True, False])
def test_closed_form_scale_is_the_minimiser(per_group):
    case = Case()
    gradients = gradients_of(cross_entropy_potential(case.logits(), case.labels, 1.0), case.parameters)
    gradients = {name: gradient + 0.3 * case.parameters[name] for name, gradient in gradients.items()}

    def loss(scale):
        scaled = {name: scale * gradient for name, gradient in gradients.items()}
        return stationarity_loss(case.parameters, scaled, per_group=per_group)

    kappa = closed_form_scale(case.parameters, gradients, per_group=per_group)
    assert kappa > 0 and kappa.requires_grad
    scale = kappa.detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss(scale), scale, retain_graph=True)
    assert slope.item() == pytest.approx(0, abs=1e-12)
    assert loss(kappa) < loss(0.9 * kappa) and loss(kappa) < loss(1.1 * kappa) and loss(kappa) < 1
    away = {name: -gradient for name, gradient in gradients.items()}
    assert closed_form_scale(case.parameters, away, per_group=per_group).item() == 0


def test_closed_form_scale_finds_the_factor():
    parameters = {"a": double(3.0, 4.0), "b": double(-2.0)}
    for size in (1.0, 1e-30, 1e30):
        gradients = {name: size * value for name, value in parameters.items()}
        for per_group in (True, False):
            kappa = closed_form_scale(parameters, gradients, per_group=per_group)
            assert kappa.item() * size == pytest.approx(1, rel=1e-12)


def test_stationarity_closed_forms():
    parameters = {"a": double(3.0, 4.0), "b": double(2.0, 0.0)}
    gradients = {"a": double(3.0, 2.0), "b": double(1.0, 1.0), "other": double(9.0)}
    assert stationarity_loss(parameters, gradients, per_group=True).item() == pytest.approx((4 / 25 + 2 / 4) / 2)
    assert stationarity_loss(parameters, gradients, per_group=False).item() == pytest.approx(6 / 29)
    force = {"zero_gradients": [double(1.0, 2.0), double(3.0)], "zero_weight": 0.5}
    added = 0.5 * (5 + 9) / (29 / 2)
    assert stationarity_loss(parameters, gradients, per_group=False, **force).item() == pytest.approx(6 / 29 + added)
    for per_group in (True, False):
        assert stationarity_loss(parameters, parameters, per_group=per_group).item() == 0


def test_zero_biases_do_not_outweigh_the_rest():
    parameters, gradients = {"w": double(0.0, 2.0), "b": double(0.0)}, {"w": double(0.0, 0.0), "b": double(0.01)}
    loss = stationarity_loss(parameters, gradients, per_group=True)
    assert loss.item() == pytest.approx((1 + 0.01**2 / (1e-3 * 4)) / 2, rel=1e-12)


@pytest.mark.parametrize("per_group", [True, False])
def test_no_gradient_explains_nothing(per_group):
    parameters = dict(mlp().named_parameters())
    zeros = {name: torch.zeros_like(value).requires_grad_() for name, value in parameters.items()}
    scale = closed_form_scale(parameters, zeros, per_group=per_group)
    assert scale.item() == 0
    loss = stationarity_loss(parameters, {name: scale * g for name, g in zeros.items()}, per_group=per_group)
    assert loss.item() == pytest.approx(1, abs=1e-15)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, list(zeros.values())))


def test_the_classifier_is_a_constant():
    theta = double(1.0, 2.0).requires_grad_()
    loss = stationarity_loss({"w": theta}, {"w": double(0.5, 0.5)}, per_group=True)
    assert not loss.requires_grad
    assert not closed_form_scale({"w": theta}, {"w": double(0.5, 0.5)}, per_group=True).requires_grad


# Exponents lambda of 2.3 of the specification: biases in all layers, and batch norm.
EXPONENTS = {
    False: {"0.weight": 1, "0.bias": 1, "2.weight": 1, "2.bias": 2, "4.weight": 1, "4.bias": 3},
    True: {"4.weight": 1.5, "4.bias": 1.5, "6.weight": 1.5, "6.bias": 3},
}
CORE = {False: ("0.weight", "0.bias", "2.weight", "4.weight"), True: ("4.weight", "4.bias", "6.weight")}


@pytest.mark.parametrize("potential", ["ce", "constant"])
@pytest.mark.parametrize("per_group", [True, False])
@pytest.mark.parametrize("norm", [False, True])
def test_rescaling_a_checkpoint_along_its_symmetry_changes_no_loss(norm, per_group, potential):
    def measure(a):
        case = Case(norm)
        gamma = 2.0 * math.exp(a)
        with torch.no_grad():
            for name, parameter in case.parameters.items():
                parameter *= math.exp(a * EXPONENTS[norm].get(name, 0) / 3)
        core = {name: case.parameters[name] for name in CORE[norm]}
        logits = case.logits()
        margin = margins(logits, case.labels)
        value = margin.mean() if potential == "constant" else cross_entropy_potential(logits, case.labels, gamma / 2)
        gradients = gradients_of(value, core)
        kappa = closed_form_scale(core, gradients, per_group=per_group)
        scaled = {name: kappa * gradient for name, gradient in gradients.items()}
        loss = stationarity_loss(core, scaled, per_group=per_group)
        return torch.stack([loss, symmetric_duality(margin / gamma).mean()]), kappa

    reference, kappa = measure(0.0)
    assert kappa > 0 and reference[0] < 0.999
    for a in (-1.0, 0.7):
        torch.testing.assert_close(measure(a)[0], reference, rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def decayed_classifier():
    """2-32-32-2 on 24 points in four blobs (XOR), full-batch descent on cross-entropy with weight decay 5e-3."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    centres = double([1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]).repeat(6, 1)
    images = centres + 0.2 * torch.randn(24, 2, dtype=torch.float64, generator=generator)
    labels = (centres.prod(dim=1) < 0).long()
    model = mlp(sizes=(2, 32, 32, 2))
    descent = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=5e-3)
    for _ in range(2000):
        descent.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        descent.step()
    return model, images, labels


def distance_from_stationarity(model, images, labels):
    """sqrt(L_st) over all parameters with T = 1, and kappa."""
    parameters = dict(model.named_parameters())
    gradients = gradients_of(cross_entropy_potential(model(images), labels, 1.0), parameters)
    kappa = closed_form_scale(parameters, gradients, per_group=False)
    scaled = {name: kappa * gradient for name, gradient in gradients.items()}
    return stationarity_loss(parameters, scaled, per_group=False).sqrt().item(), kappa.item()


def test_training_images_satisfy_stationarity_and_collapsed_or_other_ones_do_not(decayed_classifier):
    model, images, labels = decayed_classifier
    own, kappa = distance_from_stationarity(model, images, labels)
    assert own < 0.15
    assert kappa == pytest.approx(1 / 5e-3, rel=0.1)
    first = torch.stack([images[labels == c][0] for c in (0, 1)])
    collapsed, _ = distance_from_stationarity(model, first, torch.arange(2))
    stretched, _ = distance_from_stationarity(model, 1.5 * images, labels)
    swapped, scale = distance_from_stationarity(model, images, 1 - labels)
    assert collapsed > own + 0.3 and stretched > own + 0.2
    assert scale == 0 and swapped == pytest.approx(1)


# -- duality (T7) and total variation --------------------------------------------------------------------------------


def slopes(values, ratio):
    return torch.autograd.grad(values.sum(), ratio)[0]


def test_symmetric_duality():
    ratio = (torch.arange(-12, 20, dtype=torch.float64) / 4).requires_grad_()  # 1 is the 16th, exactly
    values = symmetric_duality(ratio)
    slope = slopes(values, ratio)
    assert values.argmin() == 16 and values[16].item() == 0
    assert (slope[:16] < 0).all() and (slope[17:] > 0).all() and slope.abs().max() <= 1
    assert symmetric_duality(double(3.0)).item() == pytest.approx(math.log(5), abs=1e-14)


def test_walls_duality():
    ratio = (torch.arange(-12, 20, dtype=torch.float64) / 4).requires_grad_()
    multipliers = torch.rand(32, dtype=torch.float64).add(0.1).requires_grad_()
    values = walls_duality(ratio, multipliers)
    slope = slopes(values, ratio)
    inside = (ratio >= 1) & (ratio <= 1.5)
    assert inside.sum() == 3 and (values[inside] == 0).all() and (slope[inside] == 0).all()
    assert (slope[ratio < 1] < 0).all() and (slope[ratio > 1.5] > 0).all()
    assert not walls_duality(ratio.detach(), multipliers).requires_grad  # else weights would shrink to please the wall
    assert walls_duality(double(0.5, 2.5), double(3.0, 1.0), 2.0, 1.0).tolist() == [0.5, 0.125]
    assert walls_duality(double(0.0, 9.0), double(0.0, 0.0)).tolist() == [4.0, 0.0]


def test_total_variation():
    images = double([[[-1.0, 1.0, 1.0], [0.0, 1.0, 0.5]]])
    down, right = (1 + 0 + 0.5) / 3, (2 + 0 + 1 + 0.5) / 4
    assert total_variation(images.view(1, 1, 2, 3)).item() == pytest.approx((down + right) / 2, abs=1e-14)
    assert total_variation(images.view(1, 2, 1, 3)).item() == pytest.approx(right / 2, abs=1e-14)
    assert total_variation(images.view(1, 6, 1, 1)).item() == 0
    assert total_variation(torch.ones(2, 3, 4, 4)).item() == 0


def test_pixel_mean_is_asked_of_each_image():
    images = double([[1.0, 3.0], [-1.0, -3.0], [2.0, -2.0]]).view(3, 1, 1, 2)
    assert pixel_mean(images).item() == pytest.approx((4 + 4 + 0) / 3, abs=1e-14)


# -- margin scale and bad input --------------------------------------------------------------------------------------


def test_margin_scale_of_equal_margins():
    gamma, classes = 9.0, 10
    logits = gamma * F.one_hot(torch.arange(classes), classes).double()
    loss = F.cross_entropy(logits, torch.arange(classes)).item()
    assert implied_margin_scale(loss, classes) == pytest.approx(gamma, abs=1e-3)
    assert implied_margin_scale(1e-30, 2) == pytest.approx(30 * math.log(10))


ONE = torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    "call",
    [
        lambda: margins(torch.zeros(2, 1), ONE),
        lambda: margins(torch.zeros(2, 3), ONE[:1]),
        lambda: weighted_margin_potential(torch.zeros(2, 3), ONE, torch.ones(3)),
        lambda: cross_entropy_potential(torch.zeros(2, 3), ONE, 0.0),
        lambda: stationarity_loss({}, {}, per_group=True),
        lambda: closed_form_scale({}, {}, per_group=False),
        lambda: implied_margin_scale(0.0, 10),
        lambda: implied_margin_scale(1.0, 2),
        lambda: implied_margin_scale(math.nan, 10),
    ],
)
def test_errors_are_one_line(call):
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
