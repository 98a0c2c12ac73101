"""SimSiam's loss: closed forms, invariances, and who gets a gradient."""

import math

import pytest
import torch

from hfkd.losses.simsiam import negative_cosine, simsiam_loss


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def test_closed_forms():
    prediction = torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=torch.float64)
    target = torch.tensor([[4.0, 3.0], [1.0, 1.0]], dtype=torch.float64)
    assert negative_cosine(prediction, target).item() == pytest.approx(-(24 / 25 + math.sqrt(0.5)) / 2, abs=1e-12)
    assert negative_cosine(prediction, prediction).item() == pytest.approx(-1)
    assert negative_cosine(prediction, -2 * prediction).item() == pytest.approx(1)
    first, second = prediction, torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    # Cosines of the second view's predictions with the first view's representations: 3/5 and 0.
    expected = (negative_cosine(first, target) - (3 / 5 + 0) / 2) / 2
    assert simsiam_loss((first, second), (first, target)).item() == pytest.approx(expected.item(), abs=1e-12)


def test_the_length_of_a_vector_does_not_matter_and_the_views_are_alike():
    p, q, z, w = (drawn(5, 7, seed=seed) for seed in range(4))
    loss = simsiam_loss((p, q), (z, w))
    lengths = torch.rand(5, 1, dtype=torch.float64) + 0.5
    torch.testing.assert_close(simsiam_loss((p * lengths, q), (z, w / lengths)), loss)
    torch.testing.assert_close(simsiam_loss((q, p), (w, z)), loss)


def test_predictions_get_the_gradient_and_targets_none():
    p, q, z, w = (drawn(5, 7, seed=seed) for seed in range(4))
    gradients = torch.autograd.grad(simsiam_loss((p, q), (z, w)), (p, q, z, w), allow_unused=True)
    assert gradients[2] is None and gradients[3] is None
    # d/dp -cos(p, z') = -(z'/|z'| - cos(p, z') p/|p|) / |p|, halved, over N samples.
    unit, target = p / p.norm(dim=1, keepdim=True), w / w.norm(dim=1, keepdim=True)
    cosine = (unit * target).sum(1, keepdim=True)
    torch.testing.assert_close(gradients[0], -(target - cosine * unit) / p.norm(dim=1, keepdim=True) / 2 / 5)
    assert gradients[1].abs().max() > 0


def test_without_the_stop_the_representations_would_move():
    """What the mask takes away: the same value has a gradient where nothing is detached."""
    z, w = drawn(5, 7), drawn(5, 7, seed=1)
    layer = torch.nn.Linear(7, 7, dtype=torch.float64)
    (masked,) = torch.autograd.grad(simsiam_loss((layer(z), layer(w)), (z, w)), z, retain_graph=True)
    cosines = torch.cosine_similarity(layer(z), w, dim=1) + torch.cosine_similarity(layer(w), z, dim=1)
    (whole,) = torch.autograd.grad(-cosines.mean() / 2, z)
    assert not torch.allclose(masked, whole)
    held = z.detach().requires_grad_()
    alone = -torch.cosine_similarity(layer(held), w.detach(), dim=1).mean() / 2
    torch.testing.assert_close(masked, torch.autograd.grad(alone, held)[0])


def test_shapes_that_differ_are_named():
    with pytest.raises(ValueError, match=r"predictions of shape \(5, 7\) for targets of \(5, 6\)"):
        negative_cosine(drawn(5, 7), drawn(5, 6))
