"""The gate of ONE, which weighs a network's branches for each image; training-only."""

from torch import Tensor, nn


class BranchGate(nn.Module):
    """Linear, batch norm, ReLU, softmax (Lan et al., NeurIPS 2018, arXiv 1806.04606; layers of the released code).

    Args:
        channels: C of the feature that the gate reads.
        branches: S.
    """

    def __init__(self, channels: int, branches: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(channels, branches), nn.BatchNorm1d(branches), nn.ReLU())

    def forward(self, pooled: Tensor) -> Tensor:
        """Gates (N, S), of sum 1 for each image, from features (N, C)."""
        return self.layers(pooled).softmax(dim=-1)
