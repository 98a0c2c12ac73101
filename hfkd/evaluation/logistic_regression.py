"""Logistic regression on features: the classifier omega that gradient features start from."""

from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit, logit, logsumexp, softmax
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from hfkd.errors import InputError


logger = logging.get_logger(__name__)

MAX_ITERATIONS = 5000
TOLERANCE = 1e-6

Loss = Callable[[np.ndarray, np.ndarray], tuple[float, np.ndarray]]


def fit_logistic_regression(
    features: Tensor, labels: Tensor, num_classes: int, weight_decay: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Weight (C, d) and bias (C,), float64 on the CPU, of the linear classifier that fits `features` (N, d) best.

    Integer labels (N,) give multinomial logistic regression, float or boolean labels (N, C) of zeros and ones one
    logistic regression for each class (one against the rest). What is minimised is the mean loss (with several labels
    the sum of the classes' mean losses) plus `weight_decay / 2 * ||W||^2`, to the optimum: L-BFGS (SciPy) in float64
    stops where no component of the gradient is above `TOLERANCE` times the root of that weight's curvature at the
    start, and warns where `MAX_ITERATIONS` do not get it there. Deterministic.

    Args:
        num_classes: C. A class that no image has gets no weight, and a bias that makes it as rare as half an image.
        weight_decay: of the weights W of the features as they are, and not of the bias: what torch's optimizers do.

    Raises:
        InputError: shapes that do not agree, no image, features that are not finite, a weight decay that is not
            positive, or a single class.
    """
    _check(features, labels, num_classes, weight_decay)
    inputs = features.double().cpu().numpy()
    mean, varies = inputs.mean(0), np.ptp(inputs, axis=0) > 0
    fit = _multinomial if labels.dim() == 1 else _against_the_rest
    weight, bias = fit(inputs - mean, labels.cpu().numpy(), num_classes, weight_decay)
    weight *= varies  # the least weight of a constant feature is 0, up to the rounding of the axes
    return torch.from_numpy(weight), torch.from_numpy(bias - weight @ mean)


def _check(features: Tensor, labels: Tensor, num_classes: int, weight_decay: float) -> None:
    fits = labels.shape in (features.shape[:1], (len(features), num_classes))
    if features.dim() != 2 or not fits or len(features) == 0:
        raise InputError(
            f"logistic regression on features of shape {tuple(features.shape)} with labels of shape "
            f"{tuple(labels.shape)}: needs (N, d) features and (N,) or (N, {num_classes}) labels, N > 0"
        )
    if not features.isfinite().all():
        raise InputError("logistic regression: the features hold NaN or infinite values: choose another base network")
    if not weight_decay > 0:
        raise InputError(f"weight_decay={weight_decay}: logistic regression needs one above 0")
    if labels.dim() == 1 and len(labels.unique()) < 2:
        raise InputError(f"all {len(labels)} training images have one class: a classifier needs two")


def _multinomial(
    inputs: np.ndarray, labels: np.ndarray, num_classes: int, weight_decay: float
) -> tuple[np.ndarray, np.ndarray]:
    targets = np.eye(num_classes)[labels]
    present = targets.any(0)
    rates = targets[:, present].mean(0)
    found_weight, found_bias = _minimise(
        _cross_entropy, inputs, targets[:, present], np.log(rates), rates * (1 - rates), weight_decay
    )
    weight = np.zeros((num_classes, inputs.shape[1]))
    bias = np.full(num_classes, logsumexp(found_bias) + np.log(0.5 / len(inputs)))
    weight[present], bias[present] = found_weight, found_bias
    return weight, bias


def _against_the_rest(
    inputs: np.ndarray, labels: np.ndarray, num_classes: int, weight_decay: float
) -> tuple[np.ndarray, np.ndarray]:
    targets = labels.astype(np.float64)
    rarity = 0.5 / len(inputs)
    rates = targets.mean(0).clip(rarity, 1 - rarity)
    weight, bias = np.zeros((num_classes, inputs.shape[1])), logit(rates)
    mixed = targets.min(0) < targets.max(0)
    if mixed.any():
        curvature = (rates * (1 - rates))[mixed]
        weight[mixed], bias[mixed] = _minimise(
            _binary_cross_entropy, inputs, targets[:, mixed], bias[mixed], curvature, weight_decay
        )
    return weight, bias


def _cross_entropy(logits: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    return float((logsumexp(logits, axis=1) - (logits * targets).sum(1)).sum()), softmax(logits, axis=1) - targets


def _binary_cross_entropy(logits: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    return float((np.logaddexp(0, logits) - logits * targets).sum()), expit(logits) - targets


def _minimise(
    loss: Loss, inputs: np.ndarray, targets: np.ndarray, bias: np.ndarray, curvature: np.ndarray, weight_decay: float
) -> tuple[np.ndarray, np.ndarray]:
    """Weight (C, d) and bias (C,) of least mean loss plus decay, from weight 0 and `bias`.

    Features that differ in size, or go together, make this slow. So the solver sees them (N, d, of mean 0) along their
    principal axes, which leaves `||W||^2` as it is, and W times the root of its curvature at the start. That is the
    variance along the axis times the loss's curvature by the logit (`curvature`, (C,)), plus the decay.
    """
    axes = np.linalg.eigh(inputs.T @ inputs)[1]
    inputs = inputs @ axes
    shape = (len(bias), inputs.shape[1])
    scale = np.sqrt(np.outer(curvature, np.square(inputs).mean(0)) + weight_decay)
    bias_scale = np.sqrt(curvature)

    def unpack(position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return position[: -len(bias)].reshape(shape) / scale, position[-len(bias) :] / bias_scale

    def objective(position: np.ndarray) -> tuple[float, np.ndarray]:
        weight, offset = unpack(position)
        value, slope = loss(inputs @ weight.T + offset, targets)
        by_weight = (slope.T @ inputs / len(inputs) + weight_decay * weight) / scale
        by_offset = slope.mean(0) / bias_scale
        decay = weight_decay / 2 * np.square(weight).sum()
        return value / len(inputs) + decay, np.concatenate([by_weight.ravel(), by_offset])

    start = np.concatenate([np.zeros(scale.size), bias * bias_scale])
    options = {"maxiter": MAX_ITERATIONS, "maxfun": 2 * MAX_ITERATIONS, "gtol": TOLERANCE, "ftol": 0, "maxcor": 20}
    with tqdm(desc="Fitting omega", unit="iteration", delay=2, leave=False) as bar:
        found = minimize(
            objective, start, jac=True, method="L-BFGS-B", options=options, callback=lambda _: bar.update()
        )
    if np.abs(found.jac).max() > TOLERANCE:
        logger.warning(
            f"logistic regression has not converged in {found.nit} iterations: its gradient is still "
            f"{np.abs(found.jac).max():.1e}; it is used as it is"
        )
    weight, offset = unpack(found.x)
    return weight @ axes.T, offset
