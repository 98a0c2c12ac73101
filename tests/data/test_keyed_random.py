import numpy as np
import pytest
import torch

from hfkd.data import keyed_generator, keyed_normal, keyed_permutation, keyed_uniform
from hfkd.data.keyed_random import _MULTIPLIER_1, LATENT_STREAM, NOISE_STREAM, _absorb


INDEX = torch.arange(20_000)
PINNED_DRAWS = [0.33764631690197444, 0.84352248515236]
PINNED_ORDER = [5, 6, 2, 0, 4, 3, 7, 1]


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_mixing_is_splitmix64_in_exact_integers() -> None:
    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    words = torch.tensor([0, 1, 12345, -1, 2**62, -(2**63)])
    expected = [mix((word * 0x9E3779B97F4A7C15 % 2**64) ^ (_MULTIPLIER_1 % 2**64)) for word in words.tolist()]
    assert [value % 2**64 for value in _absorb(_MULTIPLIER_1, words).tolist()] == expected


def test_range_dtype_and_moments() -> None:
    draws = keyed_uniform(7, 3, INDEX, 0, 4)
    assert draws.shape == (20_000, 4)
    assert draws.dtype == torch.float64
    assert 0 <= float(draws.min()) < float(draws.max()) < 1
    # Standard errors for 80,000 draws: 0.001 for the mean, 0.00026 for the variance.
    assert float(draws.mean()) == pytest.approx(0.5, abs=0.005)
    assert float(draws.var()) == pytest.approx(1 / 12, abs=0.0015)


@pytest.mark.parametrize("column", range(3))
def test_chi_square_of_each_column_and_of_pairs(column: int) -> None:
    draws = keyed_uniform(0, 0, INDEX, 0, 4).numpy()
    counts = np.histogram(draws[:, column], 100, (0, 1))[0]
    assert 50 < ((counts - 200) ** 2 / 200).sum() < 160  # 99 degrees of freedom: 99 +- 14
    pairs = np.histogram2d(draws[:, column], draws[:, column + 1], 10, ((0, 1), (0, 1)))[0]
    assert 50 < ((pairs - 200) ** 2 / 200).sum() < 160


@pytest.mark.parametrize("bit", range(0, 53, 4))
def test_neighbouring_keys_share_no_bits(bit: int) -> None:
    draws = keyed_uniform(0, 0, INDEX, 0, 1)[:, 0]
    values = (draws * 2**53).long() >> bit & 1
    agreement = (values[1:] == values[:-1]).double().mean()
    assert float(agreement) == pytest.approx(0.5, abs=0.02)


def test_independent_across_every_part_of_the_key() -> None:
    base = keyed_uniform(1, 1, INDEX, 1, 2)
    others = {
        "seed": keyed_uniform(2, 1, INDEX, 1, 2),
        "epoch": keyed_uniform(1, 2, INDEX, 1, 2),
        "index": keyed_uniform(1, 1, INDEX + 1, 1, 2),
        "view": keyed_uniform(1, 1, INDEX, 0, 2),
        "epoch and index exchanged": keyed_uniform(1, INDEX, torch.ones_like(INDEX), 1, 2),
    }
    for name, other in others.items():
        assert abs(correlation(base[:-1], other[1:] if name == "index" else other[:-1])) < 0.03, name
        assert not torch.equal(base, other), name
    assert abs(correlation(base[:, 0], base[:, 1])) < 0.03


def test_pure_function_of_each_row() -> None:
    whole = keyed_uniform(5, 2, INDEX[:50], 1, 6)
    assert torch.equal(keyed_uniform(5, 2, INDEX[:50], 1, 3), whole[:, :3])
    assert torch.equal(keyed_uniform(5, 2, torch.tensor([17]), 1, 6)[0], whole[17])
    epochs = torch.arange(50) % 3
    mixed = keyed_uniform(5, epochs, INDEX[:50], 1, 6)
    assert torch.equal(mixed[epochs == 2], whole[epochs == 2])


def test_any_python_integer_is_a_seed() -> None:
    draws = [keyed_uniform(seed, 0, INDEX[:3], 0, 1).tolist() for seed in (-1, 2**63, 2**70 + 1, 0)]
    assert len({str(draw) for draw in draws}) == 4
    assert keyed_uniform(-1, 0, INDEX[:3], 0, 1).tolist() == keyed_uniform(2**64 - 1, 0, INDEX[:3], 0, 1).tolist()


def test_values_never_change() -> None:
    # A new version of the package must not reshuffle published runs.
    assert keyed_uniform(0, 1, torch.tensor([2]), 0, 2)[0].tolist() == PINNED_DRAWS
    assert keyed_permutation(0, 1, 8).tolist() == PINNED_ORDER


def test_permutation() -> None:
    order = keyed_permutation(3, 0, 1000)
    assert torch.equal(order.sort().values, torch.arange(1000))
    assert torch.equal(order, keyed_permutation(3, 0, 1000))
    for other in (keyed_permutation(3, 1, 1000), keyed_permutation(4, 0, 1000)):
        assert int((order == other).sum()) < 10
    assert keyed_permutation(3, 0, 0).tolist() == []


def test_permutation_is_uniform() -> None:
    orders = torch.stack([keyed_permutation(0, epoch, 3) for epoch in range(3000)])
    counts = np.unique(orders @ torch.tensor([100, 10, 1]), return_counts=True)[1]
    assert len(counts) == 6
    assert ((counts - 500) ** 2 / 500).sum() < 25  # 5 degrees of freedom


def test_generator_depends_on_the_key_alone() -> None:
    draws = [torch.randn(4, generator=keyed_generator(1, 2, index)) for index in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu() -> None:
    assert torch.equal(keyed_uniform(7, 3, INDEX, 1, 4), keyed_uniform(7, 3, INDEX.cuda(), 1, 4).cpu())


def test_normal_draws_have_the_moments_of_the_normal_and_depend_on_their_key_alone() -> None:
    draws = keyed_normal(7, 3, INDEX, LATENT_STREAM, 4)
    assert draws.shape == (20_000, 4) and draws.dtype == torch.float64
    # Standard errors for 80,000 draws: 0.0035 for the mean, 0.005 for the variance, 0.017 for the fourth moment.
    assert float(draws.mean()) == pytest.approx(0, abs=0.015)
    assert float(draws.var()) == pytest.approx(1, abs=0.02)
    assert float(draws.pow(4).mean()) == pytest.approx(3, abs=0.15)
    assert float((draws < -1).double().mean()) == pytest.approx(0.158655, abs=0.006)
    assert abs(correlation(draws[:, 0], draws[:, 1])) < 0.03
    some = torch.tensor([19, 3, 11])
    assert torch.equal(keyed_normal(7, 3, some, LATENT_STREAM, 2), draws[some, :2])
    assert not torch.equal(keyed_normal(7, 3, some, NOISE_STREAM, 2), draws[some, :2])
    assert torch.isfinite(draws).all()
