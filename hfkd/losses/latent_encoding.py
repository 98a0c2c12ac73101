"""Losses of an encoder into a generator's latents (Squeeze-and-Span, arXiv 2211.03000, eq. 3).

Of a synthetic image the latents are known, of a real one there is only the image that the generator makes of the code.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def latent_loss(codes: Tensor, latents: Tensor) -> Tensor:
    """Mean over all entries of (w - w')^2, of codes and latents of one shape (N, ...).

    Raises ValueError where the shapes differ.
    """
    _check_shapes("latents", codes, latents)
    return F.mse_loss(codes, latents)


def reconstruction_loss(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean over all entries of |G(w) - x|, of images (N, C, H, W); in [0, 2] for pixels in [-1, 1].

    Raises ValueError where the shapes differ.
    """
    _check_shapes("images", images, reconstructions)
    return F.l1_loss(reconstructions, images)


def perceptual_distance(maps: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """How far two images' features of a network are apart, as a mean over N images; in [0, 4] for each map.

    Each map (N, C, H, W) is scaled to length 1 over its channels at every position; squared differences are summed
    over channels, averaged over positions, and summed over maps. That is LPIPS (Zhang et al., CVPR 2018, arXiv
    1801.03924, eq. 1) without its learned weights of the channels.

    Raises:
        ValueError: no maps, or maps of other shapes.
    """
    if not maps or len(maps) != len(others):
        raise ValueError(f"{len(maps)} and {len(others)} maps: give as many of both images, and one or more")
    distances = []
    for own, other in zip(maps, others, strict=True):
        _check_shapes("maps", own, other)
        difference = F.normalize(own, dim=1) - F.normalize(other, dim=1)
        distances.append(difference.square().sum(dim=1).mean())
    return torch.stack(distances).sum()


def _check_shapes(what: str, one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape:
        raise ValueError(f"{what} of shape {tuple(one.shape)} and {tuple(other.shape)} differ in shape")
