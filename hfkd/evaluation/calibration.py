"""Whether a classifier is as often right as it is sure."""

from torch import Tensor

from hfkd.errors import InputError


BINS = 15


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """ECE, in [0, 1]: the mean gap between confidence and accuracy (Guo et al., ICML 2017, equation 3).

    sum over the bins b of (n_b / N) |accuracy_b - confidence_b|, with `bins` of equal width in the confidence, which
    is the largest softmax probability.

    Args:
        logits: (N, K).
        labels: class numbers (N,).

    Raises:
        InputError: shapes that do not agree, or nothing to measure.
    """
    # Importing torchmetrics takes a second, which those who measure something else need not wait.
    from torchmetrics.functional.classification import multiclass_calibration_error

    if logits.dim() != 2 or labels.shape != logits.shape[:1] or len(labels) == 0:
        raise InputError(
            f"calibration of logits {tuple(logits.shape)} with labels {tuple(labels.shape)}: "
            "pass (N, K) and (N,) with N > 0"
        )
    probabilities = logits.double().softmax(dim=-1)
    return float(multiclass_calibration_error(probabilities, labels, num_classes=logits.shape[-1], n_bins=bins))
