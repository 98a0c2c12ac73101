"""Rows of splits as arrays of numbers: slicing, overlap and stratified hold-out before any image is touched."""

from collections.abc import Mapping, Sequence

import datasets
import numpy as np
import torch
from datasets import ReadInstruction

from hfkd.errors import InputError

from .keyed_random import SPLIT_STREAM, keyed_uniform


# A row is the number of its stored split times this, plus its place there.
_SPLIT_STRIDE = 2**40

Rows = np.ndarray


def select_rows(option: str, spec: str, stored: Mapping[str, datasets.Dataset]) -> Rows:
    """Rows of a split in Hugging Face slicing syntax, such as `train[:80%]` or `test+train[45000:]`.

    Args:
        option: name of the option for error messages.
        spec: the split.
        stored: the stored splits by name.

    Raises:
        InputError: unknown split, slice out of range or malformed, no rows.
    """
    lengths = {name: len(dataset) for name, dataset in stored.items()}
    try:
        parts = ReadInstruction.from_spec(spec).to_absolute(lengths)
    except ValueError as error:
        cause = " ".join(str(error).split())
        raise InputError(f"{option} {spec!r}: {cause} (the dataset has {_describe(lengths)})") from error
    numbers = {name: number for number, name in enumerate(lengths)}
    rows = np.concatenate([numbers[part.splitname] * _SPLIT_STRIDE + np.arange(part.from_, part.to) for part in parts])
    if rows.size == 0:
        raise InputError(f"{option} {spec!r} is empty: the dataset has {_describe(lengths)}")
    return rows


def _describe(lengths: Mapping[str, int]) -> str:
    return ", ".join(f"{name!r} with {length:,} rows" for name, length in lengths.items())


def take_rows(rows: Rows, stored: Mapping[str, datasets.Dataset]) -> datasets.Dataset:
    """The rows as one dataset, in order."""
    names = list(stored)
    runs = np.split(rows, np.flatnonzero(np.diff(rows // _SPLIT_STRIDE)) + 1)
    parts = [stored[names[run[0] // _SPLIT_STRIDE]].select(run % _SPLIT_STRIDE) for run in runs]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def split_names(rows: Rows, stored: Mapping[str, datasets.Dataset]) -> list[str]:
    """Names of the stored splits that the rows come from."""
    names = list(stored)
    return [names[number] for number in np.unique(rows // _SPLIT_STRIDE)]


def check_disjoint(parts: Mapping[str, Rows]) -> None:
    """Raises `InputError` when two parts share rows: what is trained on must not be measured on."""
    names = list(parts)
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            shared = np.intersect1d(parts[first], parts[second]).size
            if shared:
                raise InputError(
                    f"the {first} and {second} splits share {shared:,} rows: slice them apart, "
                    "for example --train_split 'train[:45000]' --test_split 'test+train[45000:]'"
                )


def hold_out(option: str, size: float, rows: Rows, labels: np.ndarray | None, seed: int) -> tuple[Rows, Rows]:
    """Takes a seeded part out of some rows: every class gives its share, to within one row.

    Args:
        option: name of the option for error messages.
        size: a fraction below 1, or a number of rows.
        rows: (N,).
        labels: class of each row, (N,); `None` for a plain random part (unlabelled or multi-label).
        seed: of the choice, which depends on nothing else.

    Returns:
        (rows that stay, rows held out), both in their former order.

    Raises:
        InputError: nothing would stay.
    """
    count = int(size) if size >= 1 else max(1, round(size * len(rows)))
    if count >= len(rows):
        raise InputError(f"{option} {size:g} leaves none of {len(rows):,} rows: make it smaller")
    draws = _draws(rows, seed)
    classes = np.zeros(len(rows), dtype=np.int64) if labels is None else labels
    by_class = np.lexsort((draws, classes))
    starts, sizes = np.unique(classes[by_class], return_index=True, return_counts=True)[1:]
    rank = np.arange(len(rows)) - np.repeat(starts, sizes)
    # The k-th of n rows of a class stands at (k + 1/2) / n: cutting all classes at one height is stratified.
    height = np.empty(len(rows))
    height[by_class] = (rank + 0.5) / np.repeat(sizes, sizes)
    held = np.zeros(len(rows), dtype=bool)
    held[np.lexsort((draws, height))[:count]] = True
    return rows[~held], rows[held]


def take_per_class(
    option: str, count: int, rows: Rows, labels: np.ndarray, class_names: Sequence[str], seed: int
) -> Rows:
    """Exactly `count` of the rows of each class, in their former order; seeded as `hold_out` is.

    Args:
        option: name of the option for error messages.
        count: rows of each class, at least 1.
        rows: (N,).
        labels: class of each row, (N,).
        class_names: of all classes, in the order of the labels.
        seed: of the choice, which depends on nothing else.

    Raises:
        InputError: a class has fewer rows.
    """
    sizes = np.bincount(labels, minlength=len(class_names))
    if sizes.min() < count:
        poorest = int(sizes.argmin())
        raise InputError(
            f"{option} {count}: class {class_names[poorest]!r} has {sizes[poorest]:,} training rows: ask for fewer"
        )
    draws = _draws(rows, seed)
    places = (np.flatnonzero(labels == number) for number in range(len(class_names)))
    chosen = np.concatenate([place[np.argsort(draws[place])[:count]] for place in places])
    return rows[np.sort(chosen)]


def _draws(rows: Rows, seed: int) -> np.ndarray:
    """A number in [0, 1) for each row, of the row and the seed alone."""
    return keyed_uniform(seed, 0, torch.from_numpy(rows), SPLIT_STREAM, 1)[:, 0].numpy()
