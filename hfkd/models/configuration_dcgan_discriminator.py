"""Configuration of DCGAN's discriminator."""

from typing import Any

from transformers import PreTrainedConfig

from .configuration_convnet import check_choice
from .configuration_dcgan_generator import dcgan_widths


DISCRIMINATOR_NORMS = ("none", "spectral", "batch")


class HfkdDcganDiscriminatorConfig(PreTrainedConfig):
    """Discriminator of strided convolutions, the generator's mirror (Radford et al., ICLR 2016, arXiv 1511.06434).

    Args:
        num_channels: channels of the images.
        image_size: their side in pixels: 8, 16, 32, 64 or a larger power of two.
        width: channels of the first map; each one after it has half the side and twice the channels.
        norm: `spectral` divides each convolution by its spectral norm (Miyato et al., ICLR 2018, arXiv 1802.05957),
            `batch` is the paper's batch norm in all blocks but the first, `none` is plain convolutions.
        negative_slope: of the leaky ReLUs (paper: 0.2).
        initializer_range: standard deviation of fresh convolution weights (paper: 0.02).

    Raises:
        ValueError: a field is outside its range.
    """

    model_type = "hfkd_dcgan_discriminator"

    num_channels: int = 3
    image_size: int = 32
    width: int = 64
    norm: str = "spectral"
    negative_slope: float = 0.2
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        dcgan_widths(self.image_size, self.width)
        check_choice("norm", self.norm, DISCRIMINATOR_NORMS)
        if self.num_channels < 1:
            raise ValueError(f"num_channels={self.num_channels} must be at least 1")
        self.auto_map = {
            "AutoConfig": "configuration_dcgan_discriminator.HfkdDcganDiscriminatorConfig",
            "AutoModel": "modeling_dcgan_discriminator.HfkdDcganDiscriminatorModel",
        }


HfkdDcganDiscriminatorConfig.register_for_auto_class("AutoConfig")
