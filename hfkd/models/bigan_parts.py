"""Training-only networks of BiGAN: the encoder's latent layers and the joint discriminator D(x, z).

Their sizes are ALI's (Dumoulin et al., ICLR 2017, arXiv 1606.00704, appendix A) where the encoder's are.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from hfkd.errors import InputError
from hfkd.models.configuration_bigan_encoder import HfkdBiganEncoderConfig
from hfkd.models.layers import make_norm
from hfkd.models.modeling_bigan_encoder import make_block


PIECES = 2  # of maxout

DiscriminatorActivation = Literal["maxout", "leaky_relu"]
DiscriminatorNorm = Literal["batch", "none"]


class LatentHead(nn.Module):
    """From the encoder's features f(x) to q(z | x): a 1x1 block and a linear 1x1 convolution.

    Args:
        config: the encoder's.
        latent_size: L.
    """

    def __init__(self, config: HfkdBiganEncoderConfig, latent_size: int) -> None:
        super().__init__()
        width = config.hidden_sizes[-1]
        self.layers = nn.Sequential(make_block(config, width, width, 1), nn.Conv2d(width, 2 * latent_size, 1))
        initialise(self, config.initializer_range)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation, each (N, L), for features (N, C)."""
        mean, log_std = self.layers(features[:, :, None, None]).flatten(1).chunk(2, dim=1)
        return mean, log_std


class Maxout(nn.Module):
    """The larger of each channel and its partner in the second half (Goodfellow et al., ICML 2013)."""

    def forward(self, hidden: Tensor) -> Tensor:
        # A quarter faster, there and back, than torch.maximum of neighbours.
        first, second = hidden.chunk(PIECES, dim=1)
        return torch.where(first > second, first, second)


class JointDiscriminator(nn.Module):
    """D(x, z): the encoder's convolutions on x, two 1x1 layers on z, and three on both.

    The layers on z are as wide as the encoder's last (ALI: 512), those on both twice that. As in ALI's code, maxout
    halves the channels of each layer (the paper's table counts 1,024 channels for D(x, z) to read, the code has 512);
    the first layer on x and those on both have biases, the others have none.

    Args:
        config: the encoder's.
        latent_size: L.
        activation: `maxout` of two pieces (ALI on CIFAR-10), or `leaky_relu` (on SVHN) with the encoder's slope.
        norm: `batch` in the layers on x after the first (ALI on SVHN), or `none`.
        input_dropout: before the first layer on x and on z.
        dropout: before every other layer.

    Raises:
        InputError: odd widths, which `maxout` cannot halve.
    """

    def __init__(
        self,
        config: HfkdBiganEncoderConfig,
        latent_size: int,
        *,
        activation: DiscriminatorActivation = "maxout",
        norm: DiscriminatorNorm = "none",
        input_dropout: float = 0.2,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if activation == "maxout" and any(width % PIECES for width in config.hidden_sizes):
            raise InputError(
                f"hidden_sizes={list(config.hidden_sizes)} of the encoder has odd widths, which maxout of the "
                "discriminator cannot halve: make them even, or choose discriminator_activation=leaky_relu"
            )
        self.activation, self.negative_slope = activation, config.negative_slope
        pieces = PIECES if activation == "maxout" else 1
        channels, of_image = config.num_channels, []
        for number, shape in enumerate(zip(config.hidden_sizes, config.kernel_sizes, config.strides, strict=True)):
            rate, own_norm = (dropout, norm) if number else (input_dropout, "none")
            of_image += self._layer(rate, nn.Conv2d(channels, *shape, bias=number == 0), own_norm)
            channels = shape[0] // pieces
        latent, joint = config.hidden_sizes[-1], 2 * config.hidden_sizes[-1]
        self.of_image = nn.Sequential(*of_image)
        self.of_latents = nn.Sequential(
            *self._layer(input_dropout, nn.Conv2d(latent_size, latent, 1, bias=False)),
            *self._layer(dropout, nn.Conv2d(latent // pieces, latent, 1, bias=False)),
        )
        self.of_both = nn.Sequential(
            *self._layer(dropout, nn.Conv2d(channels + latent // pieces, joint, 1)),
            *self._layer(dropout, nn.Conv2d(joint // pieces, joint, 1)),
            nn.Dropout(dropout),
            nn.Conv2d(joint // pieces, 1, 1),
        )
        initialise(self, config.initializer_range)

    def _layer(self, dropout: float, conv: nn.Conv2d, norm: str = "none") -> list[nn.Module]:
        activation = Maxout() if self.activation == "maxout" else nn.LeakyReLU(self.negative_slope)
        return [nn.Dropout(dropout), conv, make_norm(norm, conv.out_channels), activation]

    def forward(self, images: Tensor, latents: Tensor) -> Tensor:
        """Scores (N,), as logits, of pairs of images (N, C, H, W) and latents (N, L)."""
        of_image = self.of_image(images).mean(dim=(2, 3), keepdim=True)
        of_latents = self.of_latents(latents[:, :, None, None])
        return self.of_both(torch.cat([of_image, of_latents], dim=1)).flatten()


def initialise(module: nn.Module, std: float) -> None:
    """N(0, std^2) for all convolutions' weights and 0 for their biases, as ALI starts."""
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.normal_(conv.weight, std=std)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
