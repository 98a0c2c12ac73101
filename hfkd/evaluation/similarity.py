"""How alike the feature maps of two networks are, and how well a discriminator tells them apart.

AFD reports that its students' maps are less alike than those of any direct alignment although they are more accurate
(Chung et al., ICML 2020, Table 7). The exact norms are not published; the definitions here are ours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hfkd.errors import InputError


class FeatureMapSimilarity:
    """Streaming L1 distance, L2 distance and cosine similarity between two networks' maps of the same samples.

    With maps a and b of one shape (N, ...), the first dimension being the sample:

    - `l1`: mean over all elements of `|a - b|`;
    - `l2`: mean over all elements of `(a - b)^2` (a mean square: no root is taken);
    - `cosine`: mean over samples of the cosine between the two flattened maps (0 where a map is all zeros).

    Sums are kept in float64, so the result does not depend on how the samples are cut into batches.
    """

    def __init__(self) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64)  # per-sample means of |a-b| and (a-b)^2, and cosines
        self.samples = 0  # so far

    def update(self, a: Tensor, b: Tensor) -> None:
        """Add one batch: `a` and `b` of one shape (N, ...). Raises `InputError` where the shapes differ."""
        if a.shape != b.shape or a.dim() < 2:
            raise InputError(
                f"Feature maps of shape {tuple(a.shape)} and {tuple(b.shape)}: similarity needs one shape (N, ...); "
                "compare students of one architecture, or their maps after the transfer layers."
            )
        # Stays on the maps' device: no synchronisation per batch.
        self._sums = self._sums.to(a.device) + map_distances(a, b).sum(dim=0)
        self.samples += len(a)

    def compute(self) -> dict[str, float]:
        """`l1`, `l2` and `cosine` over all samples so far. Raises `InputError` before the first batch."""
        if self.samples == 0:
            raise InputError("Feature-map similarity of no samples: call update(a, b) first.")
        l1, l2, cosine = (self._sums / self.samples).tolist()
        return {"l1": l1, "l2": l2, "cosine": cosine}


def map_distances(a: Tensor, b: Tensor) -> Tensor:
    """`l1`, `l2` and `cosine` (see `FeatureMapSimilarity`) of each of N samples, float64 (N, 3), without gradient."""
    a, b = a.detach().flatten(1).double(), b.detach().flatten(1).double()
    difference = a - b
    return torch.stack(
        [difference.abs().mean(1), difference.square().mean(1), F.cosine_similarity(a, b, dim=1)], dim=1
    )


def feature_map_similarity(a: Tensor, b: Tensor) -> dict[str, float]:
    """`FeatureMapSimilarity` of one batch of maps `a` and `b`, both (N, ...)."""
    similarity = FeatureMapSimilarity()
    similarity.update(a, b)
    return similarity.compute()


def discriminator_accuracy(real: Tensor, fake: Tensor, threshold: float = 0.5) -> dict[str, Tensor]:
    """Share of maps that a discriminator judges right: real above `threshold`, fake below it.

    `real` and `fake` are its outputs (any shape) on the two kinds of map; 0.5 is the midpoint of the least-squares
    targets 0 and 1. Keys `real_accuracy`, `fake_accuracy` and `accuracy` (over both together), as tensors without
    gradient so that no device is synchronised. 1.0 throughout is the sign of a saturated adversarial loss, 0.5 of
    maps that cannot be told apart.
    """
    real_right, fake_right = real.detach() > threshold, fake.detach() < threshold
    return {
        "real_accuracy": real_right.double().mean(),
        "fake_accuracy": fake_right.double().mean(),
        "accuracy": torch.cat([real_right.flatten(), fake_right.flatten()]).double().mean(),
    }
