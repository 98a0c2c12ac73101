"""The image processor that is saved beside a model."""

from collections.abc import Sequence

from transformers import ViTImageProcessorPil

from hfkd.errors import InputError
from hfkd.models.probing import ImageSize, as_height_width


def build_image_processor(
    image_size: ImageSize, num_channels: int, mean: Sequence[float], std: Sequence[float]
) -> ViTImageProcessorPil:
    """Processor that converts to RGB, resizes to `image_size` (bilinear), scales to [0, 1] and normalises.

    It always has three channels, because pipelines convert to RGB: the statistics of grey data are repeated, and a
    model with `num_channels=1` averages the three equal channels. The class is a stock one that needs Pillow alone; it
    saves itself as `ViTImageProcessor`, which transformers loads with its Pillow backend where torchvision is not
    installed and with its torchvision backend where it is.

    Args:
        image_size: side of the images in pixels, or (height, width).
        num_channels: channels of the data, 1 or 3.
        mean: one value for each channel of the data, in units of pixel/255.
        std: likewise, above 0.

    Raises:
        InputError: the channels are not 1 or 3, or a statistic has another length, or a standard deviation is not
            positive.
    """
    if num_channels not in (1, 3):
        raise InputError(f"num_channels={num_channels}: image processors know 1 (grey) or 3 (RGB) channels")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != num_channels:
            raise InputError(f"{name}={list(values)} needs one value for each of {num_channels} channels")
    if min(std) <= 0:
        raise InputError(f"std={list(std)} has a value that is not positive: pixels are divided by it")
    height, width = as_height_width(image_size)
    repeats = 3 // num_channels
    return ViTImageProcessorPil(
        do_convert_rgb=True,
        size={"height": height, "width": width},
        image_mean=[float(value) for value in mean] * repeats,
        image_std=[float(value) for value in std] * repeats,
    )
