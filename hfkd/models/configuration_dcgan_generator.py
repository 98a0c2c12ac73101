"""Configuration of DCGAN's generator."""

from typing import Any

from transformers import PreTrainedConfig

from .configuration_convnet import NORMS, check_choice


FIRST_SIDE = 4  # pixels of the map that stands next to the latents, or to the logit


def dcgan_widths(image_size: int, width: int) -> list[int]:
    """Channels of the maps of 4, 8, ..., image_size / 2 pixels: `width` at last, and before it always twice as many.

    Raises:
        ValueError: an image size that is no power of two from 8 on, or no width.
    """
    if image_size < 2 * FIRST_SIDE or image_size & (image_size - 1):
        raise ValueError(
            f"image_size={image_size} is no power of two: DCGAN halves images of 8, 16, 32, 64, ... pixels"
        )
    if width < 1:
        raise ValueError(f"width={width} must be at least 1")
    maps = (image_size // FIRST_SIDE).bit_length() - 1
    return [width * 2**doublings for doublings in reversed(range(maps))]


class HfkdDcganGeneratorConfig(PreTrainedConfig):
    """Generator of transposed convolutions (Radford et al., ICLR 2016, arXiv 1511.06434, figure 1).

    Args:
        latent_size: numbers that an image is made of (paper: 100, there uniform).
        num_channels: channels of the images.
        image_size: their side in pixels: 8, 16, 32, 64 or a larger power of two.
        width: channels of the last map before the image; each map before it has half the side and twice the channels
            (paper: 128, for 64 pixels).
        norm: `batch` (paper), `group` or `none`, after every layer but the last.
        initializer_range: standard deviation of fresh convolution weights (paper: 0.02).

    Raises:
        ValueError: a field is outside its range.
    """

    model_type = "hfkd_dcgan_generator"

    latent_size: int = 100
    num_channels: int = 3
    image_size: int = 32
    width: int = 64
    norm: str = "batch"
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        dcgan_widths(self.image_size, self.width)
        check_choice("norm", self.norm, NORMS)
        if min(self.latent_size, self.num_channels) < 1:
            raise ValueError(f"latent_size={self.latent_size} and num_channels={self.num_channels} must be at least 1")
        self.auto_map = {
            "AutoConfig": "configuration_dcgan_generator.HfkdDcganGeneratorConfig",
            "AutoModel": "modeling_dcgan_generator.HfkdDcganGeneratorModel",
        }


HfkdDcganGeneratorConfig.register_for_auto_class("AutoConfig")
