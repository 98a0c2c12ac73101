"""Configuration of ALI's generator of transposed convolutions."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from .configuration_bigan_encoder import HfkdBiganEncoderConfig, check_layers
from .configuration_convnet import NORMS, check_choice


class HfkdBiganGeneratorConfig(PreTrainedConfig):
    """Generator without padding; the defaults are ALI's for CIFAR-10 (arXiv 1606.00704, appendix A).

    Args:
        latent_size: numbers that an image is made of: 64 for CIFAR-10, 256 for SVHN.
        num_channels: channels of the images.
        hidden_sizes: output channels of each transposed convolution.
        kernel_sizes: side of each kernel.
        strides: stride of each transposed convolution.
        norm: `batch`, `group` or `none`, as in the encoder.
        negative_slope: of the leaky ReLUs: 0.1 for CIFAR-10, 0.01 for SVHN.
        initializer_range: standard deviation of fresh convolution weights.

    Raises:
        ValueError: the lists have no or unequal lengths, or a field is outside its range.
    """

    model_type = "hfkd_bigan_generator"

    latent_size: int = 64
    num_channels: int = 3
    hidden_sizes: Sequence[int] = (256, 128, 64, 32, 32, 32)
    kernel_sizes: Sequence[int] = (4, 4, 4, 4, 5, 1)
    strides: Sequence[int] = (1, 2, 1, 2, 1, 1)
    norm: str = "batch"
    negative_slope: float = 0.1
    initializer_range: float = 0.01

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("hidden_sizes", "kernel_sizes", "strides"):
            setattr(self, name, list(getattr(self, name)))
        check_layers(self.hidden_sizes, self.kernel_sizes, self.strides)
        check_choice("norm", self.norm, NORMS)
        if min(self.latent_size, self.num_channels) < 1:
            raise ValueError(f"latent_size={self.latent_size} and num_channels={self.num_channels} must be at least 1")
        self.auto_map = {
            "AutoConfig": "configuration_bigan_generator.HfkdBiganGeneratorConfig",
            "AutoModel": "modeling_bigan_generator.HfkdBiganGeneratorModel",
        }

    @property
    def image_size(self) -> int:
        """Side of the images in pixels, which the layers decide."""
        pixels = 1
        for kernel_size, stride in zip(self.kernel_sizes, self.strides, strict=True):
            pixels = (pixels - 1) * stride + kernel_size
        return pixels

    @classmethod
    def mirror(cls, encoder: HfkdBiganEncoderConfig, latent_size: int = 64) -> "HfkdBiganGeneratorConfig":
        """The encoder's layers in reverse and one 1x1 layer, which is how ALI's two networks belong together."""
        first = encoder.hidden_sizes[0]
        return cls(
            latent_size=latent_size,
            num_channels=encoder.num_channels,
            hidden_sizes=[*reversed(encoder.hidden_sizes[:-1]), first, first],
            kernel_sizes=[*reversed(encoder.kernel_sizes), 1],
            strides=[*reversed(encoder.strides), 1],
            norm=encoder.norm,
            negative_slope=encoder.negative_slope,
            initializer_range=encoder.initializer_range,
        )


HfkdBiganGeneratorConfig.register_for_auto_class("AutoConfig")
