"""Running a model on a made-up image without leaving a trace in it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from hfkd.errors import InputError


ImageSize = int | tuple[int, int]


def as_height_width(image_size: ImageSize) -> tuple[int, int]:
    """(height, width) of a side or a pair."""
    return (image_size, image_size) if isinstance(image_size, int) else (int(image_size[0]), int(image_size[1]))


def probe_pixels(model: PreTrainedModel, image_size: ImageSize, num_channels: int) -> torch.Tensor:
    """One fixed noise image (1, C, H, W) in [-1, 1] on the model's device, drawn without the global RNG."""
    noise = torch.rand((1, num_channels, *as_height_width(image_size)), generator=torch.Generator().manual_seed(0))
    parameter = next(model.parameters())
    return (2 * noise - 1).to(device=parameter.device, dtype=parameter.dtype)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients: no batch statistics, no dropout draws; each module's mode is put back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def image_errors(model: PreTrainedModel, pixel_values: torch.Tensor) -> Iterator[None]:
    """Turn what a forward pass raises on images it cannot take into an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, RuntimeError) as error:
        channels, height, width = pixel_values.shape[1:]
        raise InputError(
            f"{type(model).__name__} cannot take images of {height}x{width} pixels with {channels} channels: "
            f"{one_line(error)}"
        ) from error


def one_line(error: Exception) -> str:
    """The message of an error of someone else's, its lines joined."""
    return " ".join(str(error).split())
