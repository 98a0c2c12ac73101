"""The convolutional encoder of ACAI's autoencoders (Berthelot et al., ICLR 2019, arXiv 1807.07543)."""

import math

from torch import nn

from .configuration_vae_encoder import HfkdVaeEncoderConfig
from .layers import make_conv, make_norm
from .modeling_convnet import ConvNetForImageClassification, ConvNetModel


def make_block(config: HfkdVaeEncoderConfig, in_channels: int, out_channels: int) -> nn.Sequential:
    """3x3 convolution, norm and leaky ReLU."""
    return nn.Sequential(
        make_conv(in_channels, out_channels, 3, norm=config.norm),
        make_norm(config.norm, out_channels),
        nn.LeakyReLU(config.negative_slope),
    )


class HfkdVaeEncoderModel(ConvNetModel):
    """A linear 1x1 convolution, two blocks and average pooling for each scale, and a last block.

    With three scales the last block is the gradient-features paper's conv8, 512 channels on 4x4 positions of a 32x32
    image, and `pooler_output` its average. The latent layers of the autoencoder belong to its training.
    """

    config_class = HfkdVaeEncoderConfig

    def __init__(self, config: HfkdVaeEncoderConfig) -> None:
        super().__init__(config)
        self.stem = nn.Identity()
        # A block of its own, though nothing but a convolution: top blocks are counted by convolutions.
        first = nn.Sequential(make_conv(config.num_channels, config.depth, 1, norm=config.norm))
        self.stages = nn.ModuleList([nn.Sequential(first)])
        channels = config.depth
        for width in config.hidden_sizes[1:-1]:
            pooled = make_block(config, width, width).append(nn.AvgPool2d(2))
            self.stages.append(nn.Sequential(make_block(config, channels, width), pooled))
            channels = width
        self.stages.append(nn.Sequential(make_block(config, channels, config.hidden_sizes[-1])))
        self.tail = nn.Identity()
        self.total_stride = 2**config.scales
        self.post_init()

    def initial_std(self, conv: nn.Conv2d) -> float:
        return acai_std(conv, self.config.negative_slope)


def acai_std(conv: nn.Conv2d, negative_slope: float) -> float:
    """1 / sqrt((1 + slope^2) fan_in): the start of ACAI's code, He's without its factor 2."""
    return ((1 + negative_slope**2) * conv.in_channels * math.prod(conv.kernel_size)) ** -0.5


class HfkdVaeEncoderForImageClassification(ConvNetForImageClassification):
    """Encoder with a linear classifier."""

    config_class = HfkdVaeEncoderConfig
    backbone_class = HfkdVaeEncoderModel


HfkdVaeEncoderModel.register_for_auto_class("AutoModel")
HfkdVaeEncoderForImageClassification.register_for_auto_class("AutoModelForImageClassification")
