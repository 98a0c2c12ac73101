"""Logistic regression on features: the classifier omega that gradient features start from."""

import math
import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from hfkd.errors import InputError


logger = logging.get_logger(__name__)

MAX_ITERATIONS = 2000


def fit_logistic_regression(
    features: Tensor, labels: Tensor, num_classes: int, weight_decay: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Weight (C, d) and bias (C,), float64 on the CPU, of the linear classifier that fits `features` (N, d) best.

    Integer labels (N,) give multinomial logistic regression, float or boolean labels (N, C) of zeros and ones one
    logistic regression for each class (one against the rest). Deterministic: L-BFGS (scikit-learn) on standardised
    features, mapped back to the features as they are.

    Args:
        num_classes: C. A class that no image has gets no weight, and a bias that makes it as rare as half an image.
        weight_decay: the mean loss has this times `||W||^2 / 2` added, W in standardised coordinates: the convention
            of torch's optimizers, so scikit-learn's C is `1 / (weight_decay * N)`.

    Raises:
        InputError: shapes that do not agree, no image, features that are not finite, a weight decay that is not
            positive, or a single class.
    """
    _check(features, labels, num_classes, weight_decay)
    scaler = StandardScaler().fit(features.double().cpu().numpy())
    inputs, targets = scaler.transform(features.double().cpu().numpy()), labels.cpu().numpy()
    strength = 1 / (weight_decay * len(inputs))
    rarity = 0.5 / len(inputs)
    if labels.dim() == 1:
        weight, bias = _multinomial(inputs, targets, num_classes, strength, rarity)
    else:
        columns = tqdm(targets.T, desc="Fitting omega", unit="class", delay=2, leave=False)
        rows = [_against_the_rest(inputs, column, strength, rarity) for column in columns]
        weight, bias = np.stack([row for row, _ in rows]), np.array([offset for _, offset in rows])
    weight = weight / scaler.scale_
    return torch.from_numpy(weight), torch.from_numpy(bias - weight @ scaler.mean_)


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
    inputs: np.ndarray, targets: np.ndarray, num_classes: int, strength: float, rarity: float
) -> tuple[np.ndarray, np.ndarray]:
    present = np.unique(targets)
    if len(present) == 2:  # scikit-learn has one row here, in place of two of half its length and half its penalty
        row, offset = _fit(inputs, targets, 2 * strength)
        found_weight, found_bias = np.vstack([-row, row]) / 2, np.hstack([-offset, offset]) / 2
    else:
        found_weight, found_bias = _fit(inputs, targets, strength)
    weight = np.zeros((num_classes, inputs.shape[1]))
    bias = np.full(num_classes, np.log(np.exp(found_bias - found_bias.max()).sum() * rarity) + found_bias.max())
    weight[present], bias[present] = found_weight, found_bias
    return weight, bias


def _against_the_rest(
    inputs: np.ndarray, target: np.ndarray, strength: float, rarity: float
) -> tuple[np.ndarray, float]:
    if target.min() == target.max():
        return np.zeros(inputs.shape[1]), math.log(rarity / (1 - rarity)) * (-1 if target.max() else 1)
    weight, bias = _fit(inputs, target, strength)
    return weight[0], float(bias[0])


def _fit(inputs: np.ndarray, targets: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    solver = LogisticRegression(C=strength, max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        solver.fit(inputs, targets)
    if any(issubclass(warning.category, ConvergenceWarning) for warning in caught):
        logger.warning(f"logistic regression has not converged in {MAX_ITERATIONS} iterations; it is used as it is")
    return solver.coef_, solver.intercept_
