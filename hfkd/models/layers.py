"""Layers from which the residual families are built."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


NORM_GROUPS = 8


def make_conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, *, norm: str) -> nn.Conv2d:
    """Convolution that keeps the size at stride 1. It has a bias only where no norm would cancel it."""
    return nn.Conv2d(
        in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=norm == "none"
    )


def make_norm(norm: str, channels: int) -> nn.Module:
    """`batch`, `group` (the group count divides the channels) or `none`, which is the identity."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        return nn.GroupNorm(math.gcd(NORM_GROUPS, channels), channels)
    return nn.Identity()


class PadShortcut(nn.Module):
    """Shortcut A of He et al.: every `stride`-th pixel, the new channels filled with zeros (no parameters)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = out_channels - in_channels
        self.stride = stride

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        hidden_state = hidden_state[:, :, :: self.stride, :: self.stride]
        return F.pad(hidden_state, (0, 0, 0, 0, 0, self.new_channels))


def scale_branch(last_conv: nn.Module, num_branches: int, *, norm: str) -> None:
    """Without norms, mark the last convolution of a residual branch for an initial gain of 1/sqrt(num_branches).

    All branches together then add about as much variance as the stream had, at every depth (the scaling of Hayou et
    al., AISTATS 2021, arXiv 2010.12859), and unlike a zero gain every parameter has a gradient from the first step.
    """
    if norm == "none":
        last_conv.initial_gain = num_branches**-0.5


def start_at_zero(norm: Any) -> None:
    """Mark the last norm of a residual branch for an initial gain of 0: the block passes its input on at first."""
    norm.initial_gain = 0.0


def make_stages(make_block: Callable[[Any, int, int, int], nn.Module], config: Any, in_channels: int) -> nn.ModuleList:
    """Stages of `config.depths` blocks; every stage after the first halves the size in its first block.

    `make_block` takes the configuration, input channels, output channels and stride.
    """
    stages = nn.ModuleList()
    for stage, (out_channels, depth) in enumerate(zip(config.hidden_sizes, config.depths, strict=True)):
        blocks = nn.Sequential()
        for block in range(depth):
            stride = 2 if stage > 0 and block == 0 else 1
            blocks.append(make_block(config, in_channels, out_channels, stride))
            in_channels = out_channels
        stages.append(blocks)
    return stages
