"""Activations of all images of a source, computed once and kept on disk (Mu et al., ICLR 2020, section 3.3)."""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hfkd.errors import InputError

from .sampler import KeyedSampler, collate
from .sources import ImageSource, ResidentImages, StreamedImages


ACTIVATIONS, KEY, UNFINISHED = "activations.npy", "key.json", "unfinished-"


class ActivationCache:
    """Activations in a folder, mapped into memory and not read into it.

    Args:
        folder: as `open_activation_cache` left it.

    Raises:
        InputError: the folder holds no whole cache.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        try:
            self._key = json.loads((self.folder / KEY).read_text(encoding="utf-8"))
            self._array = np.load(self.folder / ACTIVATIONS, mmap_mode="r", allow_pickle=False)
            self._dtype = getattr(torch, self._key["dtype"])
            complete = list(self._array.shape) == self._key["shape"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"activation_cache_dir={folder} is damaged ({type(error).__name__}): delete the folder or name another"
            ) from error
        if not complete:
            raise InputError(
                f"activation_cache_dir={folder} is incomplete: {ACTIVATIONS} has shape {self._array.shape} instead "
                f"of {tuple(self._key['shape'])}: delete the folder or name another"
            )

    def __len__(self) -> int:
        return len(self._array)

    def gather(self, index: Tensor, device: torch.device | str | None = None) -> Tensor:
        """Activations (N, ...) of the images `index` (N,), in the precision they were computed in.

        `device`: where to; by default where `index` is.
        """
        rows = torch.from_numpy(self._array[index.cpu().numpy()]).view(self._dtype)
        return rows.to(index.device if device is None else device, non_blocking=True)

    def check(self, parts: Mapping[str, str]) -> None:
        """Raise InputError naming what is not as it was when the cache was filled."""
        changed = [name for name in parts if self._key["parts"].get(name) != _digest(parts[name])]
        if changed:
            raise InputError(
                f"activation_cache_dir={self.folder} was made with other {', '.join(changed)}: "
                "delete the folder or name another"
            )


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
        if source.augmentation or source.views != 1:
            raise InputError(
                "activation_cache_dir needs images that are the same in every epoch: choose augmentation=none"
            )
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
    encode: Callable[[Mapping[str, Any]], Tensor],
    identity: Mapping[str, str],
    *,
    batch_size: int = 256,
    workers: int = 0,
) -> ActivationCache:
    """The cache in `folder` for these images and this network; filled first where there is none.

    Filling that was interrupted starts again. Of several processes that fill one folder, the first to finish is taken.

    Args:
        folder: for this cache alone.
        source: without augmentation.
        encode: from what a loader of the source yields to activations (N, ...): `materialise`, then
            `ActivationCut.below`.
        identity: what `encode` depends on besides the images, by name, as `ActivationCut.identity()`.
        batch_size: images that are encoded at a time.
        workers: processes that decode streamed images.

    Raises:
        InputError: a cache of other images, preprocessing or network, or a damaged one; a folder that cannot be
            written to, or has too little space.
    """
    folder = Path(folder)
    parts = {**identity, **_image_parts(source)}
    if not (folder / KEY).exists():
        try:
            _fill(folder, source, encode, parts, batch_size, workers)
        except OSError as error:
            if not (folder / KEY).exists():  # else another process was faster, and swept this one's file
                raise InputError(
                    f"activation_cache_dir={folder} cannot be written ({error.strerror or error}): "
                    "free space or name another"
                ) from error
    cache = ActivationCache(folder)
    cache.check(parts)
    return cache


def _fill(
    folder: Path,
    source: ImageSource,
    encode: Callable[[Mapping[str, Any]], Tensor],
    parts: Mapping[str, str],
    batch_size: int,
    workers: int,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    loader: DataLoader = DataLoader(
        source,
        batch_size=batch_size,
        sampler=KeyedSampler(len(source), shuffle=False),
        collate_fn=collate,
        num_workers=workers,
    )
    # Under a name of its own, as other processes may be filling the folder too.
    unfinished = folder / f"{UNFINISHED}{secrets.token_hex(8)}"
    try:
        # Not a mapped file: on a full disk, writing to its holes would kill the process.
        with open(unfinished, "wb") as file:
            key = _write_rows(file, loader, encode, len(source))
        if not (folder / KEY).exists():
            os.replace(unfinished, folder / ACTIVATIONS)
            key["parts"] = {name: _digest(text) for name, text in parts.items()}
            unfinished.write_text(json.dumps(key, indent=1) + "\n", encoding="utf-8")
            os.replace(unfinished, folder / KEY)  # last: it vouches for the rest
            for other in folder.glob(f"{UNFINISHED}*"):  # of processes that were killed, or slower
                other.unlink(missing_ok=True)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_rows(
    file: BinaryIO, batches: Iterable[Mapping[str, Any]], encode: Callable[[Mapping[str, Any]], Tensor], number: int
) -> dict[str, Any]:
    """Write the activations of all `number` images as a .npy file; its shape and the activations' dtype."""
    key: dict[str, Any] = {}
    for inputs in tqdm(batches, desc="Activations below theta2", unit="batch", delay=2, leave=False):
        activations = encode(inputs).cpu().contiguous()
        rows = _as_numpy(activations)
        if not key:
            key = {
                "shape": [number, *rows.shape[1:]],
                "dtype": str(activations.dtype).removeprefix("torch."),
            }
            descr = np.lib.format.dtype_to_descr(rows.dtype)
            header = {"descr": descr, "fortran_order": False, "shape": tuple(key["shape"])}
            np.lib.format.write_array_header_1_0(file, header)
        file.write(rows.data)
    file.flush()
    os.fsync(file.fileno())
    return key


def _as_numpy(activations: Tensor) -> np.ndarray:
    """The same bytes: NumPy has no bfloat16."""
    return (activations.view(torch.int16) if activations.dtype == torch.bfloat16 else activations).numpy()


def _image_parts(source: ImageSource) -> dict[str, str]:
    if isinstance(source, ResidentImages):
        images = hashlib.sha256(source.images.contiguous().numpy().data).hexdigest()
    else:
        assert isinstance(source, StreamedImages)
        images = source.records._fingerprint + _file_states(source.records, source.columns.image_column)
    shape = f"{len(source)} of {source.columns.image_column}"
    return {"images": f"{images} {shape}", "preprocessing": json.dumps(asdict(source.preprocessing), sort_keys=True)}


def _file_states(records: datasets.Dataset, column: str) -> str:
    """A digest of size and time of change of the files that records name, "" where all records hold their images.

    A fingerprint tells such records by their paths alone.
    """
    flat = records.flatten()
    if not flat.data.column(f"{column}.bytes").null_count:
        return ""
    states: list[tuple[int, int] | None] = []
    for path in flat.select_columns([f"{column}.path"])[f"{column}.path"]:
        try:
            state = os.stat(path)
        except (OSError, TypeError):  # no file of this machine, or no path
            states.append(None)
        else:
            states.append((state.st_size, state.st_mtime_ns))
    return _digest(json.dumps(states))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
