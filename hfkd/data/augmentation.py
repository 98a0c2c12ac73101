"""Augmentation of uint8 images in batches, on whatever device they are, from keyed draws."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hfkd.errors import InputError

from .keyed_random import keyed_uniform


# Columns of a sample's draws. They are fixed, so that switching one operation on or off changes no other.
_CROP_TOP, _CROP_LEFT, _FLIP, _BATCHED_DRAWS = 0, 1, 2, 3
_RESIZED_CROP_ATTEMPTS = 10
DRAWS = _BATCHED_DRAWS + 2 * _RESIZED_CROP_ATTEMPTS + 2  # of which those of a box are the last
BOX_DRAWS = slice(_BATCHED_DRAWS, DRAWS)

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class ResizedCrop:
    """Random part of an image, to be resized to the training size (Szegedy et al., arXiv 1409.4842, section 6).

    Attributes:
        scale: least and greatest area of the part, as fractions of the image's.
        ratio: least and greatest width over height, drawn uniformly in its logarithm.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def box(self, width: int, height: int, draws: Tensor) -> Box:
        """(left, top, right, bottom) in pixels; the first of ten parts that fits, else the largest centred one.

        `draws` is float64 (22,): ten areas, ten ratios, top, left.
        """
        left, top, right, bottom = self.boxes(width, height, draws[None])[0].tolist()
        return left, top, right, bottom

    def boxes(self, width: int, height: int, draws: Tensor) -> Tensor:
        """Those of N images of one size, int64 (N, 4), from draws (N, 22)."""
        low, high = (math.log(bound) for bound in self.ratio)
        areas = width * height * (self.scale[0] + draws[:, :_RESIZED_CROP_ATTEMPTS] * (self.scale[1] - self.scale[0]))
        ratios = (low + draws[:, _RESIZED_CROP_ATTEMPTS:-2] * (high - low)).exp()
        sizes = torch.stack([(areas * ratios).sqrt(), (areas / ratios).sqrt()], dim=2).round().long()
        whole = torch.tensor([width, height], device=draws.device)
        fits = ((sizes > 0) & (sizes <= whole)).all(dim=2)
        first = fits.byte().argmax(dim=1)[:, None, None].expand(-1, 1, 2)
        largest = torch.tensor([max(1, round(height * self.ratio[1])), max(1, round(width / self.ratio[0]))])
        centred = ~fits.any(dim=1, keepdim=True)
        size = torch.where(centred, largest.to(whole).minimum(whole), sizes.gather(1, first)[:, 0])
        drawn = (draws[:, [-1, -2]] * (whole - size + 1)).long()
        start = torch.where(centred, (whole - size) // 2, drawn)
        return torch.cat([start, start + size], dim=1)


@dataclass(frozen=True)
class SquareCrop:
    """Random square part of an image, as large as the part that a centre crop keeps.

    Attributes:
        fraction: its side over the shorter side of the image, in (0, 1].

    Raises:
        InputError: a fraction out of its range.
    """

    fraction: float = 0.875

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise InputError(f"SquareCrop.fraction={self.fraction} must be above 0 and at most 1: it is a part's side")

    def box(self, width: int, height: int, draws: Tensor) -> Box:
        """(left, top, right, bottom) in pixels; `draws` ends with those of top and left, as for `ResizedCrop`."""
        side = max(1, round(self.fraction * min(width, height)))
        top_draw, left_draw = draws[-2:].tolist()
        top, left = int(top_draw * (height - side + 1)), int(left_draw * (width - side + 1))
        return left, top, left + side, top + side


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images. The default does nothing.

    Attributes:
        crop_padding: pixels added on each side before a random crop back to the same size; 0 is no crop.
        padding_mode: `reflect` mirrors the image about its border pixels; `zeros` adds black.
        horizontal_flip: flip half of the images.
        resized_crop: cut at decoding, before the operations above; only for streamed images.
    """

    crop_padding: int = 0
    padding_mode: Literal["reflect", "zeros"] = "reflect"
    horizontal_flip: bool = False
    resized_crop: ResizedCrop | SquareCrop | None = None

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise InputError(f"crop_padding {self.crop_padding} is negative: give 0 for no crop")
        if self.padding_mode not in ("reflect", "zeros"):
            raise InputError(f"padding_mode {self.padding_mode!r} is unknown: choose 'reflect' or 'zeros'")

    def __bool__(self) -> bool:
        return self.crop_padding > 0 or self.horizontal_flip or self.resized_crop is not None

    def __call__(self, images: Tensor, seed: int, epoch: Tensor | int, index: Tensor, view: int = 0) -> Tensor:
        """Crop and flip a batch.

        Args:
            images: (N, C, H, W), any dtype; only read.
            seed, epoch, index, view: the key of the draws, see `keyed_uniform`.

        Returns:
            (N, C, H, W), same dtype and device.

        Raises:
            InputError: padding that does not fit the image size.
        """
        if not (self.crop_padding or self.horizontal_flip):
            return images
        draws = keyed_uniform(seed, epoch, index, view, _BATCHED_DRAWS)
        height, width = images.shape[2:]
        rows, row_inside = self._positions(height, draws[:, _CROP_TOP])
        columns, column_inside = self._positions(width, draws[:, _CROP_LEFT])
        if self.horizontal_flip:
            flipped = (draws[:, _FLIP] < 0.5)[:, None]
            columns = torch.where(flipped, columns.flip(1), columns)
            column_inside = torch.where(flipped, column_inside.flip(1), column_inside)
        # Padding, crop and flip are one look-up of source pixels: nothing padded is ever stored.
        source = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
        cropped = images.flatten(2).gather(2, source[:, None, :].expand(-1, images.shape[1], -1)).view(images.shape)
        if self.crop_padding and self.padding_mode == "zeros":
            inside = row_inside[:, :, None] & column_inside[:, None, :]
            cropped = cropped * inside[:, None]
        return cropped

    def _positions(self, size: int, draw: Tensor) -> tuple[Tensor, Tensor]:
        """Source row (or column) of each output row, int64 (N, size), and whether it lies in the image."""
        padding = self.crop_padding
        if self.padding_mode == "reflect" and padding >= size:
            raise InputError(f"crop_padding {padding} is too large to reflect images of {size} pixels: give less")
        shift = (draw * (2 * padding + 1)).long() - padding
        position = torch.arange(size, device=draw.device) + shift[:, None]
        inside = (position >= 0) & (position < size)
        if self.padding_mode == "zeros":
            return position.clamp(0, size - 1), inside
        position = position.abs()
        return torch.where(position >= size, 2 * (size - 1) - position, position), inside

    def box(self, width: int, height: int, seed: int, epoch: int, index: int, view: int) -> Box | None:
        """The part of one image to cut at decoding, or `None` for the whole (no `resized_crop`)."""
        if self.resized_crop is None:
            return None
        draws = keyed_uniform(seed, epoch, torch.tensor([index]), view, DRAWS)[0, BOX_DRAWS]
        return self.resized_crop.box(width, height, draws)
