"""The augmentation of self-supervised learning: random crops, colour jitter, grey, blur, flips, from keyed draws.

The list and its numbers are those of Squeeze-and-Span's public code, which are MoCo v2's (Chen et al., arXiv
2003.04297). Every image of a batch has draws of its own, the order of the colour operations included. Resizing and
blurring are linear along each axis, so both are two small matrix products for each image.
"""

from dataclasses import dataclass, replace
from itertools import permutations

import torch
from torch import Tensor

from hfkd.errors import InputError

from .augmentation import BOX_DRAWS, DRAWS, Augmentation, ResizedCrop
from .keyed_random import keyed_uniform


# Columns of a sample's draws, after those of Augmentation.
_JITTER, _ORDER, _FIRST_AMOUNT, _GREY, _BLUR, _SIGMA = DRAWS, DRAWS + 1, DRAWS + 2, DRAWS + 6, DRAWS + 7, DRAWS + 8
_VIEW_DRAWS = DRAWS + 9
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's mode L


@dataclass(frozen=True)
class ViewAugmentation(Augmentation):
    """A random view of each image. Images of one channel have no hue, saturation or grey version: those are left out.

    Attributes:
        crop: random part of an image that is resized back, on the device; None leaves images whole, also where
            `resized_crop` has cut them at decoding.
        jitter_probability: of a colour jitter: brightness, contrast, saturation and hue in random order.
        brightness, contrast, saturation: half-width of each factor's range about 1, in [0, 1].
        hue: greatest shift of the hue to either side, in turns, in [0, 0.5].
        grey_probability: of dropping the colour.
        blur_probability: of a Gaussian blur (the code: 0.5, and 0 for CIFAR).
        blur_sigma: least and greatest standard deviation of the blur, in pixels.
        image_size: side of the result where `crop` is given; None: of the images.
        shared: all images of a batch take the first one's draws, as in the released code's synthetic batches (the
            paper: False). A batch is then that of one process.

    Raises:
        InputError: a value out of its range.
    """

    horizontal_flip: bool = True
    crop: ResizedCrop | None = ResizedCrop(scale=(0.2, 1.0))
    jitter_probability: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grey_probability: float = 0.2
    blur_probability: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    image_size: int | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        probabilities = ("jitter_probability", "grey_probability", "blur_probability")
        for name in (*probabilities, "brightness", "contrast", "saturation", "hue"):
            most = 0.5 if name == "hue" else 1.0
            if not 0 <= getattr(self, name) <= most:
                raise InputError(f"{name}={getattr(self, name)} is out of range: give 0 to {most:g}")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise InputError(f"blur_sigma={self.blur_sigma} is no range above 0: give the least and the greatest")

    def __bool__(self) -> bool:
        chances = self.jitter_probability + self.grey_probability + self.blur_probability
        return super().__bool__() or self.crop is not None or chances > 0

    def on_device(self, image_size: int, *, shared: bool) -> "ViewAugmentation":
        """The same for generated images, which nobody decodes: what would be cut there is cut on the device."""
        crop = self.crop or self.resized_crop
        if crop is not None and not isinstance(crop, ResizedCrop):
            raise InputError(f"resized_crop={crop} cannot cut generated images: use ResizedCrop")
        return replace(self, crop=crop, resized_crop=None, image_size=image_size, shared=shared)

    def __call__(self, images: Tensor, seed: int, epoch: Tensor | int, index: Tensor, view: int = 0) -> Tensor:
        """A view of each image.

        Args:
            images: (N, C, H, W) in [0, 255], uint8 or floating; only read.
            seed, epoch, index, view: the key of the draws, see `keyed_uniform`.

        Returns:
            (N, C, H', W') in [0, 255], float32 or as wide as `images`. H' and W' are `image_size`, or H and W.
        """
        if self.shared:
            index = index[:1].expand_as(index)
            epoch = epoch[:1].expand_as(epoch) if isinstance(epoch, Tensor) else epoch
        pixels = super().__call__(images, seed, epoch, index, view)
        dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
        pixels = pixels.to(dtype) / 255
        draws = keyed_uniform(seed, epoch, index, view, _VIEW_DRAWS)
        if self.crop is not None:
            pixels = self._cropped(pixels, self.crop, draws)
        pixels = self._jittered(pixels, draws)
        if pixels.shape[1] == 3:
            grey = (draws[:, _GREY] < self.grey_probability)[:, None, None, None]
            pixels = torch.where(grey, _luma(pixels), pixels)
        return self._blurred(pixels, draws) * 255

    def _cropped(self, pixels: Tensor, crop: ResizedCrop, draws: Tensor) -> Tensor:
        height, width = pixels.shape[2:]
        left, top, right, bottom = crop.boxes(width, height, draws[:, BOX_DRAWS]).to(pixels.dtype).unbind(1)
        rows = resizing_matrix(top, bottom, height, self.image_size or height)
        columns = resizing_matrix(left, right, width, self.image_size or width)
        return _along_both_axes(pixels, rows, columns)

    def _jittered(self, pixels: Tensor, draws: Tensor) -> Tensor:
        operations = [(_brighten, self.brightness), (_contrast, self.contrast)]
        if pixels.shape[1] == 3:
            operations += [(_saturate, self.saturation), (_shift_hue, self.hue)]
        orders = torch.tensor(list(permutations(range(len(operations)))), device=pixels.device)
        order = orders[(draws[:, _ORDER] * len(orders)).long()]
        jittered = (draws[:, _JITTER] < self.jitter_probability)[:, None]
        for place in range(len(operations)):
            for number, (operation, width) in enumerate(operations):
                rows = (jittered & (order == number))[:, place].nonzero()[:, 0]
                amount = width * (2 * draws[rows, _FIRST_AMOUNT + number] - 1)
                pixels[rows] = operation(pixels[rows], amount.to(pixels.dtype)[:, None, None, None])
        return pixels

    def _blurred(self, pixels: Tensor, draws: Tensor) -> Tensor:
        rows = (draws[:, _BLUR] < self.blur_probability).nonzero()[:, 0]
        low, high = self.blur_sigma
        sigma = (low + draws[rows, _SIGMA] * (high - low)).to(pixels.dtype)
        height, width = pixels.shape[2:]
        pixels[rows] = _along_both_axes(pixels[rows], blurring_matrix(sigma, height), blurring_matrix(sigma, width))
        return pixels


def resizing_matrix(start: Tensor, end: Tensor, size: int, new_size: int) -> Tensor:
    """Bilinear resizing of the parts from `start` to `end` (N,) of lines of `size` pixels, with antialiasing.

    It is Pillow's filter: a triangle, as wide as the step between two results where those are fewer than the pixels,
    cut off at the ends of the part.

    Returns:
        (N, new_size, size), whose rows sum to 1.
    """
    step = ((end - start) / new_size)[:, None, None]
    centres = start[:, None, None] + (torch.arange(new_size, device=start.device)[:, None] + 0.5) * step
    pixels = torch.arange(size, device=start.device) + 0.5
    weights = (1 - (pixels - centres).abs() / step.clamp(min=1)).clamp(min=0)
    inside = (pixels > start[:, None, None]) & (pixels < end[:, None, None])
    weights = weights * inside
    return weights / weights.sum(dim=2, keepdim=True)


def blurring_matrix(sigma: Tensor, size: int) -> Tensor:
    """Gaussian blurs of `sigma` (N,) pixels of lines of `size` pixels: (N, size, size), whose rows sum to 1.

    At an image's border the weights of the pixels that are there are scaled up.
    """
    places = torch.arange(size, device=sigma.device)
    distance = (places[:, None] - places).to(sigma.dtype)
    return torch.softmax(-0.5 * (distance / sigma[:, None, None]).square(), dim=2)


def _along_both_axes(pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(N, C, H, W) to (N, C, H', W') by (N, H', H) and (N, W', W)."""
    return rows[:, None] @ pixels @ columns[:, None].mT


def _luma(pixels: Tensor) -> Tensor:
    """Grey version (N, 1, H, W); of grey images themselves."""
    if pixels.shape[1] == 1:
        return pixels
    return (pixels * pixels.new_tensor(_LUMA)[:, None, None]).sum(dim=1, keepdim=True)


def _blend(pixels: Tensor, other: Tensor | float, amount: Tensor) -> Tensor:
    """Away from `other` for an amount above 0, towards it below; -1 is `other`."""
    return (pixels + amount * (pixels - other)).clamp(0, 1)


def _brighten(pixels: Tensor, amount: Tensor) -> Tensor:
    return _blend(pixels, 0.0, amount)


def _contrast(pixels: Tensor, amount: Tensor) -> Tensor:
    return _blend(pixels, _luma(pixels).mean(dim=(1, 2, 3), keepdim=True), amount)


def _saturate(pixels: Tensor, amount: Tensor) -> Tensor:
    return _blend(pixels, _luma(pixels), amount)


def _shift_hue(pixels: Tensor, amount: Tensor) -> Tensor:
    """RGB of the same value and chroma, whose hue is `amount` turns further (Smith, SIGGRAPH 1978)."""
    value, largest = pixels.max(dim=1, keepdim=True)
    chroma = value - pixels.amin(dim=1, keepdim=True)
    # In sixths of a turn: red is 0, green 2, blue 4, and the two other channels say how far to either side.
    difference = (pixels.roll(-1, 1) - pixels.roll(-2, 1)).gather(1, largest)
    hue = 2 * largest + difference / chroma.clamp(min=torch.finfo(pixels.dtype).tiny)
    offsets = pixels.new_tensor([5.0, 3.0, 1.0])[:, None, None]
    place = (hue + 6 * amount + offsets) % 6
    return value - chroma * torch.minimum(place, 4 - place).clamp(0, 1)
