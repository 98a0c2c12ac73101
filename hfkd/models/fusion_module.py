"""The fusion module of FFL: one classifier on the feature maps of several networks; training-only."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfkd.models.feature_discriminator import Shape, common_map_shape


class FusionModule(nn.Module):
    """Depthwise 3x3, batch norm, ReLU, 1x1, batch norm, ReLU, average pooling, linear (Kim et al., arXiv 1904.09058).

    Layers and initialisation are the released code's, for maps of one shape. Maps of unequal size are average-pooled
    to the smallest height and width, and the 1x1 convolution is as wide as the widest map (both inferred).

    Args:
        shapes: (C_k, H_k, W_k) of the networks' maps.
        num_labels: K.
    """

    def __init__(self, shapes: Sequence[Shape], num_labels: int) -> None:
        super().__init__()
        width, height, length = common_map_shape(shapes, "max")
        self.size = (height, length)
        channels = sum(shape[0] for shape in shapes)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, num_labels),
        )
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                # Of the depthwise one, too, by all its outputs: the released code does not divide by the groups.
                fan_out = layer.out_channels * math.prod(layer.kernel_size)
                nn.init.normal_(layer.weight, std=math.sqrt(2 / fan_out))

    def forward(self, feature_maps: Sequence[Tensor]) -> Tensor:
        """Logits (N, K) of maps (N, C_k, H_k, W_k), in the order of `shapes`."""
        sized = [one if one.shape[-2:] == self.size else F.adaptive_avg_pool2d(one, self.size) for one in feature_maps]
        return self.layers(torch.cat(sized, dim=1))
