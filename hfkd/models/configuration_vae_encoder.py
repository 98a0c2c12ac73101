"""Configuration of the convolutional encoder of ACAI's autoencoders."""

from typing import Any

from .configuration_convnet import ConvNetConfig


class HfkdVaeEncoderConfig(ConvNetConfig):
    """Encoder of ACAI (Berthelot et al., ICLR 2019, arXiv 1807.07543); the defaults are for 32x32 pixels.

    Args:
        depth: channels of the first convolution; each scale doubles them.
        scales: halvings of the image: 3 from 32 to 4 pixels, with 8 convolutions.
        negative_slope: of the leaky ReLUs.

    `ConvNetConfig` has the other fields; `norm` is `none` by default.

    Raises:
        ValueError: a field is outside its range.
    """

    model_type = "hfkd_vae_encoder"

    norm: str = "none"
    depth: int = 64
    scales: int = 3
    negative_slope: float = 0.2

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if min(self.depth, self.scales) < 1:
            raise ValueError(f"depth={self.depth} and scales={self.scales} must be at least 1")

    @property
    def hidden_sizes(self) -> list[int]:
        """Output channels of each stage: the first convolution, each scale, and the last convolution."""
        return [self.depth, *(self.depth << scale for scale in range(self.scales + 1))]


HfkdVaeEncoderConfig.register_for_auto_class("AutoConfig")
