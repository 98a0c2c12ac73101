"""The losses of encoding: closed forms, invariances, errors."""

import pytest
import torch

from hfkd.losses.latent_encoding import latent_loss, perceptual_distance, reconstruction_loss


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_closed_forms():
    codes, latents = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    assert latent_loss(codes, latents).item() == pytest.approx(3.25)
    assert reconstruction_loss(codes.view(2, 2, 1, 1), latents.view(2, 2, 1, 1)).item() == pytest.approx(1.25)
    # One position: (1, 0) and (0.6, 0.8) differ by 0.16 + 0.64; another: opposite vectors, by 4.
    own = torch.tensor([[1.0, 0.0], [2.0, 0.0]]).T.reshape(1, 2, 1, 2)
    other = torch.tensor([[3.0, 4.0], [-5.0, 0.0]]).T.reshape(1, 2, 1, 2)
    assert perceptual_distance([own], [other]).item() == pytest.approx((0.8 + 4) / 2)
    assert perceptual_distance([own, own], [other, own]).item() == pytest.approx((0.8 + 4) / 2)


def test_the_perceptual_distance_sees_directions_alone():
    maps, others = (
        [drawn(3, 5, 4, 4), drawn(3, 2, 2, 2, seed=1)],
        [drawn(3, 5, 4, 4, seed=2), drawn(3, 2, 2, 2, seed=3)],
    )
    distance = perceptual_distance(maps, others)
    torch.testing.assert_close(perceptual_distance(others, maps), distance)
    lengths = torch.rand(3, 1, 4, 4, dtype=torch.float64) + 0.5
    torch.testing.assert_close(perceptual_distance([maps[0] * lengths, maps[1] * 3], others), distance)
    assert perceptual_distance(maps, maps).item() == 0 and 0 < distance < 8


def test_gradients_reach_the_code_and_are_finite_where_maps_vanish():
    codes = drawn(4, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(latent_loss(codes, drawn(4, 3, seed=1)), codes)
    torch.testing.assert_close(gradient, 2 * (codes.detach() - drawn(4, 3, seed=1)) / 12)
    dark = torch.zeros(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(perceptual_distance([dark], [drawn(1, 3, 2, 2)]), dark)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", [latent_loss, reconstruction_loss])
def test_shapes_that_differ_are_named(loss):
    with pytest.raises(ValueError, match=r"shape \(2, 3\) and \(2, 4\) differ"):
        loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="0 and 0 maps"):
        perceptual_distance([], [])
    with pytest.raises(ValueError, match="maps of shape"):
        perceptual_distance([torch.zeros(1, 2, 3, 3)], [torch.zeros(1, 2, 4, 4)])
