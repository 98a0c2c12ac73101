"""The loss of classifiers on activations and gradients (Mu, Liang, Li; ICLR 2020, arXiv 2004.05529)."""

import torch.nn.functional as F
from torch import Tensor

from hfkd.errors import InputError


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean loss (0-dim) of `logits` (N, C): which one, the labels say.

    Integer labels (N,) give the softmax cross-entropy of section 3.1. Float labels (N, C) of zeros and ones, for
    several classes per image, give the binary cross-entropy with logits, the mean over images and classes; the paper
    does not name its loss on VOC07 and COCO (inferred: that of the benchmark it cites).

    Raises:
        InputError: labels of another kind or shape.
    """
    if labels.is_floating_point() and labels.shape == logits.shape:
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    if not labels.is_floating_point() and labels.shape == logits.shape[:1]:
        return F.cross_entropy(logits, labels)
    raise InputError(
        f"labels of shape {tuple(labels.shape)} and type {labels.dtype} do not fit logits of shape "
        f"{tuple(logits.shape)}: give class numbers (N,), or float zeros and ones (N, C)"
    )
