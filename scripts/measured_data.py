"""The data that a checkpoint is measured on: that of its run, labelled, and of the classes that it knows."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import datasets

from hfkd.data import DataArguments, ImageDatasets
from hfkd.errors import InputError

from .options import RUN_FILE, check_values, read_yaml


def data_of_run(folder: Path) -> dict[str, Any]:
    """The data options that a saved run was trained with; none where its folder does not say."""
    path = folder / RUN_FILE
    if not path.is_file():
        return {}
    names = {field.name for field in dataclasses.fields(DataArguments)}
    options = {name: value for name, value in read_yaml(path).items() if name in names}
    return check_values(options, [DataArguments], str(path))


def check_labelled_test(data: ImageDatasets) -> datasets.Dataset:
    """The test images. Raises `InputError` where there are none, or they have no labels."""
    if data.test is None or data.columns.label_column is None:
        raise InputError(
            f"dataset {data.name!r} has no labelled test images: name some with --test_split or --test_size"
        )
    return data.test


def check_classes(config: Any, data: ImageDatasets, who: str, mend: str) -> None:
    """That the network with this configuration has the data's classes; a note where they are called otherwise.

    Raises:
        InputError: another number of classes. The message says `who` has them, and what is the `mend`.
    """
    known = [config.id2label[number] for number in range(config.num_labels)]
    check_class_names(known, data, who, mend)


def check_class_names(known: list[str], data: ImageDatasets, who: str, mend: str) -> None:
    """As `check_classes`, of a network that knows the classes `known`."""
    names = list(data.columns.class_names or ())
    if len(known) != len(names):
        raise InputError(f"{who} knows {len(known)} classes and {data.name!r} has {len(names)}: {mend}")
    if known != names:
        print(f"hfkd: note: class names differ, and are matched by position: {known} and {names}", file=sys.stderr)
