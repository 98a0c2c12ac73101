"""DCGAN's discriminator of strided convolutions (Radford et al., ICLR 2016, arXiv 1511.06434)."""

from typing import Any

import torch
from torch import nn
from transformers.utils.generic import can_return_tuple

from .configuration_dcgan_discriminator import HfkdDcganDiscriminatorConfig
from .configuration_dcgan_generator import FIRST_SIDE, dcgan_widths
from .discriminator import DiscriminatorOutput, DiscriminatorPreTrainedModel
from .layers import make_norm
from .spectral_norm import SpectralConv2d


class HfkdDcganDiscriminatorModel(DiscriminatorPreTrainedModel):
    """Blocks of strided convolution, norm and leaky ReLU, down to 4x4 pixels; one more makes a logit of these."""

    config_class = HfkdDcganDiscriminatorConfig

    def __init__(self, config: HfkdDcganDiscriminatorConfig) -> None:
        super().__init__(config)
        conv: Any = SpectralConv2d if config.norm == "spectral" else nn.Conv2d
        self.blocks = nn.ModuleList()
        channels = config.num_channels
        for width in reversed(dcgan_widths(config.image_size, config.width)):
            # Batch norm before the images' statistics are mixed would take away what tells them apart.
            norm = "batch" if config.norm == "batch" and len(self.blocks) else "none"
            layers = (conv(channels, width, 4, 2, 1, bias=norm == "none"), make_norm(norm, width))
            self.blocks.append(nn.Sequential(*layers, nn.LeakyReLU(config.negative_slope)))
            channels = width
        self.to_logit = conv(channels, 1, FIRST_SIDE)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, SpectralConv2d):
                nn.init.normal_(module.direction)
        else:
            super()._init_weights(module)

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> DiscriminatorOutput:
        """Logits of `pixel_values` (N, C, H, W) in [-1, 1]; the pooled vector is the mean of the 4x4 map.

        Raises:
            ValueError: images of another shape, or labels, which this discriminator does not know.
        """
        if labels is not None:
            raise ValueError(f"{type(self).__name__} knows no classes: leave labels out")
        hidden = self.as_input(pixel_values)
        block_features = []
        for block in self.blocks:
            hidden = block(hidden)
            block_features.append(hidden)
        return DiscriminatorOutput(
            logits=self.to_logit(hidden).flatten(),
            block_features=tuple(block_features),
            pooler_output=hidden.mean(dim=(2, 3)),
        )


HfkdDcganDiscriminatorModel.register_for_auto_class("AutoModel")
