"""The evidence lower bound of a variational autoencoder with Gaussian codes and Bernoulli pixels.

Kingma and Welling, ICLR 2014 (arXiv 1312.6114): log p(x) >= E_q log p(x | z) - KL(q(z | x) || N(0, I)). Pixels are
taken as probabilities of a Bernoulli, as in the public code of ACAI (Berthelot et al., ICLR 2019, arXiv 1807.07543).
Both terms are sums over an image's pixels or codes, in nats, for each image: a batch's loss is their mean.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, diag(exp(log_variance))) || N(0, I)) = 1/2 sum_j (exp(v_j) + m_j^2 - 1 - v_j) (appendix B).

    Args:
        mean, log_variance: (N, ...) of one shape.

    Returns:
        (N,) in nats, at least 0.

    Raises:
        ValueError: if the shapes differ.
    """
    if mean.shape != log_variance.shape:
        raise ValueError(f"mean {tuple(mean.shape)} and log_variance {tuple(log_variance.shape)} differ in shape")
    terms = log_variance.exp() + mean.square() - 1 - log_variance
    return 0.5 * terms.flatten(1).sum(dim=1)


def bernoulli_nll(logits: Tensor, images: Tensor) -> Tensor:
    """-log p(x | z): the cross-entropy of sigmoid(logits) with the pixels, taken as probabilities (x + 1) / 2.

    Its least value is not 0 but the entropy of the pixels, as grey ones are no coin that fell.

    Args:
        logits: (N, C, H, W).
        images: (N, C, H, W) in [-1, 1].

    Returns:
        (N,) in nats, at least 0.

    Raises:
        ValueError: if the shapes differ.
    """
    if logits.shape != images.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and images {tuple(images.shape)} differ in shape")
    terms = F.binary_cross_entropy_with_logits(logits, (images + 1) / 2, reduction="none")
    return terms.flatten(1).sum(dim=1)


def reconstruction(logits: Tensor) -> Tensor:
    """The mean image of Bernoulli pixels, in [-1, 1]: 2 sigmoid(logits) - 1."""
    return 2 * torch.sigmoid(logits) - 1
