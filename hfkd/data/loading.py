"""From a name to train, validation and test images with their columns, all checked."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np

from hfkd.errors import InputError

from .arguments import DataArguments
from .columns import ImageColumns, find_columns, read_labels
from .splits import Rows, check_disjoint, hold_out, select_rows, split_names, take_per_class, take_rows


DIGITS = "digits"
_DIGITS_TEST_SIZE = 0.2


@dataclass
class ImageDatasets:
    """Attributes:
    train, validation, test: no row is in two of them; the last two may be absent.
    columns: where the images and labels are, class names, multi-label.
    name: what the user called it: `digits`, a Hub id, or a folder.
    is_hub_id: whether cards may link it.
    provenance: name, configuration, revision, and for each part its origin, number of rows and the sha256 of its
        row numbers, so that two runs can be seen to have used the same rows.
    """

    train: datasets.Dataset
    validation: datasets.Dataset | None
    test: datasets.Dataset | None
    columns: ImageColumns
    name: str = "unnamed"
    is_hub_id: bool = False
    provenance: dict[str, str] = field(default_factory=dict)


def load_image_datasets(args: DataArguments, require_labels: bool = True) -> ImageDatasets:
    """Loads the data that the arguments name.

    Args:
        args: see `DataArguments`.
        require_labels: `False` for methods that train on images alone.

    Raises:
        InputError: unknown dataset or split, empty or overlapping splits, columns or labels that cannot be used.
    """
    stored, is_hub_id = _load_stored(args)
    return split_image_datasets(stored, args, require_labels, is_hub_id)


def _load_stored(args: DataArguments) -> tuple[Mapping[str, datasets.Dataset], bool]:
    name = args.dataset_name
    if name == DIGITS:
        return {"train": load_digits()}, False
    is_folder = Path(name).expanduser().is_dir()
    if not is_folder and (Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise InputError(f"dataset {name!r} is not a folder: give 'digits', a Hub id, or an existing folder")
    path = str(Path(name).expanduser()) if is_folder else name
    revision = None if is_folder else args.dataset_revision
    try:
        stored = datasets.load_dataset(path, args.dataset_config_name, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = " ".join(str(error.__cause__ or error).split())[:300]
        raise InputError(
            f"dataset {name!r} cannot be loaded ({cause}): give 'digits', a Hub id, or a folder of images or parquet"
        ) from error
    return stored, not is_folder


def load_digits() -> datasets.Dataset:
    """scikit-learn's 1,797 grey 8x8 digits in stored order, their 17 levels spread over 0 to 255."""
    from sklearn.datasets import load_digits as load_from_sklearn  # takes most of a second to import

    bunch = load_from_sklearn()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    return datasets.Dataset.from_dict({"image": list(pixels), "label": bunch.target.tolist()}, features=features)


def split_image_datasets(
    stored: Mapping[str, datasets.Dataset],
    args: DataArguments,
    require_labels: bool = True,
    is_hub_id: bool = False,
) -> ImageDatasets:
    """Train, validation and test parts of loaded splits (such as a `DatasetDict`), see `load_image_datasets`."""
    parts = _named_parts(stored, args)
    columns = _common_columns(parts, stored, args, require_labels)
    origins = {part: f"{getattr(args, part + '_split') or part}" for part in parts}

    def move(part: str, option: str, size: float) -> None:
        rows = parts["train"]
        labels = None if columns.multi_label else read_labels(take_rows(rows, stored), columns, "train")
        parts["train"], parts[part] = hold_out(
            option, size, rows, None if labels is None else labels.numpy(), args.split_seed
        )
        origins[part] = f"{option} {size:g} of {args.train_split}, seed {args.split_seed}"

    test_size = args.test_size
    if test_size is None and args.dataset_name == DIGITS:
        test_size = _DIGITS_TEST_SIZE
    if "test" not in parts and test_size:
        move("test", "test_size", test_size)
    if "validation" not in parts and args.validation_size:
        move("validation", "validation_size", args.validation_size)
    if args.max_train_samples is not None and args.max_train_samples < len(parts["train"]):
        move("subset", "max_train_samples", args.max_train_samples)
        parts["train"] = parts.pop("subset")
        origins["train"] = origins.pop("subset")
    if args.train_per_class is not None:
        parts["train"] = _per_class(parts["train"], stored, columns, args)
        origins["train"] = f"train_per_class {args.train_per_class} of {args.train_split}, seed {args.split_seed}"

    made = {part: take_rows(rows, stored) for part, rows in parts.items()}
    for part, dataset in made.items():
        read_labels(dataset, columns, part)
    return ImageDatasets(
        train=made["train"],
        validation=made.get("validation"),
        test=made.get("test"),
        columns=columns,
        name=args.dataset_name,
        is_hub_id=is_hub_id,
        provenance=_provenance(args, parts, origins),
    )


def _per_class(rows: Rows, stored: Mapping[str, datasets.Dataset], columns: ImageColumns, args: DataArguments) -> Rows:
    """`train_per_class` of the training rows of each class."""
    labels = None if columns.multi_label else read_labels(take_rows(rows, stored), columns, "train")
    if labels is None:
        raise InputError(
            f"train_per_class {args.train_per_class} needs images with one label each: name the label column, or give "
            "max_train_samples"
        )
    assert args.train_per_class is not None and columns.class_names is not None  # labels have names
    return take_per_class(
        "train_per_class", args.train_per_class, rows, labels.numpy(), columns.class_names, args.split_seed
    )


def _named_parts(stored: Mapping[str, datasets.Dataset], args: DataArguments) -> dict[str, Rows]:
    """Rows of the splits that the user named, and of the usual names where they are apart from those."""
    specs = {"train": args.train_split, "validation": args.validation_split, "test": args.test_split}
    parts = {part: select_rows(f"{part}_split", spec, stored) for part, spec in specs.items() if spec is not None}
    check_disjoint(parts)
    for part in ("validation", "test"):
        if part not in parts and part in stored and len(stored[part]):
            rows = select_rows(f"{part}_split", part, stored)
            if all(np.intersect1d(rows, other).size == 0 for other in parts.values()):
                parts[part] = rows
    return parts


def _common_columns(
    parts: Mapping[str, Rows], stored: Mapping[str, datasets.Dataset], args: DataArguments, require_labels: bool
) -> ImageColumns:
    found: dict[str, ImageColumns] = {}
    for rows in parts.values():
        for split in split_names(rows, stored):
            features = stored[split].features
            found[split] = find_columns(features, args.image_column, args.label_column, require_labels)
    first, columns = next(iter(found.items()))
    for split, other in found.items():
        if other.num_labels != columns.num_labels:
            raise InputError(
                f"split {split!r} has {other.num_labels} classes and {first!r} has {columns.num_labels}: "
                "store both with the same ClassLabel, or choose other splits"
            )
        if other != columns:
            raise InputError(f"splits {first!r} and {split!r} differ in their columns or class names: make them equal")
    return columns


def _provenance(args: DataArguments, parts: Mapping[str, Rows], origins: Mapping[str, str]) -> dict[str, str]:
    facts = {"name": args.dataset_name, "config": args.dataset_config_name, "revision": args.dataset_revision}
    result = {key: value for key, value in facts.items() if value is not None}
    for part, rows in parts.items():
        digest = hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()
        result[part] = f"{origins[part]} ({len(rows):,} rows, sha256 {digest[:16]})"
    return result
