import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from PIL import Image
from transformers import HfArgumentParser

from hfkd.data import (
    DataArguments,
    ImageDatasets,
    find_columns,
    load_image_datasets,
    read_labels,
    split_image_datasets,
)
from hfkd.errors import InputError


THREE = ClassLabel(names=["ant", "bee", "cat"])


def pictures(labels: list[Any], label_feature: Any = THREE, **more: Any) -> Dataset:
    images = [np.full((4, 4, 3), number % 256, dtype=np.uint8) for number in range(len(labels))]
    features = {
        "image": datasets.Image(),
        "label": label_feature,
        **{name: feature for name, (_, feature) in more.items()},
    }
    columns = {"image": images, "label": labels, **{name: values for name, (values, _) in more.items()}}
    return Dataset.from_dict(columns, features=Features(features))


def numbers(dataset: Dataset | None) -> list[int]:
    """The number painted on each picture: its row in the stored split."""
    assert dataset is not None
    return [int(np.asarray(image)[0, 0, 0]) for image in dataset["image"]]


def labels_of(dataset: Dataset | None, data: ImageDatasets) -> torch.Tensor:
    assert dataset is not None
    labels = read_labels(dataset, data.columns, "any")
    assert labels is not None
    return labels


def test_digits_by_default() -> None:
    data = load_image_datasets(DataArguments())
    assert [len(part) for part in (data.train, data.validation, data.test) if part is not None] == [1294, 144, 359]
    assert data.columns.class_names == tuple("0123456789")
    assert (data.columns.image_column, data.columns.label_column) == ("image", "label")
    assert (data.name, data.is_hub_id, data.columns.multi_label) == ("digits", False, False)
    pixels = np.stack([np.asarray(image) for image in data.train[:50]["image"]])
    assert pixels.shape == (50, 8, 8)
    assert pixels.dtype == np.uint8
    assert pixels.max() == 255
    assert set(np.unique(pixels)) <= {round(level * 255 / 16) for level in range(17)}


def test_two_hundred_digits_to_train_and_the_rest_to_test() -> None:
    data = load_image_datasets(DataArguments(test_size=1597, validation_size=0))
    assert (len(data.train), data.validation, len(data.test or ())) == (200, None, 1597)
    assert torch.bincount(labels_of(data.train, data)).tolist() == pytest.approx([20] * 10, abs=1)
    assert "200 rows" in data.provenance["train"]
    assert "1,597 rows" in data.provenance["test"]


def test_slices_of_digits() -> None:
    data = load_image_datasets(
        DataArguments(train_split="train[:1000]", test_split="train[1000:]", validation_size=0.1)
    )
    assert [len(part) for part in (data.train, data.validation, data.test) if part is not None] == [900, 100, 797]
    stored = load_image_datasets(DataArguments(test_size=0, validation_size=0)).train
    assert data.test is not None
    assert data.test["label"][:] == stored["label"][1000:]


def test_held_out_parts_are_seeded_stratified_and_disjoint() -> None:
    labels = [0] * 100 + [1] * 60 + [2] * 40
    stored = {"train": pictures(labels)}

    def parts(seed: int) -> tuple[list[int], list[int], list[int]]:
        data = split_image_datasets(stored, DataArguments("x", test_size=50, validation_size=0.2, split_seed=seed))
        for part, counts in ((data.test, [25, 15, 10]), (data.validation, [15, 9, 6])):
            assert torch.bincount(labels_of(part, data)).tolist() == counts
        return numbers(data.train), numbers(data.validation), numbers(data.test)

    first = parts(0)
    assert sorted(sum(first, [])) == list(range(200))
    assert all(part == sorted(part) for part in first)
    assert parts(0) == first
    assert parts(1)[1] != first[1]


def test_hold_out_shares_are_right_to_within_a_row_of_each_class() -> None:
    labels = [0] * 37 + [1] * 11 + [2] * 3
    data = split_image_datasets({"train": pictures(labels)}, DataArguments("x", validation_size=17))
    counts = torch.bincount(labels_of(data.validation, data), minlength=3)
    assert counts.sum() == 17
    assert (counts - torch.tensor([37, 11, 3]) / 3).abs().max() <= 1


def test_max_train_samples_leaves_the_held_out_parts_alone() -> None:
    stored = {"train": pictures([0, 1, 2] * 20)}
    whole = split_image_datasets(stored, DataArguments("x", validation_size=6))
    few = split_image_datasets(stored, DataArguments("x", validation_size=6, max_train_samples=12))
    assert torch.bincount(labels_of(few.train, few)).tolist() == [4, 4, 4]
    assert numbers(few.validation) == numbers(whole.validation)
    assert set(numbers(few.train)) < set(numbers(whole.train))
    many = split_image_datasets(stored, DataArguments("x", validation_size=6, max_train_samples=1000))
    assert numbers(many.train) == numbers(whole.train)


def test_train_per_class_is_exact_seeded_and_leaves_the_held_out_parts_alone() -> None:
    stored = {"train": pictures([0] * 30 + [1] * 9 + [2] * 21)}

    def few(**settings: Any) -> ImageDatasets:
        arguments = {"validation_size": 6, "train_per_class": 5, **settings}
        return split_image_datasets(stored, DataArguments("x", **arguments))

    whole, data = few(train_per_class=None), few()
    assert torch.bincount(labels_of(data.train, data)).tolist() == [5, 5, 5]
    assert numbers(data.train) == sorted(numbers(data.train)) and set(numbers(data.train)) < set(numbers(whole.train))
    assert numbers(data.validation) == numbers(whole.validation)
    assert numbers(few().train) == numbers(data.train) != numbers(few(split_seed=1).train)
    assert data.provenance["train"].startswith("train_per_class 5 of train, seed 0 (15 rows")
    with pytest.raises(InputError, match="train_per_class 9: class 'bee' has 8 training rows: ask for fewer"):
        few(train_per_class=9)
    several = {"train": pictures([[0, 2], [], [1], [0, 1, 2]], List(THREE))}
    with pytest.raises(InputError, match="train_per_class 1 needs images with one label each"):
        split_image_datasets(several, DataArguments("x", validation_size=0, train_per_class=1))


def test_stored_splits_are_found_by_name() -> None:
    stored = {"train": pictures([0, 1] * 5), "validation": pictures([2] * 3), "test": pictures([1] * 4)}
    data = split_image_datasets(stored, DataArguments("x"))
    assert [len(part) for part in (data.train, data.validation, data.test) if part is not None] == [10, 3, 4]
    # As ImageNet is used: its validation split is the test set, and validation rows come out of train.
    data = split_image_datasets(stored, DataArguments("x", test_split="validation", validation_size=2))
    assert [len(part) for part in (data.train, data.validation, data.test) if part is not None] == [8, 2, 3]
    data = split_image_datasets(stored, DataArguments("x", train_split="train+test", validation_size=0))
    assert (len(data.train), len(data.validation or ()), data.test) == (14, 3, None)


def test_slices_over_two_splits_keep_their_order() -> None:
    stored = {"train": pictures([0, 1, 2] * 4), "test": pictures([0, 1, 2])}
    args = DataArguments("x", train_split="train[:8]", test_split="test+train[8:]", validation_size=0)
    data = split_image_datasets(stored, args)
    assert numbers(data.train) == list(range(8))
    assert numbers(data.test) == [0, 1, 2, 8, 9, 10, 11]
    assert data.validation is None


def test_provenance_tells_splits_apart() -> None:
    stored = {"train": pictures([0, 1, 2] * 20)}
    made = [
        split_image_datasets(stored, DataArguments("x", split_seed=seed), is_hub_id=True).provenance
        for seed in (0, 0, 1)
    ]
    assert made[0] == made[1]
    assert made[0]["train"] != made[2]["train"]
    assert made[0]["validation"].startswith("validation_size 0.1 of train, seed 0 (6 rows, sha256 ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_split": "trian"}, r"train_split 'trian': Unknown split .* 'train' with 6 rows, 'test' with 3 rows"),
        ({"test_split": "test[5:9]"}, "test_split 'test\\[5:9\\]' is empty: .* 'test' with 3 rows"),
        ({"train_split": "train["}, "train_split 'train\\['"),
        ({"train_split": "train[:0]"}, "train_split 'train\\[:0\\]' is empty"),
        ({"test_split": "train[4:]"}, "the train and test splits share 2 rows"),
        ({"validation_split": "test", "test_split": "test"}, "validation and test splits share 3 rows"),
        ({"validation_size": 6}, "validation_size 6 leaves none of 6 rows"),
        ({"image_column": "picture"}, "image_column 'picture' is not in the dataset: its columns are"),
        ({"image_column": "label"}, r"image_column 'label' is ClassLabel.*candidates: \['image'\]"),
        ({"label_column": "image"}, r"label_column 'image' is Image.*candidates: \['label'\]"),
    ],
)
def test_bad_choices_are_named_in_one_line(settings: dict[str, Any], message: str) -> None:
    stored = {"train": pictures([0, 1, 2] * 2), "test": pictures([0, 1, 2])}
    with pytest.raises(InputError, match=message) as caught:
        split_image_datasets(stored, DataArguments("x", **settings))
    assert "\n" not in str(caught.value)


def test_missing_and_ambiguous_columns() -> None:
    numbers_only = Dataset.from_dict({"x": [1]})
    with pytest.raises(InputError, match="has no image column"):
        split_image_datasets({"train": numbers_only}, DataArguments("x"))
    unlabelled = pictures([0, 1]).remove_columns("label")
    with pytest.raises(InputError, match="has no label column"):
        split_image_datasets({"train": unlabelled}, DataArguments("x"))
    coarse = pictures([0, 1], coarse=([0, 1], THREE))
    with pytest.raises(
        InputError, match=r"columns \['label', 'coarse'\] could all be the label column.*--label_column"
    ):
        split_image_datasets({"train": coarse}, DataArguments("x"))
    assert find_columns(coarse.features, label_column="coarse").label_column == "coarse"
    assert find_columns(coarse.features, require_labels=False).label_column is None
    mirrored = pictures([0, 1], mirrored=([np.zeros((4, 4), dtype=np.uint8)] * 2, datasets.Image()))
    with pytest.raises(InputError, match=r"columns \['image', 'mirrored'\] could all be the image column"):
        find_columns(mirrored.features, label_column="label")
    plain = pictures([0, 1], Value("int64"))
    with pytest.raises(InputError, match="label_column 'label' is Value.*which is not ClassLabel"):
        find_columns(plain.features, label_column="label")


def test_unlabelled_data_where_labels_are_not_needed() -> None:
    unlabelled = pictures([0] * 20).remove_columns("label")
    data = split_image_datasets({"train": unlabelled}, DataArguments("x", validation_size=5), require_labels=False)
    assert (len(data.train), len(data.validation or ())) == (15, 5)
    assert (data.columns.label_column, data.columns.class_names, data.columns.num_labels) == (None, None, None)
    assert read_labels(data.train, data.columns, "train") is None


def test_multi_label() -> None:
    stored = {"train": pictures([[0, 2], [], [1], [0, 1, 2]], List(THREE))}
    data = split_image_datasets(stored, DataArguments("x", validation_size=0))
    assert data.columns.multi_label
    expected = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]], dtype=torch.bool)
    assert torch.equal(labels_of(data.train, data), expected)
    assert torch.equal(labels_of(data.train.select([3, 1]), data), expected[[3, 1]])
    held = split_image_datasets(stored, DataArguments("x", validation_size=1))
    assert (len(held.train), len(held.validation or ())) == (3, 1)


def without_class_check(labels: list[Any], feature: Any) -> Dataset:
    """Labels that `ClassLabel` would refuse on encoding, as files written by other tools hold them."""
    plain = Value("int64") if isinstance(feature, ClassLabel) else List(Value("int64"))
    dataset = pictures(labels, plain)
    dataset.info.features["label"] = feature
    return dataset


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        ([0, 1, 3], THREE, "row 2 of the train images has label 3, outside the 3 classes of column 'label'"),
        ([0, -1, 2], THREE, "row 1 of the train images has label -1, outside"),
        ([0, None, 2], THREE, "row 1 of the train images has no label"),
        ([[0], [1, 7], [2]], List(THREE), "row 1 of the train images has label 7, outside"),
        ([[0], None, [2]], List(THREE), "row 1 of the train images has no label"),
        ([[0], [1], [2, None]], List(THREE), "row 2 of the train images has no label"),
    ],
)
def test_bad_labels_are_named_by_row(labels: list[Any], feature: Any, message: str) -> None:
    stored = {"train": without_class_check(labels, feature)}
    with pytest.raises(InputError, match=message):
        split_image_datasets(stored, DataArguments("x", validation_size=0))


def test_bad_label_of_the_test_split() -> None:
    stored = {"train": pictures([0, 1, 2] * 4), "test": without_class_check([0, 5], THREE)}
    with pytest.raises(InputError, match="row 1 of the test images has label 5"):
        split_image_datasets(stored, DataArguments("x"))


def test_splits_that_differ() -> None:
    two = ClassLabel(names=["ant", "bee"])
    renamed = ClassLabel(names=["ant", "bee", "dog"])
    with pytest.raises(InputError, match="split 'test' has 2 classes and 'train' has 3"):
        split_image_datasets({"train": pictures([0, 1, 2]), "test": pictures([0, 1], two)}, DataArguments("x"))
    with pytest.raises(InputError, match="splits 'train' and 'test' differ in their columns or class names"):
        split_image_datasets({"train": pictures([0, 1, 2]), "test": pictures([0, 1], renamed)}, DataArguments("x"))


def image_folder(root: Path) -> Path:
    for split, count in (("train", 6), ("test", 2)):
        for label in ("ant", "bee"):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (5, 5), (number, 0, 0)).save(root / split / label / f"{number}.png")
    return root


def parquet_folder(root: Path) -> Path:
    root.mkdir()
    pictures([0, 1] * 6).to_parquet(root / "train-00000-of-00001.parquet")
    pictures([0, 1] * 2).to_parquet(root / "test-00000-of-00001.parquet")
    return root


@pytest.mark.parametrize("make", [image_folder, parquet_folder])
def test_local_folders(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path / "data")
    data = load_image_datasets(DataArguments(str(folder), validation_size=2))
    assert [len(part) for part in (data.train, data.validation, data.test) if part is not None] == [10, 2, 4]
    assert (data.name, data.is_hub_id) == (str(folder), False)
    assert (data.columns.class_names or ())[:2] == ("ant", "bee")
    assert labels_of(data.validation, data).tolist() in ([0, 1], [1, 0])
    args = DataArguments(str(folder), train_split="train[:50%]", test_split="test+train[50%:]", validation_size=0)
    data = load_image_datasets(args)
    assert (len(data.train), len(data.test or ())) == (6, 10)


def test_flat_folder_without_labels(tmp_path: Path) -> None:
    for number in range(4):
        Image.new("L", (5, 5), number).save(tmp_path / f"{number}.png")
    args = DataArguments(str(tmp_path), validation_size=0)
    assert len(load_image_datasets(args, require_labels=False).train) == 4
    with pytest.raises(InputError, match="has no label column"):
        load_image_datasets(args)


@pytest.mark.parametrize("name", ["someone/no-such-data", "no-such-data", "./absent", "/no/such/folder"])
def test_unknown_dataset_is_one_line(name: str) -> None:
    with pytest.raises(
        InputError, match=f"dataset '{name}' (cannot be loaded|is not a folder).*give 'digits'"
    ) as caught:
        load_image_datasets(DataArguments(name))
    assert "\n" not in str(caught.value)


def test_folder_without_images_and_broken_parquet(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "train.parquet").write_bytes(b"not parquet")
    for folder in (empty, broken):
        with pytest.raises(InputError, match="cannot be loaded") as caught:
            load_image_datasets(DataArguments(str(folder)))
        assert "\n" not in str(caught.value)


def test_unknown_configuration_of_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no_such_config"):
        load_image_datasets(
            DataArguments(str(parquet_folder(tmp_path / "data")), dataset_config_name="no_such_config")
        )


def test_arguments_parse_and_print_help() -> None:
    parser = HfArgumentParser(DataArguments)
    command = "--dataset_name digits --test_size 1597 --validation_size 0 --augmentation crop --horizontal_flip false"
    (args,) = parser.parse_args_into_dataclasses(command.split())
    assert (args.test_size, args.validation_size, args.augmentation, args.horizontal_flip) == (1597, 0, "crop", False)
    output = io.StringIO()
    parser.print_help(output)
    assert "--max_train_samples" in output.getvalue()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation_size": -0.1}, "validation_size -0.1"),
        ({"test_size": 1.5}, "test_size 1.5 is neither a fraction"),
        ({"max_train_samples": 0}, "max_train_samples 0 is too small"),
        ({"train_per_class": 0}, "train_per_class 0 is too small"),
        ({"train_per_class": 5, "max_train_samples": 50}, "both choose the training rows: give one of them"),
        ({"image_size": 0}, "image_size 0 is too small"),
        ({"augmentation": "mixup"}, "augmentation 'mixup' is unknown"),
        ({"padding_mode": "edge"}, "padding_mode 'edge' is unknown"),
    ],
)
def test_arguments_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DataArguments(**settings)
