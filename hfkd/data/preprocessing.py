"""From a stored image to the tensor a model sees: pixel mode, size, normalisation."""

import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from hfkd.errors import InputError


# Channel means and deviations in [0, 1]. cifar100: those of FFL (Kim et al., ICPR 2020), by AFD's authors.
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((129.3 / 255, 124.1 / 255, 112.4 / 255), (68.2 / 255, 65.4 / 255, 70.4 / 255)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "digits": ((0.3053,) * 3, (0.3759,) * 3),
    "symmetric": ((0.5,) * 3, (0.5,) * 3),  # to [-1, 1], which generators make
}
_EIGHT_BIT_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "La", "RGBa"}
# What Pillow raises on broken files of one format or another.
_DECODING_ERRORS = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Preprocessing:
    """Attributes:
    image_size: side of the square images given to the model, in pixels.
    num_channels: 1 (grey) or 3 (RGB); images of the other kind are converted.
    mean, std: one per channel, in units of the full range: x / 255 is normalised.
    crop_fraction: `None` stretches an image to the square, as stock ViT processors do; otherwise the shorter side
        is resized to image_size / crop_fraction and the centre is cut out.
    resample: Pillow's number of the resizing filter (2 is bilinear).
    """

    image_size: int
    num_channels: int = 3
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    crop_fraction: float | None = None
    resample: int = int(Image.Resampling.BILINEAR)

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise InputError(f"image_size {self.image_size} is too small: give at least 1")
        if self.num_channels not in (1, 3):
            raise InputError(f"num_channels {self.num_channels} is neither 1 (grey) nor 3 (RGB)")
        for name in ("mean", "std"):
            values = tuple(float(value) for value in getattr(self, name))
            if self.num_channels == 1 and len(values) == 3:
                values = (sum(values) / 3,)
            if len(values) != self.num_channels:
                raise InputError(f"{name} {values} does not fit {self.num_channels} channels: give one value for each")
            object.__setattr__(self, name, values)
        if min(self.std) <= 0:
            raise InputError(f"std {self.std} is not positive")

    @classmethod
    def from_statistics(cls, name: str, image_size: int, num_channels: int = 3, **changes: Any) -> "Preprocessing":
        """With the known statistics of a dataset, or `symmetric`: a key of `STATISTICS`."""
        if name not in STATISTICS:
            raise InputError(f"normalization {name!r} is unknown: choose one of {[*STATISTICS, 'train']}")
        mean, std = STATISTICS[name]
        return cls(image_size, num_channels, mean, std, **changes)

    @classmethod
    def from_image_processor(
        cls, processor: Any, image_size: int | None = None, num_channels: int = 3
    ) -> "Preprocessing":
        """What a stock image processor does (sizes by height and width, or shortest edge with a centre crop).

        Args:
            processor: an image processor of transformers.
            image_size: takes the place of the processor's.
            num_channels: 1 averages the processor's three means and deviations.

        Raises:
            InputError: a processor whose work this class cannot repeat.
        """
        side, fraction = _geometry(processor)
        side = image_size or side
        if side is None:
            raise InputError(f"image processor with size {processor.size} has no square size: give image_size")
        factor = getattr(processor, "rescale_factor", 1 / 255)
        if not getattr(processor, "do_rescale", True) or abs(factor * 255 - 1) > 1e-6:
            raise InputError(f"image processor that rescales by {factor}, not 1/255, cannot be repeated: use another")
        normalised = getattr(processor, "do_normalize", True)
        return cls(
            image_size=side,
            num_channels=num_channels,
            mean=tuple(processor.image_mean) if normalised else (0.0,) * 3,
            std=tuple(processor.image_std) if normalised else (1.0,) * 3,
            crop_fraction=fraction,
            resample=int(getattr(processor, "resample", None) or Image.Resampling.BILINEAR),
        )

    def to_image_processor(self) -> Any:
        """A stock three-channel image processor that does the same, to be saved beside a model."""
        from transformers import BitImageProcessorPil, ViTImageProcessorPil  # loading transformers takes seconds

        repeat = 3 // self.num_channels
        settings = {
            "image_mean": list(self.mean) * repeat,
            "image_std": list(self.std) * repeat,
            "resample": self.resample,
            "do_convert_rgb": True,
        }
        square = {"height": self.image_size, "width": self.image_size}
        if self.crop_fraction is None:
            return ViTImageProcessorPil(size=square, **settings)
        edge = {"shortest_edge": round(self.image_size / self.crop_fraction)}
        return BitImageProcessorPil(size=edge, do_center_crop=True, crop_size=square, **settings)

    def with_statistics_of(self, images: Tensor) -> "Preprocessing":
        """The same, with the means and deviations of uint8 images (N, C, H, W)."""
        total = torch.zeros(self.num_channels, dtype=torch.float64)
        squares = torch.zeros_like(total)
        for chunk in images.split(1024):
            values = chunk.to(torch.float32).transpose(0, 1).flatten(1) / 255
            total += values.sum(1, dtype=torch.float64)
            squares += values.square().sum(1, dtype=torch.float64)
        count = images.numel() / self.num_channels
        mean = total / count
        # A constant channel has no deviation to divide by.
        std = (squares / count - mean.square()).clamp(min=1e-6).sqrt()
        return replace(self, mean=tuple(mean.tolist()), std=tuple(std.tolist()))

    def fit(self, image: Image.Image) -> Image.Image:
        """An image of any size to (image_size, image_size)."""
        side = self.image_size
        if self.crop_fraction is None:
            return image if image.size == (side, side) else image.resize((side, side), self.resample)
        edge = max(side, round(side / self.crop_fraction))
        width, height = image.size
        if min(width, height) != edge:
            width, height = (max(edge, int(edge * length / min(image.size))) for length in image.size)
            image = image.resize((width, height), self.resample)
        left, top = (width - side) // 2, (height - side) // 2
        return image.crop((left, top, left + side, top + side))

    def normalize(self, pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 (N, C, H, W) to (x / 255 - mean) / std in `dtype`, computed in float32 or wider."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        mean, scale = _affine(self.mean, self.std, pixels.device, wide)
        return pixels.to(wide).sub_(mean).mul_(scale).to(dtype)


def _geometry(processor: Any) -> tuple[int | None, float | None]:
    """Side of the square (`None` where it is not square) and crop fraction of a stock image processor."""
    size = dict(processor.size)
    edge = size.get("shortest_edge", size.get("height"))
    if getattr(processor, "do_center_crop", False):
        crop = dict(processor.crop_size)
        side = crop["height"] if crop["height"] == crop["width"] else None
        return side, crop["height"] / edge if edge else 1.0
    if "shortest_edge" in size:
        # ConvNeXt's rule: below 384 pixels the shorter side is size / crop_pct, from there on it stretches.
        return edge, (getattr(processor, "crop_pct", None) or 1.0) if size["shortest_edge"] < 384 else None
    return edge if edge == size.get("width") else None, None


@lru_cache(maxsize=32)
def _affine(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    # Kept on the device: making it anew would wait for a copy in every step.
    means = torch.tensor(mean, dtype=torch.float64) * 255
    scales = 1 / (torch.tensor(std, dtype=torch.float64) * 255)
    shape = (-1, 1, 1)
    return means.view(shape).to(device, dtype), scales.view(shape).to(device, dtype)


def decode_image(record: Mapping[str, Any] | None, num_channels: int | None, place: str) -> Image.Image:
    """Decodes what `datasets.Image(decode=False)` stores, in mode L or RGB.

    Args:
        record: `bytes` of the file, or `path` to it; `None` is an image that is missing.
        num_channels: 1, 3, or `None` to take what the image has.
        place: says in the error message which image it is.

    Raises:
        InputError: a file that is missing, corrupt, or deeper than 8 bits a channel.
    """
    data, path = (record["bytes"], record["path"]) if record else (None, None)
    file = path if data is None else io.BytesIO(data)
    if file is None:
        raise InputError(f"{place} is missing: drop the row")
    where = f"{place} ({path})" if path else place
    try:
        with Image.open(file) as image:
            image.load()
            upright: Image.Image = ImageOps.exif_transpose(image)
    except _DECODING_ERRORS as error:
        cause = " ".join(str(error).split()).split(" <_io.")[0]
        raise InputError(f"{where} cannot be decoded ({cause}): replace the file or drop the row") from error
    if upright.mode not in _EIGHT_BIT_MODES:
        raise InputError(f"{where} has pixel mode {upright.mode!r}: convert it to 8 bits a channel")
    if num_channels is None:
        num_channels = 1 if upright.mode in ("1", "L", "LA", "La") else 3
    mode = "L" if num_channels == 1 else "RGB"
    return upright if upright.mode == mode else upright.convert(mode)


def to_pixels(image: Image.Image) -> Tensor:
    """Mode L or RGB to uint8 (C, H, W)."""
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1)))
