"""Whether representations have collapsed: to a point (no deviation), or to few dimensions (a low rank)."""

import torch
from torch import Tensor


def mean_standard_deviation(z: Tensor) -> Tensor:
    """Mean over dimensions of the (unbiased) standard deviation of z (N, D); 0-dim, 0 for constant outputs."""
    return z.detach().double().std(dim=0).mean()


def effective_rank(z: Tensor) -> Tensor:
    """Effective number of dimensions that z (N, D) varies in: 0-dim, from 1 to min(N - 1, D).

    It is the exponential of the entropy of the centred z's squared singular values as shares of their sum (Roy and
    Vetterli, EUSIPCO 2007, who take the values themselves): 1 for constant z, NaN where z is not finite.
    """
    if not torch.isfinite(z).all():
        return torch.tensor(torch.nan)
    centred = z.detach().double()
    centred = centred - centred.mean(dim=0)
    gram = centred @ centred.T if len(z) < z.shape[1] else centred.T @ centred
    squares = torch.linalg.eigvalsh(gram).clamp(min=0)
    shares = squares / squares.sum().clamp(min=torch.finfo(squares.dtype).tiny)
    return torch.special.entr(shares).sum().exp()


def collapse_warning(deviation: float, rank: float, most: int, gamma: float = 1.0) -> str | None:
    """What is wrong with representations of these statistics, in words; None where nothing is.

    Args:
        deviation: of `mean_standard_deviation`.
        rank: of `effective_rank`.
        most: the rank that they could have, min(N - 1, D); theirs says something where this is above 8.
        gamma: the deviation that they should have.
    """
    if deviation < 0.1 * gamma:
        return f"their mean standard deviation is {deviation:.3g}, where {gamma:.3g} is wanted: they hardly vary"
    if rank < 2 and most > 8:
        return f"their effective rank is {rank:.2f} of {most}: they vary in one direction only"
    return None
