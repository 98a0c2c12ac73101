"""Order of the samples: a sampler whose items carry the epoch, and what belongs to it in a `DataLoader`."""

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .keyed_random import keyed_permutation


Key = tuple[int, int]


class KeyedSampler(Sampler[Key]):
    """Yields (epoch, index): the whole key of a sample's draws, so that no worker, wrapper or source holds state.

    Args:
        length: number of samples.
        seed: of the order.
        shuffle: `False` yields the indices in ascending order, still with the epoch.
    """

    def __init__(self, length: int, seed: int = 0, shuffle: bool = True) -> None:
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Key]:
        order = keyed_permutation(self.seed, self.epoch, self.length).tolist() if self.shuffle else range(self.length)
        return zip(repeat(self.epoch), order, strict=False)


def set_sampler_epoch(dataloader: DataLoader, epoch: int) -> None:
    """Set the epoch of the sampler under a loader, through every wrapper that accelerate puts around it.

    `DataLoaderShard.set_epoch` (accelerate 1.15) does not look below `SkipBatchSampler(BatchSamplerShard(...))`, which
    is what `skip_first_batches` makes of a loader of several processes: a run resumed in the middle of an epoch would
    go on in the order of epoch 0. Skipping wraps the same sampler, so it is enough to call this on the loader before
    it is skipped or iterated.
    """
    batch_sampler: Any = dataloader.batch_sampler
    while hasattr(batch_sampler, "batch_sampler"):
        batch_sampler = batch_sampler.batch_sampler
    batch_sampler.sampler.set_epoch(epoch)


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Joins what a source yields: `key` int64 (N, 2) of (epoch, index), and the tensors of streamed images, stacked.

    Samples that are nothing but a key come first, and the images are those of the others.

    A sample that could not be read makes the batch `{"error": message}`, which `materialise` raises: an exception
    thrown in a worker process would reach the user as a page of traceback.
    """
    for sample in samples:
        if "error" in sample:
            return {"error": sample["error"]}
    batch: dict[str, Any] = {"key": torch.tensor([sample["key"] for sample in samples])}
    for name in samples[-1].keys() - {"key"}:
        batch[name] = torch.stack([sample[name] for sample in samples if name in sample])
    return batch


class DrawsDataset(Dataset[dict[str, Any]]):
    """For methods without data: `length` items that are nothing but their keys, to be given to `keyed_uniform`."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: Key) -> dict[str, Any]:
        return {"key": key}
