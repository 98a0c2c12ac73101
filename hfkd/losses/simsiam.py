"""SimSiam's loss (Chen and He, CVPR 2021, arXiv 2011.10566): two views that predict each other.

A view's representation z = f(x) is given by the student, and its prediction p = h(z) by a predictor. A representation
is only a target: no gradient goes through it, which is what keeps the method from collapsing.
"""

import torch.nn.functional as F
from torch import Tensor


def negative_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """-cos(p, stopgrad(z)), as a mean over N samples (eq. 1); in [-1, 1].

    Args:
        prediction: (N, D), which gets the gradient.
        target: (N, D), which gets none.

    Raises:
        ValueError: unequal shapes.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"predictions of shape {tuple(prediction.shape)} for targets of {tuple(target.shape)}")
    return -F.cosine_similarity(prediction, target.detach(), dim=1).mean()


def simsiam_loss(predictions: tuple[Tensor, Tensor], representations: tuple[Tensor, Tensor]) -> Tensor:
    """D(p, stopgrad(z')) / 2 + D(p', stopgrad(z)) / 2 with D of `negative_cosine` (eq. 2 and 4); in [-1, 1].

    Args:
        predictions: p and p' (N, D) of two views of the same images.
        representations: z and z' (N, D) of the same views.
    """
    (first, second), (own, other) = predictions, representations
    return (negative_cosine(first, other) + negative_cosine(second, own)) / 2
