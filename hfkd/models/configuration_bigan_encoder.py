"""Configuration of the convolutional encoder of ALI and BiGAN."""

from collections.abc import Sequence
from typing import Any

from .configuration_convnet import ConvNetConfig


class HfkdBiganEncoderConfig(ConvNetConfig):
    """Encoder without padding; the defaults are ALI's for CIFAR-10 and SVHN (arXiv 1606.00704, appendix A).

    Args:
        hidden_sizes: output channels of each convolution.
        kernel_sizes: side of each convolution's kernel.
        strides: stride of each convolution.
        negative_slope: of the leaky ReLUs: 0.1 for CIFAR-10, 0.01 for SVHN.
        initializer_range: standard deviation of fresh convolution weights.

    `ConvNetConfig` has the other fields.

    Raises:
        ValueError: the lists have no or unequal lengths, or a field is outside its choices.
    """

    model_type = "hfkd_bigan_encoder"

    hidden_sizes: Sequence[int] = (32, 64, 128, 256, 512)
    kernel_sizes: Sequence[int] = (5, 4, 4, 4, 4)
    strides: Sequence[int] = (1, 2, 1, 2, 1)
    negative_slope: float = 0.1
    initializer_range: float = 0.01

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("hidden_sizes", "kernel_sizes", "strides"):
            setattr(self, name, list(getattr(self, name)))
        check_layers(self.hidden_sizes, self.kernel_sizes, self.strides)

    @property
    def receptive_field(self) -> int:
        """Pixels across that one position of the last map sees, and so the least size of an image."""
        pixels = 1
        for kernel_size, stride in zip(reversed(self.kernel_sizes), reversed(self.strides), strict=True):
            pixels = (pixels - 1) * stride + kernel_size
        return pixels


def check_layers(hidden_sizes: Sequence[int], kernel_sizes: Sequence[int], strides: Sequence[int]) -> None:
    """Refuse layers that are not described one by one; raises `ValueError`."""
    lengths = {len(hidden_sizes), len(kernel_sizes), len(strides)}
    if len(lengths) != 1 or not hidden_sizes or min(*hidden_sizes, *kernel_sizes, *strides) < 1:
        raise ValueError(
            f"hidden_sizes={list(hidden_sizes)}, kernel_sizes={list(kernel_sizes)} and strides={list(strides)} "
            "must give one positive number for each convolution"
        )


HfkdBiganEncoderConfig.register_for_auto_class("AutoConfig")
