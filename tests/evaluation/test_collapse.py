"""Deviation and effective rank by hand, and what is called a collapse."""

import math

import pytest
import torch

from hfkd.evaluation.collapse import collapse_warning, effective_rank, mean_standard_deviation


def orthogonal(count, width):
    """Centred columns at right angles, of squared length 1."""
    draws = torch.randn(count, width + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws[:, 0] = 1
    return torch.linalg.qr(draws)[0][:, 1:]


@pytest.mark.parametrize(("count", "width"), [(20, 4), (5, 12)])
def test_rank_is_the_entropy_of_squared_singular_values(count, width):
    z = torch.randn(count, width, generator=torch.Generator().manual_seed(1))
    squares = torch.linalg.svdvals((z - z.mean(0)).double()).square()
    shares = squares / squares.sum()
    expected = (-(shares * shares.clamp(min=1e-300).log()).sum()).exp()
    assert effective_rank(z).item() == pytest.approx(expected.item())


def test_rank_by_hand():
    z = orthogonal(20, 3)
    assert effective_rank(z + 7).item() == pytest.approx(3)
    assert effective_rank(z * torch.tensor([1.0, 1.0, 0.0])).item() == pytest.approx(2)
    # Shares of 4/5 and 1/5.
    expected = math.exp(-0.8 * math.log(0.8) - 0.2 * math.log(0.2))
    assert effective_rank(z * torch.tensor([2.0, 1.0, 0.0])).item() == pytest.approx(expected)
    assert effective_rank(torch.ones(4, 3)).item() == 1
    assert math.isnan(effective_rank(torch.full((4, 3), math.nan)).item())


def test_deviation():
    assert mean_standard_deviation(torch.tensor([[0.0, 1.0], [2.0, 1.0]])).item() == pytest.approx(math.sqrt(2) / 2)


@pytest.mark.parametrize(
    ("deviation", "rank", "most", "gamma", "found"),
    [
        (0.05, 20.0, 64, 1.0, "deviation is 0.05"),
        (1.0, 1.2, 64, 1.0, "rank is 1.20 of 64"),
        (1.0, 1.2, 8, 1.0, None),
        (0.05, 20.0, 64, 0.1, None),
        (0.9, 3.0, 64, 1.0, None),
    ],
)
def test_what_is_called_a_collapse(deviation, rank, most, gamma, found):
    warning = collapse_warning(deviation, rank, most, gamma)
    assert warning is None if found is None else found in warning
