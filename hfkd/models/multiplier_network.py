"""Training-only multipliers of GBC: how much each generated image weighs in the classifier's stationarity condition.

That generated images need multipliers follows from the idea of Yu and Wang (NeurIPS 2023, arXiv 2312.02470); that
they are a function of the image's latent and class, and this function, are inferred. Both kinds are positive by
construction, which is the dual feasibility of the Karush-Kuhn-Tucker conditions. Neither is part of a generator.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiplierNetwork(nn.Module):
    """mu_i = softplus(h([eps_i, onehot(y_i)])) exp(s), h a perceptron of one hidden layer, s a learned log scale.

    Args:
        latent_size: L, of eps.
        num_conditions: K, classes of the classifier.
        hidden_size: of h.
    """

    def __init__(self, latent_size: int, num_conditions: int, hidden_size: int = 64) -> None:
        super().__init__()
        self.num_conditions = num_conditions
        self.layers = nn.Sequential(
            nn.Linear(latent_size + num_conditions, hidden_size), nn.ReLU(), nn.Linear(hidden_size, 1)
        )
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, latents: Tensor, conditions: Tensor) -> Tensor:
        """Multipliers (N,) > 0 of latents (N, L) and numbers (N,) in [0, K), int64, of their conditions."""
        one_hot = F.one_hot(conditions, self.num_conditions).to(latents.dtype)
        hidden = self.layers(torch.cat([latents, one_hot], dim=1)).squeeze(1)
        return F.softplus(hidden) * self.log_scale.exp()


class ConstantMultiplier(nn.Module):
    """mu_i = exp(s), the same for all images, s learned."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, latents: Tensor, conditions: Tensor) -> Tensor:
        """(N,) > 0 for arguments as of `MultiplierNetwork`, of which only N matters."""
        return self.log_scale.exp().expand(len(latents))


def learned_multipliers(kind: str, latent_size: int, class_counts: Sequence[int]) -> nn.ModuleList:
    """One for each classifier, which each have a scale of their own: `network`, `constant`, or, of `ce`, none."""
    if kind == "network":
        return nn.ModuleList(MultiplierNetwork(latent_size, count) for count in class_counts)
    return nn.ModuleList(ConstantMultiplier() for _ in class_counts if kind == "constant")
