"""Layers of StyleGAN2 (Karras et al., CVPR 2020, arXiv 1912.04958), written from its formulas.

Parameters and buffers have the names of StyleGAN2-ADA's weights (arXiv 2006.06676), so that those load strictly.
Equalised learning rates (Karras et al., ICLR 2018, arXiv 1710.10196): weights start from N(0, 1) and are scaled by
1/sqrt(number of inputs) when used.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init


SLOPE = 0.2  # of the leaky ReLU
MAPPING_LR_MULTIPLIER = 0.01
W_AVG_DECAY = 0.995
EPSILON = 1e-8
TAPS = (0.125, 0.375, 0.375, 0.125)  # of the filter that maps are resized with


class StyleGan2Layer(nn.Module):
    """A layer that says how its own fresh parameters and buffers look."""

    def reset_parameters(self) -> None:
        raise NotImplementedError


class Resampling(StyleGan2Layer):
    """A layer that holds the low-pass filter (4, 4), whose sum is 1, as a buffer that is saved."""

    resample_filter: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("resample_filter", torch.empty(4, 4))

    def reset_parameters(self) -> None:
        taps = torch.tensor(TAPS, device=self.resample_filter.device)
        init.copy_(self.resample_filter, torch.outer(taps, taps))

    def smooth(self, maps: torch.Tensor, *, stride: int = 1, padding: int, gain: float = 1.0) -> torch.Tensor:
        """Filter each channel of `maps` (N, C, H, W), with zeros around; every `stride`-th position is kept."""
        channels = maps.shape[1]
        return F.conv2d(maps, self._kernel(channels, gain), stride=stride, padding=padding, groups=channels)

    def upsample(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps (N, C, H, W) at (N, C, 2H, 2W); of ones, the inner positions remain ones."""
        channels = maps.shape[1]
        return F.conv_transpose2d(maps, self._kernel(channels, 4.0), stride=2, padding=1, groups=channels)

    def _kernel(self, channels: int, gain: float) -> torch.Tensor:
        return (self.resample_filter * gain).expand(channels, 1, 4, 4)


def activate(hidden: torch.Tensor, clamp: float | None = None, gain: float = 1.0) -> torch.Tensor:
    """Leaky ReLU that keeps the variance (times sqrt(2)), times `gain`, and within +-`clamp` times `gain`."""
    hidden = F.leaky_relu(hidden, SLOPE) * (math.sqrt(2) * gain)
    return clamped(hidden, None if clamp is None else clamp * gain)


def clamped(hidden: torch.Tensor, limit: float | None) -> torch.Tensor:
    """Within +-`limit`, where there is one."""
    return hidden if limit is None else hidden.clamp(-limit, limit)


def normalized(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors (N, D) with a mean square of 1."""
    return vectors * (vectors.square().mean(dim=1, keepdim=True) + EPSILON).rsqrt()


def without_autocast(like: torch.Tensor) -> AbstractContextManager[None]:
    """Full precision for what follows on the device of `like`."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def per_channel(values: torch.Tensor) -> torch.Tensor:
    """(N, C) as (N, C, 1, 1), to go with maps."""
    return values[:, :, None, None]


class EqualizedLinear(StyleGan2Layer):
    """y = x (W lr / sqrt(in_features))^T + b lr, where W starts from N(0, 1/lr^2), and an activation if wanted.

    Args:
        in_features, out_features: widths.
        activation: whether the leaky ReLU follows.
        bias_init: what y's shift is at the start, divided by `lr_multiplier`.
        lr_multiplier: lr: the layer learns as with a learning rate so many times as large.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        activation: bool = False,
        bias_init: float = 0.0,
        lr_multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.activation = activation
        self.bias_init = bias_init
        self.lr_multiplier = lr_multiplier

    def reset_parameters(self) -> None:
        init.normal_(self.weight, std=1 / self.lr_multiplier)
        init.constant_(self.bias, self.bias_init)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        gain = self.lr_multiplier / math.sqrt(self.weight.shape[1])
        hidden = F.linear(inputs, self.weight * gain, self.bias * self.lr_multiplier)
        return activate(hidden) if self.activation else hidden


class EqualizedConv(Resampling):
    """Convolution of the discriminator with an equalised learning rate, on maps of half the side if wanted.

    Args:
        in_channels, out_channels, kernel_size: of the convolution; the kernel is odd.
        down: smooth, and keep every second position.
        linear: leave bias and activation out.
        clamp: limit of what comes out.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        down: bool = False,
        linear: bool = False,
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = None if linear else nn.Parameter(torch.empty(out_channels))
        self.down = down
        self.clamp = clamp

    def reset_parameters(self) -> None:
        super().reset_parameters()
        init.normal_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, maps: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
        weight = self.weight / math.sqrt(self.weight[0].numel())
        kernel_size = weight.shape[-1]
        if not self.down:
            hidden = F.conv2d(maps, weight, self.bias, padding=kernel_size // 2)
        elif kernel_size == 1:  # nothing is mixed across positions: drop them before the convolution
            hidden = F.conv2d(self.smooth(maps, stride=2, padding=1), weight, self.bias)
        else:
            hidden = F.conv2d(self.smooth(maps, padding=1 + kernel_size // 2), weight, self.bias, stride=2)
        return hidden * gain if self.bias is None else activate(hidden, self.clamp, gain)


class StyledConv(Resampling):
    """3x3 convolution of the generator, whose input channels a style scales, and whose output is demodulated.

    It is computed as a convolution of scaled maps, times d[n, o] = 1 / sqrt(sum_i s[n, i]^2 sum_kl W[o, i, k, l]^2 +
    eps) afterwards, which needs no weights for each image (arXiv 1912.04958, section 2.2). In between, maps are
    smaller by a power of two near the root of the number of inputs, so that float16 holds them; this rounds nothing.

    Args:
        in_channels, out_channels: of the convolution.
        w_dim: width of the intermediate latents.
        resolution: side of the maps that come out.
        up: whether those that come in are half as large.
        clamp: limit of what comes out.
    """

    noise_const: torch.Tensor

    def __init__(
        self, in_channels: int, out_channels: int, w_dim: int, resolution: int, *, up: bool, clamp: float | None
    ) -> None:
        super().__init__()
        self.affine = EqualizedLinear(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.noise_strength = nn.Parameter(torch.empty(()))
        self.register_buffer("noise_const", torch.empty(resolution, resolution))
        self.up = up
        self.clamp = clamp
        self.scale = 2.0 ** -round(math.log2(in_channels * 3**2) / 2)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        init.normal_(self.weight)
        init.zeros_(self.bias)
        init.zeros_(self.noise_strength)
        init.normal_(self.noise_const)

    def demodulation(self, style: torch.Tensor) -> torch.Tensor:
        """d (N, out_channels) in float32 or more: with styles (N, in_channels), output then has unit variance."""
        with without_autocast(style):
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            energy = self.weight.to(dtype).square().sum(dim=(2, 3))
            return (style.to(dtype).square() @ energy.T + EPSILON).rsqrt()

    def forward(self, maps: torch.Tensor, w: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """Maps (N, C, H, W), w (N, w_dim), noise (N or 1, 1, resolution, resolution) or None."""
        style = self.affine(w)
        maps = maps * per_channel(style * self.scale)
        if self.up:
            maps = F.conv_transpose2d(maps, self.weight.transpose(0, 1), stride=2)
            maps = self.smooth(maps, padding=1, gain=4.0)
        else:
            maps = F.conv2d(maps, self.weight, padding=1)
        maps = maps * per_channel(self.demodulation(style) / self.scale).to(maps.dtype)
        if noise is not None:
            maps = maps + (noise * self.noise_strength).to(maps.dtype)
        return activate(maps + per_channel(self.bias[None]).to(maps.dtype), self.clamp)


class ToRgb(StyleGan2Layer):
    """1x1 convolution from maps to an image, with a style, without demodulation.

    Args:
        in_channels: of the maps.
        num_channels: of the image.
        w_dim: width of the intermediate latents.
        clamp: limit of the image.
    """

    def __init__(self, in_channels: int, num_channels: int, w_dim: int, clamp: float | None) -> None:
        super().__init__()
        self.affine = EqualizedLinear(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.empty(num_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.empty(num_channels))
        self.clamp = clamp

    def reset_parameters(self) -> None:
        init.normal_(self.weight)
        init.zeros_(self.bias)

    def forward(self, maps: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        style = self.affine(w) / math.sqrt(maps.shape[1])
        return clamped(F.conv2d(maps * per_channel(style), self.weight, self.bias), self.clamp)


class MappingNetwork(StyleGan2Layer):
    """Fully connected layers from latents, and the embedding of a class, to an intermediate latent w.

    Under autocast they remain in full precision, as every map depends on w.

    Args:
        latent_size: of the latents, or 0 where there is nothing but the class.
        num_classes: 0 for none.
        w_dim: width of all that follows.
        num_layers: fully connected layers.
        track_mean: whether the mean of w is followed in training, for truncation.
    """

    w_avg: torch.Tensor

    def __init__(
        self, latent_size: int, num_classes: int, w_dim: int, num_layers: int, *, track_mean: bool = False
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_layers = num_layers
        self.track_mean = track_mean
        if num_classes:
            self.embed = EqualizedLinear(num_classes, w_dim)
        features = latent_size + (w_dim if num_classes else 0)
        for number in range(num_layers):
            layer = EqualizedLinear(features, w_dim, activation=True, lr_multiplier=MAPPING_LR_MULTIPLIER)
            self.add_module(f"fc{number}", layer)
            features = w_dim
        if track_mean:
            self.register_buffer("w_avg", torch.empty(w_dim))

    def reset_parameters(self) -> None:
        if self.track_mean:
            init.zeros_(self.w_avg)

    def forward(self, latents: torch.Tensor | None, labels: torch.Tensor | None) -> torch.Tensor:
        """w (N, w_dim) of latents (N, latent_size) and class numbers (N,), of which one may not be wanted."""
        weight = next(self.parameters())
        with without_autocast(weight):
            parts = [] if latents is None else [normalized(latents.to(weight.dtype))]
            if labels is not None:
                parts.append(normalized(self.embed(F.one_hot(labels, self.num_classes).to(weight.dtype))))
            w = torch.cat(parts, dim=1)
            for number in range(self.num_layers):
                w = self.get_submodule(f"fc{number}")(w)
        if self.training and self.track_mean:
            with torch.no_grad():
                self.w_avg.lerp_(w.mean(dim=0).to(self.w_avg.dtype), 1 - W_AVG_DECAY)
        return w


class MinibatchStd(nn.Module):
    """Adds one channel: the standard deviation over a group of images, averaged over channels and positions.

    Image n of N belongs to group n mod (N / group size).

    Args:
        group_size: the largest that is taken; groups are equal. None: the whole batch.
    """

    def __init__(self, group_size: int | None) -> None:
        super().__init__()
        self.group_size = group_size

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) to (N, C + 1, H, W)."""
        n, _, height, width = maps.shape
        size = min(self.group_size or n, n)
        while n % size:
            size -= 1
        groups = maps.to(torch.promote_types(maps.dtype, torch.float32)).unflatten(0, (size, n // size))
        deviation = (groups.var(dim=0, correction=0) + EPSILON).sqrt().mean(dim=(1, 2, 3)).to(maps.dtype)
        return torch.cat([maps, deviation.repeat(size)[:, None, None, None].expand(n, 1, height, width)], dim=1)


def split_noise(noise: torch.Tensor, resolutions: Sequence[int]) -> list[torch.Tensor]:
    """Numbers (N, sum of r^2) as maps (N, 1, r, r), one for each of `resolutions`."""
    parts = noise.split([resolution**2 for resolution in resolutions], dim=1)
    return [part.view(-1, 1, r, r) for part, r in zip(parts, resolutions, strict=True)]
