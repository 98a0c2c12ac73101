"""The Fréchet distance between two sets of features."""

from torch import Tensor, nn

from hfkd.errors import InputError


class _Given(nn.Module):
    """Features in, features out, for a metric that wants a network to make them with."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Between the normal distributions fitted to `features` (N, D) and `reference` (M, D): 0 for equal sets, or above.

    ||m_1 - m_2||^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) with means m and unbiased covariances S, in float64 (Heusel et
    al., NeurIPS 2017, whose FID has Inception's features). It shrinks as N and M grow: numbers compare only at equal N
    and M, and in the same judge's features.

    Raises:
        InputError: fewer than two rows, different widths, or features that are not finite.
    """
    if min(len(features), len(reference)) < 2 or features.shape[1:] != reference.shape[1:] or features.dim() != 2:
        raise InputError(
            f"features of shape {tuple(features.shape)} and {tuple(reference.shape)}: a Fréchet distance needs "
            "(N, D) and (M, D) with N and M at least 2"
        )
    if not (features.isfinite().all() and reference.isfinite().all()):
        raise InputError("features with NaN or infinite values have no Fréchet distance: the judge or images diverged")
    from torchmetrics.image.fid import FrechetInceptionDistance  # takes seconds to import

    metric = FrechetInceptionDistance(_Given(features.shape[1])).to(features.device)
    metric.update(reference.double(), real=True)
    metric.update(features.double(), real=False)
    return max(0.0, metric.compute().item())
