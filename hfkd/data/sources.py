"""Images as batches on the device: two sources with one interface, indexed by (epoch, index)."""

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from hfkd.errors import InputError

from .augmentation import Augmentation
from .columns import ImageColumns, read_labels
from .preprocessing import Preprocessing, decode_image, to_pixels
from .sampler import Key


RESIDENT_LIMIT_BYTES = 2 * 2**30
_DECODE_CHUNK = 512


def view_name(name: str, view: int) -> str:
    """What view number `view`, from 0, of `name` is called in an item or a batch: `image`, `image_2`, ..."""
    return f"{name}_{view + 1}" if view else name


class ImageSource(Dataset[dict[str, Any]], ABC):
    """A map-style dataset whose items are cheap and whose `materialise` makes the batch.

    A `DataLoader` with `KeyedSampler` and `collate` yields `{"key": int64 (N, 2), ...}`; the trainer passes that to
    `materialise`. Draws depend on the key, `seed` and the view only.

    Args:
        dataset: with the columns named in `columns`.
        columns: from `find_columns`.
        preprocessing: size, channels, normalisation.
        augmentation: what is done to the images; by default nothing (evaluation).
        views: differently augmented versions of each image.
        seed: of the augmentation's draws.
        name: of the split, for error messages.

    Raises:
        InputError: unreadable labels (at once) or images (`ResidentImages` at once, `StreamedImages` when used).
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        columns: ImageColumns,
        preprocessing: Preprocessing,
        *,
        augmentation: Augmentation | None = None,
        views: int = 1,
        seed: int = 0,
        name: str = "train",
    ) -> None:
        self.columns = columns
        self.preprocessing = preprocessing
        self.name = name
        self.labels = read_labels(dataset, columns, name)
        self.length = len(dataset)
        self._configure(augmentation or Augmentation(), views, seed)
        self._copies: dict[torch.device, dict[str, Tensor]] = {}

    def _configure(self, augmentation: Augmentation, views: int, seed: int) -> None:
        if views < 1:
            raise InputError(f"views {views} is too small: give at least 1")
        self.augmentation, self.views, self.seed = augmentation, views, seed

    def variant(
        self,
        *,
        augmentation: Augmentation | None = None,
        views: int | None = None,
        seed: int | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> "ImageSource":
        """The same images, shared and not copied, under other settings; `Augmentation()` switches it off."""
        other = copy.copy(self)
        other._configure(
            self.augmentation if augmentation is None else augmentation,
            self.views if views is None else views,
            self.seed if seed is None else seed,
        )
        if preprocessing is not None:
            before, after = ((p.image_size, p.num_channels) for p in (self.preprocessing, preprocessing))
            if before != after:
                raise ValueError(f"images were decoded to (size, channels) {before} and cannot become {after}")
            other.preprocessing = preprocessing
        return other

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: Key | int) -> dict[str, Any]:
        """The item of one key. A bare index, as stock samplers yield, will do where nothing is random."""
        if isinstance(key, tuple):
            return self._item(*key)
        if self.augmentation:
            raise TypeError("an augmented source is indexed by (epoch, index): use KeyedSampler")
        return self._item(0, key)

    def __getitems__(self, keys: Sequence[Key | int]) -> list[dict[str, Any]]:
        """What a `DataLoader` calls. An unreadable image becomes an item `error`, see `collate`."""
        try:
            return [self[key] for key in keys]
        except InputError as error:
            return [{"error": str(error)}]

    def __getstate__(self) -> dict[str, Any]:
        # A worker process started afresh has no use for what lies on the accelerator.
        return {**self.__dict__, "_copies": {}}

    def materialise(
        self, batch: Mapping[str, Any], device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Gathers, augments and normalises one batch on the device.

        Args:
            batch: what `collate` made, on any device; `{"key": int64 (N, 2)}` is enough for resident images.
            device: where to; by default where `batch["key"]` is.
            dtype: of the pixels.

        Returns:
            `pixel_values` (N, C, H, W), of further views `pixel_values_2`, ...; `index` int64 (N,); unless unlabelled
            `labels`: int64 (N,), or multi-hot float (N, L) for several labels (float64 for float64 pixels).

        Raises:
            InputError: an image of the batch could not be read.
        """
        if "error" in batch:
            raise InputError(batch["error"])
        keys = batch["key"]
        device = keys.device if device is None else torch.device(device)
        epoch, index = keys.to(device, non_blocking=True).unbind(1)
        result: dict[str, Tensor] = {}
        for view in range(self.views):
            result[view_name("pixel_values", view)] = self._view(batch, epoch, index, view, dtype)
        result["index"] = index
        if self.labels is not None:
            labels = self._on_device(device, "labels", self.labels).index_select(0, index)
            if self.columns.multi_label:
                labels = labels.to(torch.float64 if dtype == torch.float64 else torch.float32)
            result["labels"] = labels
        return result

    def _view(self, batch: Mapping[str, Any], epoch: Tensor, index: Tensor, view: int, dtype: torch.dtype) -> Tensor:
        pixels = self.augmentation(self._pixels(batch, index, view), self.seed, epoch, index, view)
        return self.preprocessing.normalize(pixels, dtype)

    def _on_device(self, device: torch.device, name: str, tensor: Tensor) -> Tensor:
        held = self._copies.setdefault(device, {})
        if name not in held:
            held[name] = tensor.to(device)
        return held[name]

    @abstractmethod
    def _item(self, epoch: int, index: int) -> dict[str, Any]: ...

    @abstractmethod
    def _pixels(self, batch: Mapping[str, Any], index: Tensor, view: int) -> Tensor:
        """uint8 (N, C, H, W) on the device of `index`."""


class ResidentImages(ImageSource):
    """Decoded once into one uint8 tensor, `images` (N, C, H, W); batches are gathered on the device."""

    def __init__(
        self, dataset: datasets.Dataset, columns: ImageColumns, preprocessing: Preprocessing, **settings: Any
    ) -> None:
        super().__init__(dataset, columns, preprocessing, **settings)
        self.images = _decode_all(dataset, columns.image_column, preprocessing, self.name)

    def _configure(self, augmentation: Augmentation, views: int, seed: int) -> None:
        super()._configure(augmentation, views, seed)
        if augmentation.resized_crop is not None:
            raise InputError("augmentation 'resized_crop' cuts images before resizing: use StreamedImages")

    def _item(self, epoch: int, index: int) -> dict[str, Any]:
        return {"key": (epoch, index)}

    def _pixels(self, batch: Mapping[str, Any], index: Tensor, view: int) -> Tensor:
        return self._on_device(index.device, "images", self.images).index_select(0, index)


class StreamedImages(ImageSource):
    """Decoded, cut and resized in the worker processes, at each use; sent as uint8, finished on the device."""

    def __init__(
        self, dataset: datasets.Dataset, columns: ImageColumns, preprocessing: Preprocessing, **settings: Any
    ) -> None:
        super().__init__(dataset, columns, preprocessing, **settings)
        self.records = _undecoded(dataset, columns.image_column)

    def _item(self, epoch: int, index: int) -> dict[str, Any]:
        record = self.records[index][self.columns.image_column]
        image = decode_image(record, self.preprocessing.num_channels, f"row {index} of the {self.name} images")
        item: dict[str, Any] = {"key": (epoch, index)}
        if self.augmentation.resized_crop is None:
            item["image"] = to_pixels(self.preprocessing.fit(image))
            return item
        side = self.preprocessing.image_size
        for view in range(self.views):
            box = self.augmentation.box(*image.size, self.seed, epoch, index, view)
            part = image.resize((side, side), self.preprocessing.resample, box)
            item[view_name("image", view)] = to_pixels(part)
        return item

    def _pixels(self, batch: Mapping[str, Any], index: Tensor, view: int) -> Tensor:
        image = batch.get(view_name("image", view), batch["image"])  # one image serves all views that are not cut
        return image.to(index.device, non_blocking=True)


def _undecoded(dataset: datasets.Dataset, image_column: str) -> datasets.Dataset:
    return dataset.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))


def first_record(dataset: datasets.Dataset, columns: ImageColumns) -> Mapping[str, Any] | None:
    """The first image as it is stored, for `decode_image`."""
    return _undecoded(dataset.select(range(1)), columns.image_column)[0][columns.image_column]


def _decode_all(dataset: datasets.Dataset, image_column: str, preprocessing: Preprocessing, name: str) -> Tensor:
    records = _undecoded(dataset, image_column)
    side, channels = preprocessing.image_size, preprocessing.num_channels
    images = torch.empty(len(dataset), channels, side, side, dtype=torch.uint8)

    def decode(row: int, record: Mapping[str, Any] | None) -> None:
        image = decode_image(record, channels, f"row {row} of the {name} images")
        images[row] = to_pixels(preprocessing.fit(image))

    # Pillow lets go of the interpreter lock while it decodes and resizes.
    workers = min(8, os.cpu_count() or 1)
    bar = tqdm(total=len(dataset), desc=f"Decoding {name} images", unit="image", delay=2, leave=False)
    with ThreadPoolExecutor(workers) as pool, bar:
        for start in range(0, len(dataset), _DECODE_CHUNK):
            chunk = records[start : start + _DECODE_CHUNK][image_column]
            for _ in pool.map(decode, range(start, start + len(chunk)), chunk):
                bar.update()
    return images


def make_source(
    dataset: datasets.Dataset,
    columns: ImageColumns,
    preprocessing: Preprocessing,
    *,
    resident_limit: int = RESIDENT_LIMIT_BYTES,
    augmentation: Augmentation | None = None,
    **settings: Any,
) -> ImageSource:
    """`ResidentImages` where all decoded images take at most `resident_limit` bytes, else `StreamedImages`.

    Random resized crops need whole images, and so are always streamed. Other arguments: see `ImageSource`.
    """
    size = len(dataset) * preprocessing.num_channels * preprocessing.image_size**2
    needs_whole = augmentation is not None and augmentation.resized_crop is not None
    kind = StreamedImages if needs_whole or size > resident_limit else ResidentImages
    return kind(dataset, columns, preprocessing, augmentation=augmentation, **settings)
