"""Activations of all images of a source, computed once and kept on disk (Mu et al., ICLR 2020, section 3.3)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .row_store import Encode, RowStore, check_unchanging
from .sources import ImageSource


class ActivationCache(RowStore):
    """Activations in a folder, mapped into memory and not read into it.

    Args:
        folder: as `open_activation_cache` left it.

    Raises:
        InputError: the folder holds no whole cache.
    """

    setting = "activation_cache_dir"
    rows_file = "activations.npy"

    def gather(self, index: Tensor, device: torch.device | str | None = None) -> Tensor:
        """Activations (N, ...) of the images `index` (N,), in the precision they were computed in.

        `device`: where to; by default where `index` is.
        """
        activations = torch.from_numpy(self.rows(index)).view(self._dtype)
        return activations.to(index.device if device is None else device, non_blocking=True)


class CachedImages(ImageSource):
    """A source whose batches have activations as `pixel_values`; images are not even decoded.

    Variants of it (for evaluation, say) have the images.

    Args:
        source: without augmentation.

    Attributes:
        cache: of the source's activations; to be set before the first batch.

    Raises:
        InputError: an augmented source.
    """

    def __init__(self, source: ImageSource) -> None:
        check_unchanging(source, ActivationCache.setting)
        self.__dict__.update(source.__dict__)
        self.source = source
        self.cache: ActivationCache | None = None

    def variant(self, **settings: Any) -> ImageSource:
        return self.source.variant(**settings)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "cache": None}  # worker processes read keys only

    def _item(self, epoch: int, index: int) -> dict[str, Any]:
        return {"key": (epoch, index)}

    def _view(self, batch: Mapping[str, Any], epoch: Tensor, index: Tensor, view: int, dtype: torch.dtype) -> Tensor:
        if self.cache is None:
            raise RuntimeError("no cache has been set")
        return self.cache.gather(index)

    def _pixels(self, batch: Mapping[str, Any], index: Tensor, view: int) -> Tensor:
        return self.source._pixels(batch, index, view)


def open_activation_cache(
    folder: Path | str,
    source: ImageSource,
    encode: Encode,
    identity: Mapping[str, str],
    *,
    batch_size: int = 256,
    workers: int = 0,
) -> ActivationCache:
    """The cache in `folder` for these images and this network; filled first where there is none.

    Args:
        folder, source, batch_size, workers: as in `RowStore.open`.
        encode: from what a loader of the source yields to activations (N, ...): `materialise`, then
            `ActivationCut.below`.
        identity: what `encode` depends on besides the images, by name, as `ActivationCut.identity()`.

    Raises:
        InputError: as `RowStore.open`.
    """
    return ActivationCache.open(folder, source, encode, identity, batch_size=batch_size, workers=workers)
