"""What stands where images would, for a method without data: keys, of which everything is drawn."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

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
