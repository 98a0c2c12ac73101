"""Training-only networks of Squeeze-and-Span: T, which squeezes a generator's features, and the student's projector.

Sizes are those of the paper's public code (Yang et al., NeurIPS 2022, arXiv 2211.03000).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def pool_maps(features: Sequence[Tensor]) -> list[Tensor]:
    """Averages (N, C) over the positions of maps (N, C, H, W); what is (N, C) already stays."""
    return [feature.mean(dim=(2, 3)) if feature.dim() == 4 else feature for feature in features]


def hidden_layer(in_features: int, out_features: int) -> nn.Sequential:
    """Linear without bias, batch norm, ReLU."""
    return nn.Sequential(nn.Linear(in_features, out_features, bias=False), nn.BatchNorm1d(out_features), nn.ReLU())


class SqueezeModule(nn.Module):
    """T: a linear layer for each block's pooled features, their sum, and an MLP on it.

    At depth 0 it is the pooled features one after the other and has no parameters: "vanilla" distillation.

    Args:
        channels: C_l of each block l, or the width of the latent.
        representation_size: D of the result; at depth 0 it is the sum of `channels` instead.
        hidden_size: width of the sum and of the hidden layers.
        depth: linear layers of the MLP; all but the last are followed by batch norm and ReLU.

    Attributes:
        out_features: D.
    """

    def __init__(
        self, channels: Sequence[int], representation_size: int = 2048, hidden_size: int = 2048, depth: int = 3
    ) -> None:
        super().__init__()
        self.out_features = representation_size if depth else sum(channels)
        self.lateral = nn.ModuleList(nn.Linear(width, hidden_size) for width in (channels if depth else ()))
        self.mlp = nn.Sequential(*(hidden_layer(hidden_size, hidden_size) for _ in range(depth - 1)))
        if depth:
            self.mlp.append(nn.Linear(hidden_size, representation_size))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """z_g (N, D) of each block's map (N, C_l, H_l, W_l), or of vectors (N, C_l)."""
        pooled = pool_maps(features)
        if not self.lateral:
            return torch.cat(pooled, dim=1)
        layers = zip(self.lateral, pooled, strict=True)
        return self.mlp(torch.stack([layer(feature) for layer, feature in layers]).sum(dim=0))


class Projector(nn.Sequential):
    """From a backbone's features (N, d) to representations (N, D): hidden layers of width d, then a linear one.

    No layer has a bias, and nothing is normalised at the end.

    Args:
        in_features: d.
        out_features: D.
        layers: linear layers, >= 1.
    """

    def __init__(self, in_features: int, out_features: int = 2048, layers: int = 5) -> None:
        hidden = [hidden_layer(in_features, in_features) for _ in range(layers - 1)]
        super().__init__(*hidden, nn.Linear(in_features, out_features, bias=False))
