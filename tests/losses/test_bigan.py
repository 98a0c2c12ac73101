"""BiGAN's losses in float64 against closed forms, invariances and gradient masks."""

import math

import pytest
import torch
from torch import nn

from hfkd.losses.bigan import BIGAN_LOSSES, discriminator_loss, generator_loss, gradient_penalty


DATA = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
SAMPLES = torch.tensor([-0.5, 0.1], dtype=torch.float64)


def softplus(x):
    return math.log1p(math.exp(x))


def test_ali_by_hand():
    data, samples = DATA.tolist(), SAMPLES.tolist()
    by_hand = sum(softplus(-x) for x in data) / 3 + sum(softplus(x) for x in samples) / 2
    assert discriminator_loss(DATA, SAMPLES).item() == pytest.approx(by_hand, abs=1e-15)
    by_hand = sum(softplus(x) for x in data) / 3 + sum(softplus(-x) for x in samples) / 2
    assert generator_loss(DATA, SAMPLES).item() == pytest.approx(by_hand, abs=1e-15)


def test_ali_is_the_games_logarithms():
    """-log D(x, E(x)) - log(1 - D(G(z), z)) with D the sigmoid of the score (ALI, eq. 3)."""
    expected = -DATA.sigmoid().log().mean() - (1 - SAMPLES.sigmoid()).log().mean()
    torch.testing.assert_close(discriminator_loss(DATA, SAMPLES), expected)


@pytest.mark.parametrize(("kind", "value"), [("ali", 2 * math.log(2)), ("wasserstein", 0.0)])
def test_an_undecided_discriminator(kind, value):
    zeros = torch.zeros(4, dtype=torch.float64)
    assert discriminator_loss(zeros, zeros, kind).item() == pytest.approx(value, abs=1e-15)
    assert generator_loss(zeros, zeros, kind).item() == pytest.approx(value, abs=1e-15)


def test_wasserstein_is_a_difference_of_means():
    expected = SAMPLES.mean() - DATA.mean()
    torch.testing.assert_close(discriminator_loss(DATA, SAMPLES, "wasserstein"), expected)
    torch.testing.assert_close(generator_loss(DATA, SAMPLES, "wasserstein"), -expected)


def test_the_generator_loss_does_not_saturate_where_the_discriminator_is_right():
    scores = [torch.tensor([s], dtype=torch.float64, requires_grad=True) for s in (30.0, -30.0)]
    gradients = torch.autograd.grad(generator_loss(*scores), scores)
    assert [g.item() for g in gradients] == pytest.approx([1.0, -1.0], abs=1e-12)


@pytest.mark.parametrize("kind", BIGAN_LOSSES)
def test_losses_are_means_over_pairs(kind):
    twice = torch.cat([DATA, DATA]), torch.cat([SAMPLES, SAMPLES])
    torch.testing.assert_close(discriminator_loss(*twice, kind), discriminator_loss(DATA, SAMPLES, kind))


def test_unknown_kind():
    with pytest.raises(ValueError, match="hinge"):
        discriminator_loss(DATA, SAMPLES, "hinge")


class LinearCritic(nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.of_image = nn.Parameter(scale * torch.arange(1.0, 5.0, dtype=torch.float64).view(1, 2, 2))
        self.of_latents = nn.Parameter(scale * torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64))

    def forward(self, images, latents):
        return (self.of_image * images).sum(dim=(1, 2, 3)) + (self.of_latents * latents).sum(dim=1)


def pairs(seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(5, 1, 2, 2, generator=generator, dtype=torch.float64)
    return images, torch.randn(5, 3, generator=generator, dtype=torch.float64)


def test_penalty_of_a_linear_critic_is_of_its_joint_norm():
    critic = LinearCritic()
    norm = math.sqrt(1 + 4 + 9 + 16 + 4 + 1 + 0.25)
    mixing = torch.linspace(0, 1, 5, dtype=torch.float64)
    penalty = gradient_penalty(critic, pairs(0), pairs(1), mixing)
    assert penalty.item() == pytest.approx((norm - 1) ** 2, abs=1e-12)
    (gradient,) = torch.autograd.grad(penalty, critic.of_latents)
    torch.testing.assert_close(gradient, 2 * (norm - 1) / norm * critic.of_latents.detach())


@pytest.mark.parametrize("end", [0, 1])
def test_penalty_is_taken_where_the_mixing_says(end):
    """f = sum x^2 / 2 + sum z^2 / 2 has the point itself for a gradient."""
    data, samples = pairs(0), pairs(1)
    penalty = gradient_penalty(
        lambda x, z: x.square().sum(dim=(1, 2, 3)) / 2 + z.square().sum(dim=1) / 2,
        data,
        samples,
        torch.full((5,), float(end)),
    )
    images, latents = data if end else samples
    norms = torch.cat([images.flatten(1), latents], dim=1).norm(dim=1)
    torch.testing.assert_close(penalty, (norms - 1).square().mean())


def test_penalty_reaches_the_critic_and_nobody_else():
    critic = LinearCritic()
    data, samples = pairs(0), pairs(1)
    for tensor in (*data, *samples):
        tensor.requires_grad_()
    mixing = torch.full((5,), 0.5, dtype=torch.float64)
    penalty = gradient_penalty(critic, data, samples, mixing)
    inputs = (critic.of_image, critic.of_latents, *data, *samples)
    gradients = torch.autograd.grad(penalty, inputs, allow_unused=True)
    assert [gradient is not None for gradient in gradients] == [True, True, False, False, False, False]
