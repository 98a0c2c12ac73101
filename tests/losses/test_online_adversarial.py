"""Closed forms (float64) of the AFD losses, and what discriminators and transfer layers can and cannot see."""

import math

import pytest
import torch
from torch.nn import functional as F

from hfkd.losses.online_adversarial import (
    GAN_LOSSES,
    alignment_loss,
    discriminator_loss,
    distillation_kl,
    generator_loss,
    kl_rampup,
    previous,
    undecided_score,
)
from hfkd.models.feature_discriminator import FeatureDiscriminator, TransferLayer


def double(*values):
    return torch.tensor([values], dtype=torch.float64)


Z1, Z2, Y = double(2, 0, -1), double(0, 1, 2), torch.tensor([0])


def test_logit_loss_closed_form():
    ce1, ce2 = F.cross_entropy(Z1, Y).item(), F.cross_entropy(Z2, Y).item()
    assert ce1 == pytest.approx(0.1698460196, abs=1e-10)
    assert ce2 == pytest.approx(2.4076059645, abs=1e-10)
    # KL(peer || self): first argument of the paper's KL is the peer.
    assert distillation_kl(Z1, Z2, 1.0).item() == pytest.approx(1.8226302472, abs=1e-10)
    assert distillation_kl(Z2, Z1, 1.0).item() == pytest.approx(1.6851240161, abs=1e-10)
    assert ce1 + distillation_kl(Z1, Z2, 3.0).item() == pytest.approx(2.2582009094, abs=1e-10)
    assert ce2 + distillation_kl(Z2, Z1, 3.0).item() == pytest.approx(4.5484219029, abs=1e-10)


def test_logit_loss_gradient_and_invariances():
    z1, z2 = Z1.clone().requires_grad_(), Z2.clone().requires_grad_()
    distillation_kl(z1, z2, 3.0).backward()
    expected = 3 * ((Z1 / 3).softmax(1) - (Z2 / 3).softmax(1))
    torch.testing.assert_close(z1.grad, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(z1.grad, double(0.9039, -0.1452, -0.7587), rtol=0, atol=5e-5)
    assert z2.grad is None  # the peer is detached

    shifted = (Z1 + 5.0).requires_grad_()
    same = distillation_kl(shifted, Z1, 3.0)
    same.backward()
    assert same.item() == pytest.approx(0, abs=1e-14)
    torch.testing.assert_close(shifted.grad, torch.zeros_like(Z1), rtol=0, atol=1e-14)
    once, twice = distillation_kl(Z1, Z2), distillation_kl(Z1.repeat(2, 1), Z2.repeat(2, 1))
    assert once.item() == pytest.approx(twice.item(), abs=1e-14)  # a mean over the batch


@pytest.mark.parametrize(
    ("real", "fake", "loss_d", "loss_g"), [(0.8, 0.3, 0.13, 0.49), (0.5, 0.5, 0.5, 0.25), (1.0, 0.0, 0.0, 1.0)]
)
def test_least_squares_gan_closed_form(real, fake, loss_d, loss_g):
    real, fake = double(real, real), double(fake, fake)
    assert discriminator_loss(real, fake).item() == pytest.approx(loss_d, abs=1e-12)
    assert generator_loss(fake).item() == pytest.approx(loss_g, abs=1e-12)
    assert discriminator_loss(double(0.3), double(0.8)).item() == pytest.approx(1.13, abs=1e-12)  # sides swapped


@pytest.mark.parametrize(("s", "slope"), [(0.5, -0.25), (0.3, -0.294)])
def test_sigmoid_generator_loss_saturates(s, slope):
    score = torch.tensor(math.log(s / (1 - s)), dtype=torch.float64, requires_grad=True)
    generator_loss(score.sigmoid()).backward()
    assert score.grad.item() == pytest.approx(slope, abs=1e-12)


@pytest.mark.parametrize("kind", GAN_LOSSES)
def test_every_gan_loss_pulls_scores_the_right_way(kind):
    real = torch.full((4,), undecided_score(kind), dtype=torch.float64, requires_grad=True)
    fake = torch.full((4,), undecided_score(kind), dtype=torch.float64, requires_grad=True)
    discriminator_loss(real, fake, kind).backward()
    assert (real.grad < 0).all() and (fake.grad > 0).all()
    (slope,) = torch.autograd.grad(generator_loss(fake, kind), fake)
    assert (slope < 0).all()


def test_alignment_closed_form():
    a = torch.tensor([[1.0, 0.0], [2.0, 1.0]], dtype=torch.float64).view(1, 1, 2, 2).requires_grad_()
    b = torch.tensor([[0.0, 1.0], [2.0, 3.0]], dtype=torch.float64).view(1, 1, 2, 2).requires_grad_()
    assert alignment_loss(a, b, 1).item() == 1.0
    assert alignment_loss(a, b, 2).item() == 1.5
    alignment_loss(a, b, 2).backward()
    assert b.grad is None and a.grad.abs().sum() > 0
    normalised = alignment_loss(7 * a, 3 * b, 2, normalize=True)
    assert normalised.item() == pytest.approx(alignment_loss(a, b, 2, normalize=True).item(), abs=1e-14)


def test_rampup_and_cycle():
    values = [kl_rampup(e, 80) for e in (0, 40, 80, 300)]
    assert values == pytest.approx([0.0067379, 0.2865048, 1, 1], abs=1e-7)
    assert kl_rampup(0, 0) == 1
    assert [previous(k, 2) for k in range(2)] == [1, 0]
    assert [previous(k, 3) for k in range(3)] == [2, 0, 1]
    assert [previous(k, 5) for k in range(5)] == [4, 0, 1, 2, 3]


@pytest.mark.parametrize(
    "call",
    [
        lambda: distillation_kl(Z1, Z2[:, :2]),
        lambda: distillation_kl(Z1, Z2, 0),
        lambda: discriminator_loss(Z1, Z2, "wgan"),
        lambda: alignment_loss(Z1, Z2[:, :2]),
        lambda: alignment_loss(Z1, Z2, 3),
    ],
)
def test_errors_are_one_line(call):
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("side", [8, 4])
def test_discriminator_scores_maps(channels, side):
    discriminator = FeatureDiscriminator(channels, (side, side))
    scores = discriminator(torch.randn(5, channels, side, side))
    assert scores.shape == (5,) and scores.min() > 0 and scores.max() < 1
    patches = FeatureDiscriminator(channels, (side, side), patch=True)(torch.randn(5, channels, side, side))
    assert patches.shape == (5, (side // 2) ** 2)


def test_discriminator_size():
    count = sum(p.numel() for p in FeatureDiscriminator(64, (8, 8)).parameters())
    assert count == 38_017


def test_transfer_layer():
    assert not list(TransferLayer(64, 64, (8, 8)).parameters())
    maps = torch.randn(4, 64, 8, 8)
    assert torch.equal(TransferLayer(64, 64, (8, 8))(maps), maps)
    moved = TransferLayer(64, 16, (4, 4))(maps)
    assert moved.shape == (4, 16, 4, 4) and (moved >= 0).all()
    assert list(TransferLayer(64, 64, (8, 8), always=True).parameters())


def train_discriminator(norm, joint, real_scale, real_shift, steps=300):
    """Final L_D of D alone on synthetic 16x8x8 maps: N(real_shift, real_scale) against N(0, 1)."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    discriminator = FeatureDiscriminator(16, (8, 8), norm=norm)
    adam = torch.optim.Adam(discriminator.parameters(), lr=1e-3)
    history = []
    for _ in range(steps):
        real = torch.randn(32, 16, 8, 8, generator=generator) * real_scale + real_shift
        fake = torch.randn(32, 16, 8, 8, generator=generator)
        if joint:
            scores = discriminator(torch.cat([real, fake]))
            loss = discriminator_loss(scores[:32], scores[32:])
        else:
            loss = discriminator_loss(discriminator(real), discriminator(fake))
        adam.zero_grad()
        loss.backward()
        adam.step()
        history.append(loss.item())
    return sum(history[-20:]) / 20


@pytest.mark.parametrize(("norm", "joint"), [("batch", False), ("batch", True), ("none", False)])
def test_discriminator_sees_a_shift_and_nothing_where_there_is_nothing(norm, joint):
    assert train_discriminator(norm, joint, 1.0, 1.0) < 0.01
    assert train_discriminator(norm, joint, 1.0, 0.0, steps=150) == pytest.approx(0.5, abs=0.06)


def test_separate_batch_norm_hides_a_pure_scale():
    """Why d_norm and d_batch are settings: each kind normalised by itself looks like the other."""
    assert train_discriminator("batch", False, 2.0, 0.0) > 0.4
    assert train_discriminator("batch", True, 2.0, 0.0) < 0.2
    assert train_discriminator("none", False, 2.0, 0.0) < 0.2


@pytest.mark.parametrize("flipped", [False, True])
def test_adversarial_pair_moves_the_fake_maps_towards_the_real_ones(flipped):
    """A learned offset b of the fake maps approaches the real mean 1, and flees it when the labels are flipped."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    discriminator = FeatureDiscriminator(8, (4, 4), norm="none")
    offset = torch.zeros(1, 8, 1, 1, requires_grad=True)
    adam_d = torch.optim.Adam(discriminator.parameters(), lr=1e-3)
    adam_g = torch.optim.Adam([offset], lr=1e-2)
    for _ in range(400):
        real = torch.randn(32, 8, 4, 4, generator=generator) + 1
        fake = torch.randn(32, 8, 4, 4, generator=generator) + offset
        sides = (discriminator(real), discriminator(fake.detach()))
        adam_d.zero_grad()
        discriminator_loss(*(sides[::-1] if flipped else sides)).backward()
        adam_d.step()
        adam_g.zero_grad()
        generator_loss(discriminator(fake)).backward()
        adam_g.step()
    distance = (1 - offset).abs().mean().item()
    assert distance > 1.05 if flipped else distance < 0.6
