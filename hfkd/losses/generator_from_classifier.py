"""Losses of GBC: a generator born from a classifier, out of the conditions that the classifier's weights satisfy.

The idea is Yu and Wang's (NeurIPS 2023, arXiv 2312.02470): weights theta that training has brought to convergence are
a Karush-Kuhn-Tucker point of a maximum-margin problem, and a generator is trained until its images satisfy the
conditions of that point. No formula of the paper could be obtained: every formula here is ours. The theory behind
them is that of Lyu and Li (ICLR 2020, arXiv 1906.05890) and, with biases and batch norm, of Kunin et al. (ICLR 2023,
arXiv 2210.03820):

    stationarity          theta = sum_i mu_i d m_i / d theta     on a set S of parameters, with multipliers mu_i >= 0
    primal feasibility    m_i >= gamma                           m_i the margin of image i, gamma the margin's scale
    slackness             mu_i (m_i - gamma) = 0

The sum of gradients is the gradient of one scalar, a potential, so no per-sample gradient is ever made: `gradients_of`
a potential, times `closed_form_scale` where the multipliers are known up to a factor, goes into `stationarity_loss`.
The other two conditions are a "duality" loss of the ratio m_i / gamma. Sums over a batch stand for sums over the
training set; the unknown number of images is absorbed in the multipliers.
"""

import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from hfkd.errors import InputError


EXPONENTIAL_BELOW = -40.0  # nats
NORM_FLOOR = 1e-3  # of the largest squared norm in S: zero biases would otherwise outweigh everything


# -- margins and potentials ------------------------------------------------------------------------------------------


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """m_i = z_y - max_{j != y} z_j: the distance to the second-best class, negative for wrong answers.

    Args:
        logits: (N, C), z, with C >= 2.
        labels: (N,) class numbers, y, int64.

    Returns:
        (N,). Where classes tie for the maximum, the gradient is that of one of them.

    Raises:
        InputError: other shapes, or fewer than two classes.
    """
    own, others = _own_and_others(logits, labels)
    return own - others.max(dim=1).values


def weighted_margin_potential(logits: Tensor, labels: Tensor, multipliers: Tensor) -> Tensor:
    """mean_i mu_i m_i (0-dim): its gradient is the right side of stationarity, with one multiplier per image.

    Args:
        logits, labels: as in `margins`.
        multipliers: (N,), mu_i >= 0, of a network or constant. They keep their graph and stay trainable, as
            `gradients_of` differentiates by the classifier's parameters, on which they do not depend.

    Raises:
        InputError: as in `margins`, or multipliers of another shape.
    """
    if multipliers.shape != labels.shape:
        raise InputError(
            f"multipliers of shape {tuple(multipliers.shape)} do not fit labels of shape {tuple(labels.shape)}: "
            "give one for each image"
        )
    return (multipliers * margins(logits, labels)).mean()


def cross_entropy_potential(logits: Tensor, labels: Tensor, temperature: float | Tensor) -> Tensor:
    """-mean CE(z / T, y) (0-dim): its gradient weighs the margins z_y - z_j by the softmax p_j of z / T, over T.

    These are the multipliers, up to one scale, to which training by cross-entropy converges (at T = 1), and exactly
    those of a stationary point of cross-entropy with weight decay. They are never negative and fade beyond the margin.

    The cross-entropy is softplus(logsumexp_{j != y} z_j / T - z_y / T), which keeps its relative precision where
    log-softmax has lost it: single precision cannot tell a p_y of 1 - 1e-8 from 1, and such images make up a
    converged classifier's gradient.

    Args:
        logits, labels: as in `margins`.
        temperature: T > 0, a number or a 0-dim tensor.

    Raises:
        InputError: as in `margins`, or a number T that is not positive.
    """
    log_odds = _log_odds_of_error(logits, labels, temperature)
    # Further out softplus is exp to the last bit, and exp alone has two derivatives down to the smallest numbers.
    near = F.softplus(log_odds.clamp_min(EXPONENTIAL_BELOW))
    far = log_odds.clamp_max(EXPONENTIAL_BELOW).exp()
    return -torch.where(log_odds < EXPONENTIAL_BELOW, far, near).mean()


def cross_entropy_multipliers(logits: Tensor, labels: Tensor, temperature: float | Tensor) -> Tensor:
    """(N,) sum_{j != y} p_j in (0, 1): each image's whole weight in `cross_entropy_potential`, for `walls_duality`.

    Arguments and errors as there.
    """
    return F.logsigmoid(_log_odds_of_error(logits, labels, temperature)).exp()


def implied_margin_scale(loss: float, num_classes: int) -> float:
    """gamma = log((C - 1) / loss): the margin at which the mean cross-entropy is `loss`, if all margins are equal.

    For classifiers that come without their margins; it holds where the loss is small.

    Args:
        loss: mean cross-entropy on the training set, in nats, in (0, C - 1).
        num_classes: C >= 2.

    Raises:
        InputError: a loss for which this is not a positive number.
    """
    if not 0 < loss < num_classes - 1:
        raise InputError(
            f"loss={loss} of {num_classes} classes implies no margin, which needs 0 < loss < {num_classes - 1}: "
            "give the margin's scale itself"
        )
    return math.log((num_classes - 1) / loss)


# -- stationarity ----------------------------------------------------------------------------------------------------


def gradients_of(potential: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """G_n = d potential / d theta_n by name, themselves differentiable (by images and multipliers).

    One backward pass, whatever the batch. The graph of the result reaches the parameters too: a later `backward()`
    would fill their `.grad`, so give it the generator's parameters as `inputs`.

    Args:
        potential: 0-dim.
        parameters: theta_n, tensors that require grad. Those that the potential does not depend on get zeros.
    """
    gradients = torch.autograd.grad(potential, list(parameters.values()), create_graph=True, materialize_grads=True)
    return dict(zip(parameters, gradients, strict=True))


def closed_form_scale(parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor], *, per_group: bool) -> Tensor:
    """kappa = max(0, <theta, G> / <G, G>), the non-negative scale at which kappa G has the least stationarity loss.

    The inner products weigh the groups as `stationarity_loss` does; its zero-force term has no part in them.

    Args:
        parameters, gradients, per_group: as in `stationarity_loss`.

    Returns:
        0-dim, with a graph through G. 0 where G = 0, and where G points away from theta. Squares of small gradients
        do not underflow: inside, they are taken in units of their largest entry. But the result, and what is
        differentiated through it, goes as the inverse of G, and overflows next to the smallest numbers of the type.

    Raises:
        InputError: no parameters.
    """
    weights = _group_weights(_squared_norms(parameters), per_group)
    tiny = torch.finfo(weights.dtype).tiny
    unit = torch.stack([gradients[name].detach().abs().max() for name in parameters]).max().clamp_min(tiny)
    scaled = {name: gradients[name] / unit for name in parameters}
    along = torch.stack([(theta.detach() * scaled[name]).sum() for name, theta in parameters.items()])
    across = torch.stack([gradient.square().sum() for gradient in scaled.values()])
    # clamp_min, not relu, here and below: callers may be inside `smooth_relu_gates`.
    return (weights * along).sum().clamp_min(0) / (weights * across).sum().clamp_min(tiny) / unit


def stationarity_loss(
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    *,
    per_group: bool,
    zero_gradients: Iterable[Tensor] = (),
    zero_weight: float = 0.0,
) -> Tensor:
    """How far theta = G is from holding, relative to theta: 0 where it holds, 1 at G = 0.

    per group    1/|S| sum_n ||theta_n - G_n||^2 / ||theta_n||^2
    globally     sum_n ||theta_n - G_n||^2 / sum_n ||theta_n||^2
    and to both  zero_weight sum_n' ||G_n'||^2 / (1/|S| sum_n ||theta_n||^2)

    Per group, a ||theta_n||^2 below 1e-3 of the largest counts as that. The square root is the relative distance.

    Args:
        parameters: theta_n for n in S, by name; constants here, without a gradient.
        gradients: G_n, the scaled gradient of a potential, for at least the same names.
        per_group: which of the two.
        zero_gradients: G_n' of the parameters that grow slower than those of S, on which the force must vanish.
        zero_weight: of their term, >= 0.

    Returns:
        0-dim.

    Raises:
        InputError: no parameters.
    """
    squared_norms = _squared_norms(parameters)
    residuals = [(theta.detach() - gradients[name]).square().sum() for name, theta in parameters.items()]
    loss = (_group_weights(squared_norms, per_group) * torch.stack(residuals)).sum()
    forces = [gradient.square().sum() for gradient in zero_gradients] if zero_weight else []
    if forces:
        loss = loss + zero_weight * torch.stack(forces).sum() / squared_norms.mean()
    return loss


# -- duality and the images' prior -----------------------------------------------------------------------------------


def symmetric_duality(ratio: Tensor) -> Tensor:
    """log(1 + (r - 1)^2) of r = m / gamma (N,): every image on the margin; 0 at r = 1, its slope within [-1, 1]."""
    return torch.log1p((ratio - 1).square())


def walls_duality(ratio: Tensor, multipliers: Tensor, primal_weight: float = 4.0, tolerance: float = 0.5) -> Tensor:
    """A max(0, 1 - r)^2 + mu_i/mean(mu) max(0, r - 1 - delta)^2 of r = m / gamma: 0 on [1, 1 + delta].

    The left wall is primal feasibility. The right one is slackness: only images with weight have to be on the margin.

    Args:
        ratio: (N,), r.
        multipliers: (N,), mu_i >= 0, detached here.
        primal_weight: A.
        tolerance: delta >= 0.

    Returns:
        (N,).
    """
    weights = multipliers.detach()
    weights = weights / weights.mean().clamp_min(torch.finfo(weights.dtype).tiny)
    left, right = (1 - ratio).clamp_min(0), (ratio - 1 - tolerance).clamp_min(0)
    return primal_weight * left.square() + weights * right.square()


def total_variation(images: Tensor) -> Tensor:
    """mean |x[r+1, c] - x[r, c]| + mean |x[r, c+1] - x[r, c]| (0-dim) of pixels in units of [0, 1].

    That the paper uses a total variation in pixel space is known, its formula is not.

    Args:
        images: (N, C, H, W) in [-1, 1], the generator's range, so differences are halved. An axis of one pixel has
            none.
    """
    steps = [images.diff(dim=axis).abs().mean() for axis in (2, 3) if images.shape[axis] > 1]
    return torch.stack(steps).sum() / 2 if steps else images.new_zeros(())


def pixel_mean(pixel_values: Tensor) -> Tensor:
    """mean over the images of (mean over an image's pixels)^2 (0-dim) of a classifier's input; ours.

    A normaliser that was made for the training images has taken their mean away, which the weights say only softly. It
    is asked of each image: those that lie on either side of it, such as inverted ones, would even out.

    Args:
        pixel_values: (N, C, H, W), normalised.
    """
    return pixel_values.flatten(1).mean(dim=1).square().mean()


# -- parts -----------------------------------------------------------------------------------------------------------


def _own_and_others(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """z_y (N,), and the logits (N, C) with -inf in its place."""
    if logits.ndim != 2 or logits.shape[1] < 2 or labels.shape != logits.shape[:1]:
        raise InputError(
            f"logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)} have no margins: give "
            "logits (N, C) of at least two classes and labels (N,)"
        )
    column = labels[:, None]
    return logits.gather(1, column).squeeze(1), logits.scatter(1, column, -math.inf)


def _log_odds_of_error(logits: Tensor, labels: Tensor, temperature: float | Tensor) -> Tensor:
    """(N,) log(sum_{j != y} p_j / p_y)."""
    if not isinstance(temperature, Tensor) and not temperature > 0:  # to read a tensor would stop for the device
        raise InputError(f"temperature={temperature} must be positive")
    own, others = _own_and_others(logits / temperature, labels)
    return others.logsumexp(dim=1) - own


def _squared_norms(parameters: Mapping[str, Tensor]) -> Tensor:
    """(|S|,) ||theta_n||^2, without a graph."""
    if not parameters:
        raise InputError("the stationarity set has no parameters: choose a set that names some")
    return torch.stack([theta.detach().square().sum() for theta in parameters.values()])


def _group_weights(squared_norms: Tensor, per_group: bool) -> Tensor:
    """(|S|,) what each group's squared residual is multiplied by."""
    sizes = squared_norms.clamp_min(NORM_FLOOR * squared_norms.max()) if per_group else squared_norms.mean()
    floor = torch.finfo(squared_norms.dtype).tiny
    return 1 / (len(squared_norms) * sizes.clamp_min(floor).expand_as(squared_norms))
