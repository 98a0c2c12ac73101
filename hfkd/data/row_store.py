"""What networks give for each image of a source, computed once and kept on disk: a row for each image."""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Self

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hfkd.errors import InputError

from .sampler import KeyedSampler, collate
from .sources import ImageSource, ResidentImages, StreamedImages


KEY, UNFINISHED = "key.json", "unfinished-"
Encode = Callable[[Mapping[str, Any]], Tensor]
Pack = Callable[[Tensor], np.ndarray]


def as_numpy(outputs: Tensor) -> np.ndarray:
    """The same bytes: NumPy has no bfloat16."""
    return (outputs.view(torch.int16) if outputs.dtype == torch.bfloat16 else outputs).numpy()


class RowStore:
    """Rows in a folder, one for each image of a source, mapped into memory and not read into it.

    Args:
        folder: as `open` left it.

    Raises:
        InputError: the folder holds no whole store.
    """

    setting: ClassVar[str]  # the option that names the folder, for messages
    rows_file: ClassVar[str]

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        try:
            self._key = json.loads((self.folder / KEY).read_text(encoding="utf-8"))
            self._array = np.load(self.folder / self.rows_file, mmap_mode="r", allow_pickle=False)
            self._dtype = getattr(torch, self._key["dtype"])
            self._output = tuple(self._key["output"])
            complete = list(self._array.shape) == self._key["shape"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{self.setting}={folder} is damaged ({type(error).__name__}): delete the folder or name another"
            ) from error
        if not complete:
            raise InputError(
                f"{self.setting}={folder} is incomplete: {self.rows_file} has shape {self._array.shape} instead "
                f"of {tuple(self._key['shape'])}: delete the folder or name another"
            )

    @classmethod
    def open(
        cls,
        folder: Path | str,
        source: ImageSource,
        encode: Encode,
        identity: Mapping[str, str],
        *,
        pack: Pack = as_numpy,
        batch_size: int = 256,
        workers: int = 0,
    ) -> Self:
        """The store in `folder` for these images and these networks; filled first where there is none.

        Filling that was interrupted starts again. Of several processes that fill one folder, the first to finish is
        taken.

        Args:
            folder: for this store alone.
            source: without augmentation.
            encode: from what a loader of the source yields to outputs (N, ...).
            identity: what `encode` and `pack` depend on besides the images, by name.
            pack: from outputs (N, ...) on the CPU to the rows that are kept, one for each.
            batch_size: images that are encoded at a time.
            workers: processes that decode streamed images.

        Raises:
            InputError: a store of other images, preprocessing or networks, or a damaged one; a folder that cannot be
                written to, or has too little space.
        """
        folder = Path(folder)
        parts = {**identity, **_image_parts(source)}
        if not (folder / KEY).exists():
            loader: DataLoader = DataLoader(
                source,
                batch_size=batch_size,
                sampler=KeyedSampler(len(source), shuffle=False),
                collate_fn=collate,
                num_workers=workers,
                generator=torch.Generator(),  # a run draws the same with a store to fill and without
            )
            batches = tqdm(loader, desc=f"Filling {cls.setting}", unit="batch", delay=2, leave=False)
            try:
                _fill(folder, cls.rows_file, batches, encode, pack, len(source), parts)
            except OSError as error:
                if not (folder / KEY).exists():  # else another process was faster, and swept this one's file
                    raise InputError(
                        f"{cls.setting}={folder} cannot be written ({error.strerror or error}): "
                        "free space or name another"
                    ) from error
        store = cls(folder)
        store.check(parts)
        return store

    def __len__(self) -> int:
        return len(self._array)

    def check(self, parts: Mapping[str, str]) -> None:
        """Raise InputError naming what is not as it was when the store was filled."""
        changed = [name for name in parts if self._key["parts"].get(name) != _digest(parts[name])]
        if changed:
            raise InputError(
                f"{self.setting}={self.folder} was made with other {', '.join(changed)}: "
                "delete the folder or name another"
            )

    def rows(self, index: Tensor) -> np.ndarray:
        """The rows of the images `index` (N,), as they are kept."""
        return self._array[index.cpu().numpy()]


def check_unchanging(source: ImageSource, setting: str) -> None:
    """Raise InputError where images differ from epoch to epoch, so that nothing can be computed once for `setting`."""
    if source.augmentation or source.views != 1:
        raise InputError(f"{setting} needs images that are the same in every epoch: choose augmentation=none")


def _fill(
    folder: Path,
    rows_file: str,
    batches: Iterable[Mapping[str, Any]],
    encode: Encode,
    pack: Pack,
    number: int,
    parts: Mapping[str, str],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # Under a name of its own, as other processes may be filling the folder too.
    unfinished = folder / f"{UNFINISHED}{secrets.token_hex(8)}"
    try:
        # Not a mapped file: on a full disk, writing to its holes would kill the process.
        with open(unfinished, "wb") as file:
            key = _write_rows(file, batches, encode, pack, number)
        if not (folder / KEY).exists():
            os.replace(unfinished, folder / rows_file)
            key["parts"] = {name: _digest(text) for name, text in parts.items()}
            unfinished.write_text(json.dumps(key, indent=1) + "\n", encoding="utf-8")
            os.replace(unfinished, folder / KEY)  # last: it vouches for the rest
            for other in folder.glob(f"{UNFINISHED}*"):  # of processes that were killed, or slower
                other.unlink(missing_ok=True)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_rows(
    file: BinaryIO, batches: Iterable[Mapping[str, Any]], encode: Encode, pack: Pack, number: int
) -> dict[str, Any]:
    """Write the rows of all `number` images as a .npy file; their shape, that of an image's output, and its dtype."""
    key: dict[str, Any] = {}
    for inputs in batches:
        outputs = encode(inputs).cpu().contiguous()
        rows = pack(outputs)
        if not key:
            key = {
                "shape": [number, *rows.shape[1:]],
                "output": list(outputs.shape[1:]),
                "dtype": str(outputs.dtype).removeprefix("torch."),
            }
            descr = np.lib.format.dtype_to_descr(rows.dtype)
            header = {"descr": descr, "fortran_order": False, "shape": tuple(key["shape"])}
            np.lib.format.write_array_header_1_0(file, header)
        file.write(rows.data)
    file.flush()
    os.fsync(file.fileno())
    return key


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
