"""Training-only networks of SimSiam (Chen and He, CVPR 2021, arXiv 2011.10566).

Sizes are those of Squeeze-and-Span's public code (Yang et al., NeurIPS 2022, arXiv 2211.03000), which compares with
it.
"""

from torch import nn

from .squeeze_module import hidden_layer


class SimSiamProjector(nn.Sequential):
    """From features (N, d) to representations (N, D): hidden layers of width d, a linear one, and batch norm.

    The norm has no weight and bias, and no linear layer has a bias.

    Args:
        in_features: d.
        out_features: D.
        layers: linear layers, >= 1 (code: 2 for CIFAR, 3 for STL-10).
    """

    def __init__(self, in_features: int, out_features: int = 2048, layers: int = 2) -> None:
        hidden = [hidden_layer(in_features, in_features) for _ in range(layers - 1)]
        last = nn.Linear(in_features, out_features, bias=False)
        super().__init__(*hidden, last, nn.BatchNorm1d(out_features, affine=False))


class SimSiamPredictor(nn.Sequential):
    """h, from representations (N, D) to predictions (N, D), through a bottleneck.

    Args:
        size: D.
        hidden_size: of the bottleneck (paper and code: 512).
    """

    def __init__(self, size: int = 2048, hidden_size: int = 512) -> None:
        super().__init__(hidden_layer(size, hidden_size), nn.Linear(hidden_size, size))
