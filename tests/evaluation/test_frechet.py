import pytest
import torch
from scipy.linalg import sqrtm

from hfkd.errors import InputError
from hfkd.evaluation.frechet import frechet_distance


def normal(n, width, seed):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_shift_and_scale_of_independent_features():
    """(m_1 - m_2)^2 + (s_1 - s_2)^2 for each feature, as the covariance of these is the diagonal."""
    signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    variance = 4 / 3  # unbiased, of each column
    scaled = signs * torch.tensor([3.0, 0.5]) + torch.tensor([2.0, -1.0])
    wanted = 2**2 + 1**2 + variance * ((3 - 1) ** 2 + (0.5 - 1) ** 2)
    assert frechet_distance(scaled, signs) == pytest.approx(wanted)


def test_formula_with_a_matrix_root():
    mixing = normal(6, 6, 2)
    a, b = normal(50, 6, 0) @ mixing, normal(40, 6, 1) + 0.3
    root = torch.tensor(sqrtm((a.T.cov() @ b.T.cov()).numpy()).real)
    wanted = (a.mean(0) - b.mean(0)).square().sum() + (a.T.cov() + b.T.cov() - 2 * root).trace()
    assert frechet_distance(a, b) == pytest.approx(wanted.item())


def test_equal_sets_have_none_also_with_fewer_images_than_features():
    few = normal(5, 12, 0).float()
    assert 0 <= frechet_distance(few, few) < 1e-4


@pytest.mark.parametrize(("n", "m", "width"), [(1, 5, 3), (5, 1, 3), (5, 5, 4)])
def test_shapes_that_do_not_agree(n, m, width):
    with pytest.raises(InputError, match="needs \\(N, D\\) and \\(M, D\\)"):
        frechet_distance(torch.zeros(n, 3), torch.zeros(m, width))


def test_features_that_are_not_finite():
    with pytest.raises(InputError, match="NaN or infinite"):
        frechet_distance(torch.tensor([[1.0], [float("nan")]]), torch.zeros(2, 1))
