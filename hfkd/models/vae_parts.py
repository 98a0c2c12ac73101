"""Training-only networks of the VAE: latent layers and decoder, as in ACAI's public code (arXiv 1807.07543)."""

from torch import Tensor, nn

from hfkd.models.configuration_vae_encoder import HfkdVaeEncoderConfig
from hfkd.models.layers import make_conv
from hfkd.models.modeling_vae_encoder import acai_std, make_block


class GaussianCodes(nn.Module):
    """From the encoder's map to q(z | x): a 3x3 convolution to `channels`, and two linear layers on all positions.

    Args:
        config: the encoder's.
        channels: of the code's map: 16 (ACAI's code also has 64).
        map_size: side of the encoder's map.
    """

    def __init__(self, config: HfkdVaeEncoderConfig, channels: int, map_size: int) -> None:
        super().__init__()
        size = channels * map_size**2
        self.conv = make_conv(config.hidden_sizes[-1], channels, 3, norm="none")
        self.mean, self.log_variance = nn.Linear(size, size), nn.Linear(size, size)
        initialise(self, config)

    def forward(self, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance, each (N, channels, S, S), for maps (N, C, S, S)."""
        codes = self.conv(feature_map)
        mean, log_variance = (layer(codes.flatten(1)).view_as(codes) for layer in (self.mean, self.log_variance))
        return mean, log_variance


class VaeDecoder(nn.Module):
    """From codes to logits of pixels: two blocks and nearest upsampling for each scale, a block and a convolution.

    Args:
        config: the encoder's.
        channels: of the code's map.
    """

    def __init__(self, config: HfkdVaeEncoderConfig, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in reversed(config.hidden_sizes[1:-1]):
            layers += [make_block(config, channels, width), make_block(config, width, width)]
            layers.append(nn.Upsample(scale_factor=2))
            channels = width
        layers.append(make_block(config, channels, config.depth))
        layers.append(make_conv(config.depth, config.num_channels, 3, norm="none"))
        self.layers = nn.Sequential(*layers)
        initialise(self, config)

    def forward(self, codes: Tensor) -> Tensor:
        """Logits (N, C, S * 2^scales, S * 2^scales) for codes (N, channels, S, S)."""
        return self.layers(codes)


def initialise(module: nn.Module, config: HfkdVaeEncoderConfig) -> None:
    """ACAI's normal for convolutions, Glorot's uniform for linear layers, 0 for biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=acai_std(layer, config.negative_slope))
        elif isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
