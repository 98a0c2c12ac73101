"""Random draws as pure functions of (seed, epoch, sample index, view).

Nothing here has state, and nothing reads or moves the global generators: what a sample looks like in an epoch cannot
depend on batch size, workers, ranks, or on where a run was interrupted. The draws are the splitmix64 finaliser
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) chained over the words of the
key, in wrap-around int64 arithmetic that is the same on CPU and CUDA.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor


# Views of a sample count from 0; these streams draw things that belong to no view.
ORDER_STREAM = -1
SPLIT_STREAM = -2
GENERATOR_STREAM = -3
LATENT_STREAM = -4
NOISE_STREAM = -5
MIXING_STREAM = -6
REAL_AUGMENTATION_STREAM = -7
FAKE_AUGMENTATION_STREAM = -8
CONTRAST_STREAM = -9
# Takes the place of the epoch, or of the update, in the key of what evaluation draws.
EVALUATION = -1

_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLIER_2 = 0x94D049BB133111EB - 2**64


def _xor_shift(x: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically: the mask makes it a logical shift.
    return x ^ ((x >> bits) & ((1 << (64 - bits)) - 1))


def _absorb(state: Tensor | int, word: Tensor) -> Tensor:
    x = (word * _GAMMA) ^ state
    x = _xor_shift(x, 30) * _MULTIPLIER_1
    x = _xor_shift(x, 27) * _MULTIPLIER_2
    return _xor_shift(x, 31)


@lru_cache(maxsize=256)
def _stream(seed: int, view: int) -> int:
    seed = (seed + 2**63) % 2**64 - 2**63
    state = _absorb(_MULTIPLIER_1, torch.tensor(seed))
    return int(_absorb(state, torch.tensor(view)))


def _keyed_state(seed: int, epoch: Tensor | int, index: Tensor, view: int) -> Tensor:
    if isinstance(epoch, int):
        epoch = torch.tensor(epoch, device=index.device)
    return _absorb(_absorb(_stream(seed, view), epoch), index)


def keyed_uniform(seed: int, epoch: Tensor | int, index: Tensor, view: int, count: int) -> Tensor:
    """`count` uniform draws for each sample.

    Args:
        seed: any integer (taken modulo 2**64).
        epoch: one epoch for all samples, or int64 (N,).
        index: sample indices, int64 (N,).
        view: which view of the sample, from 0. Negative numbers are the streams named in this module.
        count: draws per sample. Draw j does not depend on `count`: asking for more changes none of the first.

    Returns:
        float64 (N, count) in [0, 1), on the device of `index`, with 53 random bits each.
    """
    counter = torch.arange(count, device=index.device)
    bits = _absorb(_keyed_state(seed, epoch, index, view)[:, None], counter)
    return ((bits >> 11) & (2**53 - 1)).to(torch.float64) * 2.0**-53


def keyed_normal(seed: int, epoch: Tensor | int, index: Tensor, view: int, count: int) -> Tensor:
    """`count` draws from N(0, 1) for each sample, by the Box-Muller transform; otherwise as `keyed_uniform`.

    Returns:
        float64 (N, count). Draw j is made of the uniform draws 2j and 2j + 1.
    """
    radius, angle = keyed_uniform(seed, epoch, index, view, 2 * count).unflatten(1, (count, 2)).unbind(2)
    return torch.sqrt(-2 * torch.log1p(-radius)) * torch.cos(2 * math.pi * angle)


def keyed_permutation(seed: int, epoch: int, n: int) -> Tensor:
    """The order of `n` samples in an epoch: int64 (n,), on the CPU."""
    draws = keyed_uniform(seed, epoch, torch.arange(n), ORDER_STREAM, 1)[:, 0]
    return torch.argsort(draws, stable=True)


def keyed_generator(seed: int, epoch: int, index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for draws that are not uniform or have no fixed number (latents, noise)."""
    state = _keyed_state(seed, epoch, torch.tensor([index]), GENERATOR_STREAM)
    return torch.Generator(device=device).manual_seed(int(state))
