"""What a discriminator's images go through, real and generated ones alike, so that few real images are not learned by
heart: the operations of DiffAugment, and ADA's rule for how often they are applied.

DiffAugment (Zhao et al., NeurIPS 2020, arXiv 2006.10738) applies all of them always; ADA (Karras et al., NeurIPS 2020,
arXiv 2006.06676) each with a probability that it adapts. ADA's own pipeline has more operations (rotation, scaling,
hue); here both rules use DiffAugment's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hfkd.errors import InputError


OPERATIONS = ("color", "translation", "cutout")
_SHIFT, _CUT = 1 / 8, 1 / 2  # greatest translation and side of the hole, as fractions of the image's side


@dataclass(frozen=True)
class GanAugmentation:
    """Differentiable operations on images, each sample with draws of its own.

    Attributes:
        operations: of `OPERATIONS`, which follow each other in this order. `color` is three: brightness plus
            U(-0.5, 0.5), saturation times U(0, 2), contrast times U(0.5, 1.5). `translation` moves by up to 1/8 of a
            side, `cutout` makes a hole of half a side; what they leave empty is grey, 0.

    Raises:
        InputError: no operation, or an unknown one.
    """

    operations: tuple[str, ...] = OPERATIONS

    # Of a sample: whether and how much, for each operation. Fixed, so that none depends on which others are used.
    DRAWS = 12

    def __post_init__(self) -> None:
        if not self.operations or not set(self.operations) <= set(OPERATIONS):
            raise InputError(
                f"augmentation operations {list(self.operations)}: choose one or more of {', '.join(OPERATIONS)}"
            )

    def __call__(self, images: Tensor, draws: Tensor, probability: Tensor | float = 1.0) -> Tensor:
        """The images (N, C, H, W) in [-1, 1], augmented; color may leave the range.

        Args:
            draws: uniform in [0, 1), float64 (N, DRAWS), of `keyed_uniform`.
            probability: with which each operation is applied to an image, by itself; 0-dim.
        """
        columns = iter(draws.unbind(1))
        brightness, saturation, contrast = ((next(columns) < probability, next(columns)) for _ in range(3))
        moved, down, right = next(columns) < probability, next(columns), next(columns)
        cut, top, left = next(columns) < probability, next(columns), next(columns)
        if "color" in self.operations:
            images = images + _where(brightness[0], brightness[1] - 0.5, 0.0, images)
            mean = images.mean(dim=1, keepdim=True)
            images = mean + (images - mean) * _where(saturation[0], 2 * saturation[1], 1.0, images)
            mean = images.mean(dim=(1, 2, 3), keepdim=True)
            images = mean + (images - mean) * _where(contrast[0], contrast[1] + 0.5, 1.0, images)
        if "translation" in self.operations:
            images = _translate(images, moved, down, right)
        if "cutout" in self.operations:
            images = _cut_out(images, cut, top, left)
        return images


def _where(applied: Tensor, value: Tensor, otherwise: float, images: Tensor) -> Tensor:
    """(N, 1, 1, 1): `value` (N,) where the operation is applied, in the type of `images`."""
    return torch.where(applied, value, otherwise).to(images.dtype).view(-1, 1, 1, 1)


def _translate(images: Tensor, applied: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Whole pixels; one look-up of source pixels, and grey where there are none."""
    sources, inside = [], []
    for size, draw in zip(images.shape[2:], (down, right), strict=True):
        reach = round(size * _SHIFT)
        shift = ((draw * (2 * reach + 1)).long() - reach) * applied
        position = torch.arange(size, device=images.device) - shift[:, None]
        inside.append((position >= 0) & (position < size))
        sources.append(position.clamp(0, size - 1))
    (rows, columns), width = sources, images.shape[3]
    source = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
    moved = images.flatten(2).gather(2, source[:, None, :].expand(-1, images.shape[1], -1)).view(images.shape)
    return moved * (inside[0][:, :, None] & inside[1][:, None, :])[:, None]


def _cut_out(images: Tensor, applied: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """A hole whose centre is uniform over the image's pixels; it may hang over the border."""
    holes = []
    for size, draw in zip(images.shape[2:], (top, left), strict=True):
        side = round(size * _CUT)
        first = (draw * size).long() - side // 2
        position = torch.arange(size, device=images.device) - first[:, None]
        holes.append((position >= 0) & (position < side))
    hole = holes[0][:, :, None] & holes[1][:, None, :] & applied[:, None, None]
    return images * ~hole[:, None]


class AdaptiveProbability(nn.Module):
    """ADA's controller: augment more where the discriminator is too sure of the real images, else less.

    Its measure of overfitting is r_t = E[sign(D(x))] over real images x (paper, eq. 1): 0 where D cannot tell, 1 where
    it takes all of them for real. Its buffers are its state: saved with a run, it goes on where it stopped.

    Args:
        target: of r_t (paper: 0.6).
        images_to_one: real images after which the probability would have gone from 0 to 1 (paper: 500,000).

    Attributes:
        probability: 0-dim in [0, 1], at first 0.
    """

    probability: Tensor
    signs: Tensor
    images: Tensor

    def __init__(self, target: float = 0.6, images_to_one: float = 500_000) -> None:
        super().__init__()
        self.target, self.images_to_one = target, images_to_one
        for name in ("probability", "signs", "images"):
            self.register_buffer(name, torch.zeros(()))

    def observe(self, signs: Tensor, images: Tensor) -> None:
        """Add the sum of the signs of D's logits of so many real images, both 0-dim."""
        self.signs += signs
        self.images += images

    def adapt(self) -> None:
        """Move the probability by as much as the images that were observed since last time are worth."""
        overfitting = self.signs / self.images.clamp(min=1)
        step = (overfitting - self.target).sign() * self.images / self.images_to_one
        self.probability.add_(step).clamp_(0, 1)
        self.signs.zero_()
        self.images.zero_()
