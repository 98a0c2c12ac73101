"""StyleGAN2's discriminator (Karras et al., CVPR 2020, arXiv 1912.04958)."""

import math

import torch
from torch import nn
from transformers.utils.generic import can_return_tuple

from .configuration_stylegan2_discriminator import HfkdStyleGan2DiscriminatorConfig
from .discriminator import DiscriminatorOutput, DiscriminatorPreTrainedModel
from .stylegan2_layers import (
    EqualizedConv,
    EqualizedLinear,
    MappingNetwork,
    MinibatchStd,
    Resampling,
    StyleGan2Layer,
)


class DiscriminatorBlock(Resampling):
    """Two convolutions, of which the second halves the side; at the images' own size, a 1x1 one before them."""

    def __init__(self, config: HfkdStyleGan2DiscriminatorConfig, resolution: int) -> None:
        super().__init__()
        channels, after = config.channels(resolution), config.channels(resolution // 2)
        clamp = config.conv_clamp
        self.from_image = resolution == config.image_size
        self.residual = config.architecture == "resnet"
        if self.from_image:
            self.fromrgb = EqualizedConv(config.num_channels, channels, 1, clamp=clamp)
        self.conv0 = EqualizedConv(channels, channels, 3, clamp=clamp)
        self.conv1 = EqualizedConv(channels, after, 3, down=True, clamp=clamp)
        if self.residual:
            self.skip = EqualizedConv(channels, after, 1, down=True, linear=True)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        if self.from_image:
            maps = self.fromrgb(maps)
        if not self.residual:
            return self.conv1(self.conv0(maps))
        gain = math.sqrt(0.5)  # of each branch, so that the sum keeps the variance
        return self.skip(maps, gain) + self.conv1(self.conv0(maps), gain)


class DiscriminatorEpilogue(nn.Module):
    """From maps of 4x4 positions to the last hidden layer and an output."""

    def __init__(self, config: HfkdStyleGan2DiscriminatorConfig, resolution: int) -> None:
        super().__init__()
        channels = config.channels(resolution)
        self.mbstd = MinibatchStd(config.mbstd_group_size)
        self.conv = EqualizedConv(channels + 1, channels, 3, clamp=config.conv_clamp)
        self.fc = EqualizedLinear(channels * resolution**2, channels, activation=True)
        self.out = EqualizedLinear(channels, channels if config.num_classes else 1)

    def forward(self, maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden layer (N, C), and one output (N, 1), or one for each of the class embedding's numbers."""
        hidden = self.fc(self.conv(self.mbstd(maps)).flatten(1))
        return hidden, self.out(hidden)


class HfkdStyleGan2DiscriminatorModel(DiscriminatorPreTrainedModel):
    """Blocks that halve the side down to 4x4 positions, the deviation within groups of images, and two layers.

    With classes the logit is the inner product of the output and an embedding of the class (projection, Miyato and
    Koyama, ICLR 2018, arXiv 1802.05637), divided by the root of its width. State names are those of StyleGAN2-ADA's
    weights.
    """

    config_class = HfkdStyleGan2DiscriminatorConfig

    def __init__(self, config: HfkdStyleGan2DiscriminatorConfig) -> None:
        super().__init__(config)
        self.blocks = [f"b{resolution}" for resolution in reversed(config.resolutions[1:])]
        for name in self.blocks:
            self.add_module(name, DiscriminatorBlock(config, int(name[1:])))
        self.b4 = DiscriminatorEpilogue(config, config.resolutions[0])
        if config.num_classes:
            self.mapping = MappingNetwork(0, config.num_classes, config.channels(4), config.mapping_layers)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, StyleGan2Layer):
            module.reset_parameters()

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> DiscriminatorOutput:
        """Images (N, C, H, W) in [-1, 1] and, of a discriminator of classes, class numbers (N,).

        `block_features` are the maps after each block and the last hidden layer as a map of one position. A
        discriminator of classes that is given no labels has features and no logits.

        Raises:
            ValueError: images of another size, or labels that are not wanted.
        """
        if labels is not None and not self.config.num_classes:
            raise ValueError(f"{type(self).__name__} knows no classes here: leave labels out")
        maps = self.as_input(pixel_values)
        block_features = []
        for name in self.blocks:
            maps = self.get_submodule(name)(maps)
            block_features.append(maps)
        hidden, output = self.b4(maps)
        pooled = [features.mean(dim=(2, 3)) for features in block_features] if self.config.features == "multi" else []
        return DiscriminatorOutput(
            logits=self._logits(output, labels),
            block_features=(*block_features, hidden[:, :, None, None]),
            pooler_output=torch.cat([*pooled, hidden], dim=1),
        )

    def _logits(self, output: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor | None:
        if not self.config.num_classes:
            return output[:, 0]
        if labels is None:
            return None
        return (output * self.mapping(None, labels)).sum(dim=1) / math.sqrt(output.shape[1])


HfkdStyleGan2DiscriminatorModel.register_for_auto_class("AutoModel")
