"""StyleGAN2's generator with skip connections (Karras et al., CVPR 2020, arXiv 1912.04958)."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils.generic import can_return_tuple

from .configuration_stylegan2_generator import HfkdStyleGan2GeneratorConfig
from .generator import GeneratorOutput, GeneratorPreTrainedModel, class_numbers
from .stylegan2_layers import (
    MappingNetwork,
    Resampling,
    StyledConv,
    StyleGan2Layer,
    ToRgb,
    split_noise,
    without_autocast,
)


NoiseMode = Literal["random", "const", "none"]


class SynthesisBlock(Resampling):
    """Two styled convolutions, of which the first doubles the side, and colours that are added to the image.

    The first block has a learned constant in the place of its first convolution.
    """

    def __init__(self, config: HfkdStyleGan2GeneratorConfig, resolution: int) -> None:
        super().__init__()
        channels = config.channels(resolution)
        first = resolution == config.resolutions[0]
        sizes = (config.w_dim, resolution)
        if first:
            self.const = nn.Parameter(torch.empty(channels, resolution, resolution))
        else:
            before = config.channels(resolution // 2)
            self.conv0 = StyledConv(before, channels, *sizes, up=True, clamp=config.conv_clamp)
        self.conv1 = StyledConv(channels, channels, *sizes, up=False, clamp=config.conv_clamp)
        self.torgb = ToRgb(channels, config.num_channels, config.w_dim, config.conv_clamp)
        self.convs = ("conv1",) if first else ("conv0", "conv1")

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if len(self.convs) == 1:
            init.normal_(self.const)

    def layers(self) -> list[StyledConv]:
        """The styled convolutions in order."""
        return [getattr(self, name) for name in self.convs]

    def forward(
        self,
        maps: torch.Tensor | None,
        images: torch.Tensor | None,
        ws: torch.Tensor,
        noise: Sequence[torch.Tensor | None],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps after the second convolution, and images up to here.

        Args:
            maps, images: those of the block before; None at the first.
            ws: (N, number of convolutions + 1, w_dim); the last is for the colours.
            noise: for each convolution, or None for none.
        """
        if maps is None:
            maps = self.const.expand(len(ws), -1, -1, -1)
        for number, layer in enumerate(self.layers()):
            maps = layer(maps, ws[:, number], noise[number])
        colours = self.torgb(maps, ws[:, len(self.convs)]).to(self.torgb.bias.dtype)
        if images is None:
            return maps, colours
        with without_autocast(maps):  # 8 bits are too few for a sum of colours
            return maps, self.upsample(images) + colours


class SynthesisNetwork(nn.Module):
    """Blocks from 4x4 positions to the image's; the colours of one share their w with the next one's first layer."""

    def __init__(self, config: HfkdStyleGan2GeneratorConfig) -> None:
        super().__init__()
        for resolution in config.resolutions:
            self.add_module(f"b{resolution}", SynthesisBlock(config, resolution))

    def blocks(self) -> list[SynthesisBlock]:
        """The blocks in order."""
        return [block for block in self.children() if isinstance(block, SynthesisBlock)]

    def layers(self) -> list[StyledConv]:
        """All styled convolutions in order."""
        return [layer for block in self.blocks() for layer in block.layers()]

    def forward(
        self, ws: torch.Tensor, noise: Sequence[torch.Tensor | None]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Images (N, C, H, W) and each block's maps, of ws (N, num_ws, w_dim) and one noise for each layer."""
        maps: torch.Tensor | None = None
        images: torch.Tensor | None = None
        features = []
        used = 0
        for block in self.blocks():
            taken = len(block.convs)
            maps, images = block(maps, images, ws[:, used : used + taken + 1], noise[used : used + taken])
            features.append(maps)
            used += taken
        assert images is not None  # there is at least one block
        return images, tuple(features)


class HfkdStyleGan2GeneratorModel(GeneratorPreTrainedModel):
    """A mapping network from latents to styles, and a synthesis network from styles and noise to images.

    Images are not cut off: a few values lie outside [-1, 1]. State names are those of StyleGAN2-ADA's weights, which
    `hfkd convert stylegan2-ada` reads.
    """

    config_class = HfkdStyleGan2GeneratorConfig

    def __init__(self, config: HfkdStyleGan2GeneratorConfig) -> None:
        super().__init__(config)
        self.mapping = MappingNetwork(
            config.latent_size, config.num_classes, config.w_dim, config.mapping_layers, track_mean=True
        )
        self.synthesis = SynthesisNetwork(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, StyleGan2Layer):
            module.reset_parameters()

    @property
    def noise_size(self) -> int:
        return self.config.noise_size

    def conditions(
        self,
        n: int,
        labels: Sequence[int] | torch.Tensor | None = None,
        truncation_psi: float | None = None,
    ) -> dict[str, torch.Tensor]:
        """Of a generator of classes `labels` (n,), by default 0, 1, 2, ... in turn; and any `truncation_psi`; all on
        the CPU.

        Raises:
            ValueError: labels without classes, another number of them, or one outside the classes.
        """
        if self.config.num_classes:
            labels = class_numbers(n, labels, self.config.num_classes)
        asked = super().conditions(n, labels)
        if truncation_psi is not None:
            asked["truncation_psi"] = torch.tensor(truncation_psi)
        return asked

    @can_return_tuple
    def forward(
        self,
        latents: torch.Tensor,
        labels: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        noise_mode: NoiseMode = "random",
        truncation_psi: float | torch.Tensor | None = None,
    ) -> GeneratorOutput:
        """Images and block features, both of the same styles and noise.

        Args:
            latents: (N, latent_size), from N(0, I).
            labels: int64 (N,), of a generator of classes. They are taken as they are: `conditions` checks a user's.
            noise: see `synthesize`.
            noise_mode: see `synthesize`.
            truncation_psi: factor of w's distance from its mean; None or 1 leaves w, 0 gives all latents one style.

        Raises:
            ValueError: labels missing or not wanted, or noise that does not fit its mode.
        """
        if labels is None and self.config.num_classes:
            raise ValueError(f"{type(self).__name__} makes images of classes: give labels")
        if labels is not None and not self.config.num_classes:
            raise ValueError(f"{type(self).__name__} knows no classes here: leave labels out")
        w = self.mapping(latents, labels)
        if truncation_psi is not None:
            w = self.mapping.w_avg + truncation_psi * (w - self.mapping.w_avg)
        ws = w[:, None].expand(-1, self.config.num_ws, -1)
        images, features = self.synthesis(ws, self._noise_of_layers(noise, noise_mode))
        return GeneratorOutput(images=images, block_features=features, latents=latents, intermediate_latents=ws)

    def synthesize(
        self,
        intermediate_latents: torch.Tensor,
        noise: torch.Tensor | None = None,
        noise_mode: NoiseMode = "random",
    ) -> GeneratorOutput:
        """Images of `intermediate_latents` (N, num_ws, w_dim), which need not come from latents.

        Args:
            intermediate_latents: one for each convolution, and one for the last colours.
            noise: standard normal (N, noise_size), for the layers in order; None for no noise.
            noise_mode: `random` takes `noise`, `const` the noise that is saved with the weights, `none` none.

        Raises:
            ValueError: intermediate latents of another shape, an unknown mode, noise of another size, or noise that is
                given without being taken.
        """
        expected = (self.config.num_ws, self.config.w_dim)
        if intermediate_latents.ndim != 3 or intermediate_latents.shape[1:] != expected:
            raise ValueError(
                f"intermediate_latents have shape {tuple(intermediate_latents.shape)}: an image takes "
                f"{expected[0]} of {expected[1]} numbers each"
            )
        images, features = self.synthesis(intermediate_latents, self._noise_of_layers(noise, noise_mode))
        return GeneratorOutput(images=images, block_features=features, intermediate_latents=intermediate_latents)

    def _noise_of_layers(self, noise: torch.Tensor | None, noise_mode: str) -> Sequence[torch.Tensor | None]:
        layers = self.synthesis.layers()
        if noise_mode not in ("random", "const", "none"):
            raise ValueError(f"noise_mode={noise_mode!r} is unknown: choose one of random, const, none")
        if noise is not None:
            if noise_mode != "random":
                raise ValueError(f"noise is given, and noise_mode={noise_mode!r} takes none: leave one of them out")
            if noise.shape != (len(noise), self.noise_size):
                raise ValueError(f"noise has shape {tuple(noise.shape)}: an image takes {self.noise_size} numbers")
            return split_noise(noise, [layer.noise_const.shape[0] for layer in layers])
        return [layer.noise_const if noise_mode == "const" else None for layer in layers]


HfkdStyleGan2GeneratorModel.register_for_auto_class("AutoModel")
