"""Training-only networks of AFD on feature maps: the discriminators D_k and the transfer layers T_k.

Neither is part of a student: they are dropped at inference (Chung et al., ICML 2020, arXiv 2002.01775). The paper
describes what they do, not what they are made of; the architectures below are inferred.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


Shape = tuple[int, int, int]
DiscriminatorNorm = Literal["batch", "instance", "none"]


class FeatureDiscriminator(nn.Module):
    """D_k: tells the maps that network k learns from (target 1) from its own (target 0), unconditionally.

    Conv3x3 stride 2, norm, LeakyReLU(0.2), repeated `num_layers - 1` times, then one convolution over all remaining
    positions (38,017 parameters at 64 channels on 8x8 maps). With `patch` the last convolution is 1x1 and every
    position is scored.

    Batch norm uses the statistics of the batch at hand, in evaluation too, and keeps no running ones: a discriminator
    is only ever shown whole batches of one kind.

    Args:
        channels: channels of the maps, C*.
        map_size: (H, W) of the maps.
        hidden_channels: width of the hidden layers; `channels` when None.
        num_layers: convolutions in all, >= 1.
        norm: in the hidden layers.
        spectral_norm: constrain every convolution's spectral norm to 1.
        patch: score positions instead of maps.
        sigmoid: end in a sigmoid (scores in (0, 1), the paper's) or not.

    Raises:
        ValueError: if `num_layers` < 1.
    """

    def __init__(
        self,
        channels: int,
        map_size: tuple[int, int],
        *,
        hidden_channels: int | None = None,
        num_layers: int = 2,
        norm: DiscriminatorNorm = "batch",
        spectral_norm: bool = False,
        patch: bool = False,
        sigmoid: bool = True,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers={num_layers} must be at least 1")
        width = hidden_channels or channels
        height_width = map_size
        layers: list[nn.Module] = []
        for _ in range(num_layers - 1):
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=norm == "none"), *_norm(norm, width)]
            layers.append(nn.LeakyReLU(0.2))
            channels = width
            height_width = ((height_width[0] + 1) // 2, (height_width[1] + 1) // 2)
        layers.append(nn.Conv2d(channels, 1, 1 if patch else height_width))
        if spectral_norm:
            layers = [nn.utils.parametrizations.spectral_norm(x) if isinstance(x, nn.Conv2d) else x for x in layers]
        self.layers = nn.Sequential(*layers)
        self.sigmoid = sigmoid

    def forward(self, feature_map: Tensor) -> Tensor:
        """Scores (N,) of maps (N, C*, H, W), or (N, P) with `patch`; at least float32, also under autocast."""
        scores = self.layers(feature_map).flatten(1)
        if scores.dtype in (torch.bfloat16, torch.float16):
            scores = scores.float()
        if scores.shape[1] == 1:
            scores = scores.squeeze(1)
        return scores.sigmoid() if self.sigmoid else scores


class TransferLayer(nn.Module):
    """T_k: brings network k's map to the common width C* and the common size, so that any D can read it.

    It has no parameters and is the identity where channels agree (unless `always`); otherwise Conv1x1, batch norm and
    ReLU: taps come after a ReLU, and a signed map would be told from an identity branch by its sign alone.
    Larger maps are average-pooled to the common size.

    Args:
        in_channels: channels of the student's map, C_k.
        common_channels: C*.
        common_size: (H, W) that every map is pooled to.
        activation: `relu` or `none`.
        always: use the convolution even where channels agree.
    """

    def __init__(
        self,
        in_channels: int,
        common_channels: int,
        common_size: tuple[int, int],
        *,
        activation: Literal["relu", "none"] = "relu",
        always: bool = False,
    ) -> None:
        super().__init__()
        self.common_size = common_size
        self.project: nn.Module = nn.Identity()
        if always or in_channels != common_channels:
            layers: list[nn.Module] = [
                nn.Conv2d(in_channels, common_channels, 1, bias=False),
                nn.BatchNorm2d(common_channels),
            ]
            self.project = nn.Sequential(*layers, *([nn.ReLU()] if activation == "relu" else []))

    def forward(self, feature_map: Tensor) -> Tensor:
        """(N, C_k, H_k, W_k) -> (N, C*, H, W)."""
        if feature_map.shape[-2:] != self.common_size:
            feature_map = F.adaptive_avg_pool2d(feature_map, self.common_size)
        return self.project(feature_map)


def common_map_shape(shapes: Sequence[Shape], channels: str) -> Shape:
    """(C*, H, W) that all maps are brought to: the smallest height and width, and the width that `channels` names.

    Args:
        shapes: (C_k, H_k, W_k) of the maps.
        channels: `min` or `max` of the C_k, or a number.
    """
    widths, heights, lengths = zip(*shapes, strict=True)
    width = {"min": min(widths), "max": max(widths)}.get(channels) or int(channels)
    return width, min(heights), min(lengths)


def _norm(norm: DiscriminatorNorm, channels: int) -> list[nn.Module]:
    if norm == "batch":
        return [nn.BatchNorm2d(channels, track_running_stats=False)]
    if norm == "instance":
        return [nn.InstanceNorm2d(channels, affine=True)]
    return []
