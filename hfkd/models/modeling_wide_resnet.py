"""Pre-activation wide residual networks of Zagoruyko and Komodakis (BMVC 2016, arXiv 1605.07146)."""

import torch
from torch import nn

from .configuration_wide_resnet import HfkdWideResNetConfig
from .layers import make_conv, make_norm, make_stages, scale_branch
from .modeling_convnet import ConvNetForImageClassification, ConvNetModel


STEM_CHANNELS = 16


class HfkdWideResNetBlock(nn.Module):
    """x + branch(ReLU(norm(x))). Where the shape changes, a 1x1 convolution of ReLU(norm(x)) takes the place of x."""

    def __init__(self, config: HfkdWideResNetConfig, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        norm = config.norm
        self.preactivation = nn.Sequential(make_norm(norm, in_channels), nn.ReLU())
        self.branch = nn.Sequential(
            make_conv(in_channels, out_channels, 3, stride, norm=norm),
            make_norm(norm, out_channels),
            nn.ReLU(),
            make_conv(out_channels, out_channels, 3, norm=norm),
        )
        scale_branch(self.branch[-1], sum(config.depths), norm=norm)
        changes_shape = stride != 1 or in_channels != out_channels
        self.shortcut = make_conv(in_channels, out_channels, 1, stride, norm=norm) if changes_shape else None

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        activated = self.preactivation(hidden_state)
        residual = hidden_state if self.shortcut is None else self.shortcut(activated)
        return residual + self.branch(activated)


class HfkdWideResNetModel(ConvNetModel):
    """Stem and stages; a final norm and ReLU give the feature map."""

    config_class = HfkdWideResNetConfig

    def __init__(self, config: HfkdWideResNetConfig) -> None:
        super().__init__(config)
        self.stem = make_conv(config.num_channels, STEM_CHANNELS, 3, norm=config.norm)
        self.stages = make_stages(HfkdWideResNetBlock, config, STEM_CHANNELS)
        self.tail = nn.Sequential(make_norm(config.norm, config.hidden_sizes[-1]), nn.ReLU())
        self.total_stride = 2 ** (len(config.depths) - 1)
        self.post_init()


class HfkdWideResNetForImageClassification(ConvNetForImageClassification):
    """Wide residual network with a linear classifier."""

    config_class = HfkdWideResNetConfig
    backbone_class = HfkdWideResNetModel


HfkdWideResNetModel.register_for_auto_class("AutoModel")
HfkdWideResNetForImageClassification.register_for_auto_class("AutoModelForImageClassification")
