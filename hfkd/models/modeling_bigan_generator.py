"""ALI's generator of transposed convolutions (Dumoulin et al., ICLR 2017, arXiv 1606.00704)."""

import torch
from torch import nn
from transformers.utils.generic import can_return_tuple

from .configuration_bigan_generator import HfkdBiganGeneratorConfig
from .generator import GeneratorOutput, GeneratorPreTrainedModel
from .layers import make_norm


class HfkdBiganGeneratorModel(GeneratorPreTrainedModel):
    """Blocks of transposed convolution, norm and leaky ReLU; then a 1x1 convolution with a bias for each pixel.

    ALI ends in a sigmoid; here tanh gives the same images, in [-1, 1].
    """

    config_class = HfkdBiganGeneratorConfig

    def __init__(self, config: HfkdBiganGeneratorConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList()
        channels = config.latent_size
        for width, kernel_size, stride in zip(config.hidden_sizes, config.kernel_sizes, config.strides, strict=True):
            conv = nn.ConvTranspose2d(channels, width, kernel_size, stride, bias=config.norm == "none")
            self.blocks.append(nn.Sequential(conv, make_norm(config.norm, width), nn.LeakyReLU(config.negative_slope)))
            channels = width
        self.to_image = nn.Conv2d(channels, config.num_channels, 1, bias=False)
        self.pixel_bias = nn.Parameter(torch.empty(config.num_channels, config.image_size, config.image_size))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif module is self:
            nn.init.zeros_(self.pixel_bias)
        else:
            super()._init_weights(module)

    @torch.no_grad()
    def start_at(self, mean_image: torch.Tensor) -> None:
        """Set the pixels' bias such that fresh weights give about `mean_image` (C, H, W) in [-1, 1].

        ALI's code starts at the mean of 500 training images.
        """
        self.pixel_bias.copy_(mean_image.double().clamp(1e-6 - 1, 1 - 1e-6).atanh())

    @can_return_tuple
    def forward(self, latents: torch.Tensor, labels: torch.Tensor | None = None) -> GeneratorOutput:
        """Images of `latents` (N, latent_size).

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
        images = torch.tanh(self.to_image(hidden) + self.pixel_bias)
        return GeneratorOutput(images=images, block_features=tuple(block_features), latents=latents)


HfkdBiganGeneratorModel.register_for_auto_class("AutoModel")
