"""Several images as one picture."""

import math
from typing import Any

import torch
from torch import Tensor

from hfkd.models.generator import GeneratorPreTrainedModel


VISIBLE = 32  # pixels


def image_grid(images: Tensor, columns: int | None = None) -> Any:
    """A Pillow image of images (N, C, H, W) in [-1, 1], row by row with a pixel of white between them.

    Images of up to 16 pixels are enlarged, whole pixels to 32 or just below, as nobody could see them otherwise.

    Args:
        images: 1 or 3 channels.
        columns: images in a row; by default as many as make a square.
    """
    factor = max(1, VISIBLE // max(images.shape[2:]))
    images = images.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = torch.ones(1, channels, rows * (height + 1) - 1, columns * (width + 1) - 1)
    for number, image in enumerate(images.float().cpu()):
        top, left = (number // columns) * (height + 1), (number % columns) * (width + 1)
        grid[0, :, top : top + height, left : left + width] = image
    return GeneratorPreTrainedModel.to_pil(grid)[0]


def class_grid(images: Tensor, labels: Tensor) -> Any:
    """The grid of images (N, C, H, W) in [-1, 1] with a row for each class in `labels` (N,), by number."""
    classes, counts = labels.unique(return_counts=True)
    columns = int(counts.max())
    rows = images.new_ones(len(classes), columns, *images.shape[1:])  # white where a class has fewer
    for row, number, count in zip(rows, classes, counts, strict=True):
        row[:count] = images[labels == number]
    return image_grid(rows.flatten(0, 1), columns)


def nearest_image_grid(samples: Tensor, nearest: Tensor) -> Any:
    """The grid whose rows are a sample and its `nearest` training images, from the left.

    Args:
        samples: (N, C, H, W) in [-1, 1].
        nearest: (N, k, C, H, W) in [-1, 1], the nearest first.
    """
    rows = torch.cat([samples[:, None], nearest.to(samples)], dim=1)
    return image_grid(rows.flatten(0, 1), columns=rows.shape[1])
