"""What stands where images would, for a method without data: keys, of which everything is drawn."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .keyed_random import keyed_normal
from .sampler import DrawsDataset, Key


class KeyedDraws(DrawsDataset):
    """Takes the place of an `ImageSource`: a batch is nothing but its keys, to be given to `keyed_normal`.

    Args:
        length: items; of a run, updates times batch size.
        epoch: what stands in every key for the epoch; `EVALUATION` keeps an evaluation's draws apart from training's.
        name: of the draws, as that of a split.
    """

    labels = None
    views = 0  # of an image, and there is none

    def __init__(self, length: int, epoch: int = 0, name: str = "train") -> None:
        super().__init__(length)
        self.epoch = epoch
        self.name = name

    def __getitems__(self, keys: Sequence[Key]) -> list[dict[str, Any]]:
        return [self[key] for key in keys]

    def materialise(
        self, batch: Mapping[str, Any], device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """`epoch` and `index`, int64 (N,) each, of what `collate` made; `dtype` would be that of pixels."""
        index = batch["key"].to(device=device)[:, 1]
        return {"epoch": torch.full_like(index, self.epoch), "index": index}


def travelling_normal(
    seed: int, epoch: Tensor | int, update: Tensor, place: Tensor, period: int, view: int, count: int
) -> Tensor:
    """Draws from N(0, 1) that travel: each place in a batch goes from one draw to the next within `period` updates.

    Between two independent draws a and b the way is cos(t) a + sin(t) b with t from 0 to a right angle, so that at
    every update all are N(0, 1) again. Places set out at different times. With `period` 1 every update has fresh ones.

    Args:
        seed, epoch, view: of the draws, as in `keyed_normal`.
        update: number of the update, int64 (N,).
        place: of each sample in its batch, int64 (N,), below 2**32.
        period: updates, >= 1.
        count: draws per sample.

    Returns:
        float64 (N, count): a function of the arguments, so a resumed run goes on with the same.
    """
    time = update + place % period
    way, angle = time // period, (time % period).double()[:, None] * (math.pi / (2 * period))
    start, end = (keyed_normal(seed, epoch, place + 2**32 * number, view, count) for number in (way, way + 1))
    return angle.cos() * start + angle.sin() * end
