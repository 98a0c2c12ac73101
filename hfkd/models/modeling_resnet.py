"""Residual networks of He et al. (CVPR 2016, arXiv 1512.03385), for CIFAR and for ImageNet sizes."""

import torch
from torch import nn

from .configuration_resnet import HfkdResNetConfig
from .layers import PadShortcut, make_conv, make_norm, make_stages, scale_branch, start_at_zero
from .modeling_convnet import ConvNetForImageClassification, ConvNetModel


def make_stem(config: HfkdResNetConfig) -> nn.Sequential:
    """Image to `embedding_size` channels, at stride 1 (`cifar`) or 4 (`imagenet`)."""
    kernel_size, stride = (3, 1) if config.stem == "cifar" else (7, 2)
    conv = make_conv(config.num_channels, config.embedding_size, kernel_size, stride, norm=config.norm)
    stem = nn.Sequential(conv, make_norm(config.norm, config.embedding_size), nn.ReLU())
    if config.stem == "imagenet":
        stem.append(nn.MaxPool2d(kernel_size=3, stride=2, padding=1))
    return stem


def make_shortcut(config: HfkdResNetConfig, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The identity where the shape stays, else shortcut A or B."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if config.shortcut == "A":
        return PadShortcut(in_channels, out_channels, stride)
    return nn.Sequential(
        make_conv(in_channels, out_channels, 1, stride, norm=config.norm), make_norm(config.norm, out_channels)
    )


def make_branch(config: HfkdResNetConfig, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Convolutions of one block: (channels, kernel, stride) each, a norm after each, ReLU between them."""
    if config.layer_type == "basic":
        plan = [(out_channels, 3, stride), (out_channels, 3, 1)]
    else:
        width = out_channels // 4
        plan = [(width, 1, 1), (width, 3, stride), (out_channels, 1, 1)]
    branch = nn.Sequential()
    for channels, kernel_size, conv_stride in plan:
        if len(branch):
            branch.append(nn.ReLU())
        branch.append(make_conv(in_channels, channels, kernel_size, conv_stride, norm=config.norm))
        branch.append(make_norm(config.norm, channels))
        in_channels = channels
    scale_branch(branch[-2], sum(config.depths), norm=config.norm)
    if config.zero_init_residual:
        start_at_zero(branch[-1])
    return branch


class HfkdResNetBlock(nn.Module):
    """ReLU(branch(x) + shortcut(x))."""

    def __init__(self, config: HfkdResNetConfig, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.branch = make_branch(config, in_channels, out_channels, stride)
        self.shortcut = make_shortcut(config, in_channels, out_channels, stride)
        self.activation = nn.ReLU()

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        return self.activation(self.branch(hidden_state) + self.shortcut(hidden_state))


class HfkdResNetModel(ConvNetModel):
    """Stem and stages; the last block's ReLU gives the feature map."""

    config_class = HfkdResNetConfig

    def __init__(self, config: HfkdResNetConfig) -> None:
        super().__init__(config)
        self.stem = make_stem(config)
        self.stages = make_stages(HfkdResNetBlock, config, config.embedding_size)
        self.tail = nn.Identity()
        self.total_stride = (1 if config.stem == "cifar" else 4) * 2 ** (len(config.depths) - 1)
        self.post_init()


class HfkdResNetForImageClassification(ConvNetForImageClassification):
    """Residual network with a linear classifier."""

    config_class = HfkdResNetConfig
    backbone_class = HfkdResNetModel


HfkdResNetModel.register_for_auto_class("AutoModel")
HfkdResNetForImageClassification.register_for_auto_class("AutoModelForImageClassification")
