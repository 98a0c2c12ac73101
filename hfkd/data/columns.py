"""Which columns hold the images and the labels, found by feature type, and the labels as a tensor."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Image, LargeList, Sequence
from torch import Tensor

from hfkd.errors import InputError


@dataclass(frozen=True)
class ImageColumns:
    """Attributes:
    image_column: name of the column with an `Image` feature.
    label_column: name of the label column; `None` when the images are unlabelled.
    class_names: in the order of the labels; `None` when unlabelled.
    multi_label: several labels per image (a list of `ClassLabel`).
    """

    image_column: str
    label_column: str | None = None
    class_names: tuple[str, ...] | None = None
    multi_label: bool = False

    @property
    def num_labels(self) -> int | None:
        return None if self.class_names is None else len(self.class_names)

    @property
    def names(self) -> list[str]:
        return [self.image_column] if self.label_column is None else [self.image_column, self.label_column]


def _class_label(feature: Any) -> ClassLabel | None:
    inner = feature.feature if isinstance(feature, Sequence | LargeList) else feature
    return inner if isinstance(inner, ClassLabel) else None


def _choose(kind: str, named: str | None, candidates: list[str], features: Mapping[str, Any]) -> str | None:
    """The named column if it is a candidate, else the only candidate, else `None` where there is none."""
    if named is not None:
        if named not in features:
            raise InputError(f"{kind}_column {named!r} is not in the dataset: its columns are {sorted(features)}")
        if named not in candidates:
            wanted = "Image" if kind == "image" else "ClassLabel, nor a list of ClassLabel"
            raise InputError(
                f"{kind}_column {named!r} is {features[named]}, which is not {wanted}: "
                f"name another column (candidates: {candidates}) or cast it with Dataset.cast_column"
            )
        return named
    if len(candidates) > 1:
        raise InputError(f"columns {candidates} could all be the {kind} column: name one with --{kind}_column")
    return candidates[0] if candidates else None


def find_columns(
    features: Mapping[str, Any],
    image_column: str | None = None,
    label_column: str | None = None,
    require_labels: bool = True,
) -> ImageColumns:
    """Finds the image column (`Image`) and the label column (`ClassLabel`, or a list of it for several labels).

    Args:
        features: `dataset.features`.
        image_column, label_column: names to take instead of searching.
        require_labels: `False` accepts data without labels, and treats several label columns as none.

    Raises:
        InputError: a column that is missing, ambiguous, or of another type.
    """
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    image = _choose("image", image_column, images, features)
    if image is None:
        raise InputError(f"the dataset has no image column, only {dict(features)}: store the images as datasets.Image")
    labels = [name for name, feature in features.items() if _class_label(feature) is not None]
    if label_column is None and not require_labels and len(labels) != 1:
        return ImageColumns(image)
    label = _choose("label", label_column, labels, features)
    if label is None:
        raise InputError(
            f"the dataset has no label column, only {dict(features)}: store the labels as ClassLabel, "
            "or the images in one folder per class"
        )
    class_label = _class_label(features[label])
    assert class_label is not None
    return ImageColumns(image, label, tuple(class_label.names), features[label] is not class_label)


def _check_present(values: Any, rows: np.ndarray, name: str) -> None:
    if values.null_count:
        row = rows[values.is_null().to_numpy(zero_copy_only=False)][0]
        raise InputError(f"row {row} of the {name} images has no label: drop it, or choose another split")


def read_labels(dataset: datasets.Dataset, columns: ImageColumns, name: str) -> Tensor | None:
    """All labels of a dataset: int64 (N,), or bool (N, L) when multi-label, or `None` when unlabelled.

    Raises:
        InputError: a label that is missing or outside the classes; `name` tells which split in the message.
    """
    if columns.label_column is None or columns.class_names is None:
        return None
    column = dataset.select_columns([columns.label_column]).with_format("arrow")[:][columns.label_column]
    values = column.combine_chunks()
    rows = np.arange(len(values))
    _check_present(values, rows, name)
    if columns.multi_label:
        rows = np.repeat(rows, values.value_lengths().to_numpy())
        values = values.flatten()
        _check_present(values, rows, name)
    numbers = values.to_numpy(zero_copy_only=False).astype(np.int64)
    count = len(columns.class_names)
    outside = np.flatnonzero((numbers < 0) | (numbers >= count))
    if outside.size:
        raise InputError(
            f"row {rows[outside[0]]} of the {name} images has label {numbers[outside[0]]}, outside the {count} "
            f"classes of column {columns.label_column!r}: mend the labels or choose another split"
        )
    if not columns.multi_label:
        return torch.from_numpy(numbers)
    labels = torch.zeros(len(column), count, dtype=torch.bool)
    labels[torch.from_numpy(rows), torch.from_numpy(numbers)] = True
    return labels
