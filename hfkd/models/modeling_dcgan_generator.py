"""DCGAN's generator of transposed convolutions (Radford et al., ICLR 2016, arXiv 1511.06434)."""

import torch
from torch import nn
from transformers.utils.generic import can_return_tuple

from .configuration_dcgan_generator import FIRST_SIDE, HfkdDcganGeneratorConfig, dcgan_widths
from .generator import GeneratorOutput, GeneratorPreTrainedModel
from .layers import make_norm


class HfkdDcganGeneratorModel(GeneratorPreTrainedModel):
    """Blocks of transposed convolution, norm and ReLU, from 4x4 pixels on; then the image by one more, and tanh."""

    config_class = HfkdDcganGeneratorConfig

    def __init__(self, config: HfkdDcganGeneratorConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList()
        channels = config.latent_size
        for width in dcgan_widths(config.image_size, config.width):
            # From one position to the first map, then to twice the side.
            geometry = (4, 2, 1) if self.blocks else (FIRST_SIDE, 1, 0)
            conv = nn.ConvTranspose2d(channels, width, *geometry, bias=config.norm == "none")
            self.blocks.append(nn.Sequential(conv, make_norm(config.norm, width), nn.ReLU()))
            channels = width
        self.to_image = nn.ConvTranspose2d(channels, config.num_channels, 4, 2, 1)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.ConvTranspose2d):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @can_return_tuple
    def forward(self, latents: torch.Tensor, labels: torch.Tensor | None = None) -> GeneratorOutput:
        """Images of `latents` (N, latent_size), and the maps of 4, 8, ... pixels that they are made of.

        Raises:
            ValueError: labels, which this generator does not know.
        """
        if labels is not None:
            raise ValueError(f"{type(self).__name__} knows no classes: leave labels out")
        hidden = latents[:, :, None, None]
        block_features = []
        for block in self.blocks:
            hidden = block(hidden)
            block_features.append(hidden)
        images = torch.tanh(self.to_image(hidden))
        return GeneratorOutput(images=images, block_features=tuple(block_features), latents=latents)


HfkdDcganGeneratorModel.register_for_auto_class("AutoModel")
