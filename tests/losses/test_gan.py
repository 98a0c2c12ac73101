"""The GAN's losses in float64 against closed forms, and whom the penalty's gradient reaches."""

import math

import pytest
import torch
from torch import nn

from hfkd.losses.gan import discriminator_loss, generator_loss, r1_penalty


REAL = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
FAKE = torch.tensor([-0.5, 0.1], dtype=torch.float64)


def softplus(x):
    return math.log1p(math.exp(x))


def test_by_hand():
    by_hand = sum(softplus(-x) for x in REAL.tolist()) / 3 + sum(softplus(x) for x in FAKE.tolist()) / 2
    assert discriminator_loss(REAL, FAKE).item() == pytest.approx(by_hand, abs=1e-15)
    by_hand = sum(softplus(-x) for x in FAKE.tolist()) / 2
    assert generator_loss(FAKE).item() == pytest.approx(by_hand, abs=1e-15)


def test_the_logarithms_of_the_game():
    """-log D(x) - log(1 - D(G(z))) and -log D(G(z)), with D the sigmoid of the logit."""
    expected = -REAL.sigmoid().log().mean() - (1 - FAKE.sigmoid()).log().mean()
    torch.testing.assert_close(discriminator_loss(REAL, FAKE), expected)
    torch.testing.assert_close(generator_loss(FAKE), -FAKE.sigmoid().log().mean())


def test_an_undecided_discriminator():
    zeros = torch.zeros(4, dtype=torch.float64)
    assert discriminator_loss(zeros, zeros).item() == pytest.approx(2 * math.log(2), abs=1e-15)
    assert generator_loss(zeros).item() == pytest.approx(math.log(2), abs=1e-15)


def test_the_generators_loss_does_not_saturate_where_the_discriminator_is_sure():
    logits = torch.tensor([-30.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(generator_loss(logits), logits)
    assert gradient.item() == pytest.approx(-1.0, abs=1e-12)
    (gradient,) = torch.autograd.grad(discriminator_loss(REAL, logits), logits)
    assert gradient.item() == pytest.approx(0.0, abs=1e-12)


def test_losses_are_means_over_images():
    torch.testing.assert_close(discriminator_loss(REAL.repeat(2), FAKE.repeat(3)), discriminator_loss(REAL, FAKE))
    torch.testing.assert_close(generator_loss(FAKE.repeat(3)), generator_loss(FAKE))


def images(n=5):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 2, 3, 3, generator=generator, dtype=torch.float64).requires_grad_()


def test_penalty_of_a_linear_discriminator_is_of_its_weights_norm():
    weight = nn.Parameter(torch.linspace(-1, 2, 18, dtype=torch.float64))
    x = images()
    penalty = r1_penalty(x.flatten(1) @ weight + 7, x, weight=3.0)
    assert penalty.item() == pytest.approx(1.5 * weight.square().sum().item(), rel=1e-14)
    (gradient,) = torch.autograd.grad(penalty, weight)
    torch.testing.assert_close(gradient, 3 * weight.detach())


def test_penalty_is_a_mean_over_images():
    """D(x) = s_n |x|^2 / 2 has the gradient s_n x."""
    x, scale = images(), torch.arange(5, dtype=torch.float64)
    logits = scale * x.square().flatten(1).sum(dim=1) / 2
    expected = (scale**2 * x.detach().square().flatten(1).sum(dim=1)).mean() / 2
    torch.testing.assert_close(r1_penalty(logits, x, weight=1.0).detach(), expected)


def test_penalty_leaves_the_images_without_gradient_and_the_bias_alone():
    x = images()
    linear = nn.Linear(18, 1).double()
    r1_penalty(linear(x.flatten(1)).flatten(), x, weight=1.0).backward()
    assert x.grad is None and linear.bias.grad is None and linear.weight.grad.abs().min() > 0
