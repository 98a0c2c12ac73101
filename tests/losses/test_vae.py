"""The two terms of the evidence lower bound in float64, against distributions and closed forms."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from hfkd.losses.vae import bernoulli_nll, gaussian_kl, reconstruction


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_kl_is_that_of_the_distributions():
    mean, log_variance = normal(4, 3, 2), normal(4, 3, 2, seed=1)
    prior = Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), prior).sum(dim=(1, 2))
    torch.testing.assert_close(gaussian_kl(mean, log_variance), expected)


def test_kl_by_hand():
    """One code with mean 2 and variance e: (e + 4 - 1 - 1) / 2; the prior itself: 0."""
    mean, log_variance = torch.tensor([[2.0], [0.0]]), torch.tensor([[1.0], [0.0]])
    assert gaussian_kl(mean, log_variance).tolist() == pytest.approx([(math.e + 2) / 2, 0.0])


def test_kl_gradient_pulls_towards_the_prior():
    mean, log_variance = (torch.tensor([[v]], dtype=torch.float64, requires_grad=True) for v in (0.7, -1.0))
    gradients = torch.autograd.grad(gaussian_kl(mean, log_variance).sum(), (mean, log_variance))
    assert [g.item() for g in gradients] == pytest.approx([0.7, (math.exp(-1) - 1) / 2])


def test_nll_is_bernoullis_for_black_and_white():
    logits, images = normal(3, 1, 4, 4), normal(3, 1, 4, 4, seed=1).sign()
    expected = -Bernoulli(logits=logits).log_prob((images + 1) / 2).sum(dim=(1, 2, 3))
    torch.testing.assert_close(bernoulli_nll(logits, images), expected)


def test_nll_is_least_at_the_pixels_and_there_their_entropy():
    images = torch.tensor([-0.5, 0.2, 0.9], dtype=torch.float64).view(1, 1, 1, 3)
    p = (images + 1) / 2
    logits = p.logit().requires_grad_()
    nll = bernoulli_nll(logits, images)
    torch.testing.assert_close(nll, Bernoulli(p).entropy().sum().view(1))
    (gradient,) = torch.autograd.grad(nll.sum(), logits)
    assert gradient.abs().max() < 1e-15
    torch.testing.assert_close(reconstruction(logits), images)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="differ in shape"):
        gaussian_kl(torch.zeros(2, 3), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="differ in shape"):
        bernoulli_nll(torch.zeros(2, 1, 4, 4), torch.zeros(2, 3, 4, 4))
