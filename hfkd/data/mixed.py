"""Batches of which a share is synthetic: keys to draw a generator's inputs from, beside the images of a source."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .draws import KeyedDraws
from .sampler import Key
from .sources import ImageSource


def synthetic_count(batch_size: int, share: float) -> int:
    """How many of a batch are synthetic: int(B alpha); the remainder is real."""
    return int(batch_size * share)


def synthetic_positions(batch_size: int, share: float) -> list[bool]:
    """Which places of a batch are synthetic: `synthetic_count` of them, as evenly spread as can be.

    Where B alpha is whole, the places in a joined batch are those in the parts of its ranks: several ranks draw what
    one process with the joined batch would.
    """
    counts = [synthetic_count(place, share) for place in range(batch_size + 1)]
    return [after > before for before, after in zip(counts, counts[1:], strict=False)]


class SyntheticDraws(KeyedDraws):
    """Nothing but synthetic samples: `synthetic_epoch` and `synthetic_index`, int64 (N,) each."""

    def materialise(
        self, batch: Mapping[str, Any], device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        return _synthetic(batch["key"].to(device=device))


class MixedImages(ImageSource):
    """A source whose batches are images in part; the other keys stand for synthetic samples, and read no image.

    `materialise` gives what that of the source gives for the images, and as `SyntheticDraws` does for the others.
    Variants of it (for evaluation, say) are of the source alone.

    Args:
        source: of the images.
        share: of the synthetic samples in a batch, in [0, 1).
    """

    def __init__(self, source: ImageSource, share: float) -> None:
        self.__dict__.update(source.__dict__)
        self.source = source
        self.share = share

    def variant(self, **settings: Any) -> ImageSource:
        return self.source.variant(**settings)

    def __getitems__(self, keys: Sequence[Key | int]) -> list[dict[str, Any]]:
        """The synthetic samples first, as nothing but their keys."""
        chosen = list(zip(keys, synthetic_positions(len(keys), self.share), strict=True))
        items = self.source.__getitems__([key for key, synthetic in chosen if not synthetic])
        if "error" in items[0]:
            return items
        return [*({"key": key} for key, synthetic in chosen if synthetic), *items]

    def materialise(
        self, batch: Mapping[str, Any], device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        if "error" in batch:
            return self.source.materialise(batch)
        count = synthetic_count(len(batch["key"]), self.share)
        images = {**batch, "key": batch["key"][count:]}
        return self.source.materialise(images, device, dtype) | _synthetic(batch["key"][:count].to(device=device))

    def _item(self, epoch: int, index: int) -> dict[str, Any]:
        return self.source._item(epoch, index)

    def _pixels(self, batch: Mapping[str, Any], index: Tensor, view: int) -> Tensor:
        return self.source._pixels(batch, index, view)


def _synthetic(keys: Tensor) -> dict[str, Tensor]:
    epoch, index = keys.unbind(1)
    return {"synthetic_epoch": epoch, "synthetic_index": index}
