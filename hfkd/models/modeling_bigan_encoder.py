"""The convolutional encoder of ALI (Dumoulin et al., ICLR 2017, arXiv 1606.00704) and BiGAN."""

import torch
from torch import nn

from .configuration_bigan_encoder import HfkdBiganEncoderConfig
from .layers import make_norm
from .modeling_convnet import ConvNetForImageClassification, ConvNetModel


def make_block(
    config: HfkdBiganEncoderConfig, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1
) -> nn.Sequential:
    """Convolution without padding, norm and leaky ReLU; a bias only where no norm would cancel it."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, bias=config.norm == "none"),
        make_norm(config.norm, out_channels),
        nn.LeakyReLU(config.negative_slope),
    )


class HfkdBiganEncoderModel(ConvNetModel):
    """One stage of one block for each convolution.

    At the default 32x32 pixels the maps are 28, 13, 10, 4 and 1 wide, and `pooler_output` is the last one. The latent
    layers that ALI puts on top belong to its training and not to the encoder.
    """

    config_class = HfkdBiganEncoderConfig

    def __init__(self, config: HfkdBiganEncoderConfig) -> None:
        super().__init__(config)
        self.stem = nn.Identity()
        self.stages = nn.ModuleList()
        in_channels, self.total_stride = config.num_channels, 1
        for layer in zip(config.hidden_sizes, config.kernel_sizes, config.strides, strict=True):
            self.stages.append(nn.Sequential(make_block(config, in_channels, *layer)))
            in_channels = layer[0]
            self.total_stride *= layer[-1]
        self.tail = nn.Identity()
        self.post_init()

    def initial_std(self, conv: nn.Conv2d) -> float:
        return self.config.initializer_range

    def _as_input(self, pixel_values: torch.Tensor) -> torch.Tensor:
        least = self.config.receptive_field
        if min(pixel_values.shape[-2:]) < least:
            height, width = pixel_values.shape[-2:]
            raise ValueError(
                f"images of {height}x{width} pixels are smaller than the receptive field {least} of "
                f"{type(self).__name__}: use larger images or a network with fewer or smaller convolutions"
            )
        return super()._as_input(pixel_values)


class HfkdBiganEncoderForImageClassification(ConvNetForImageClassification):
    """Encoder with a linear classifier."""

    config_class = HfkdBiganEncoderConfig
    backbone_class = HfkdBiganEncoderModel


HfkdBiganEncoderModel.register_for_auto_class("AutoModel")
HfkdBiganEncoderForImageClassification.register_for_auto_class("AutoModelForImageClassification")
