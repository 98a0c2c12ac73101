import pickle
import random
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List
from torch.utils.data import DataLoader

from hfkd.data import (
    Augmentation,
    DataArguments,
    ImageColumns,
    ImageSource,
    KeyedSampler,
    Preprocessing,
    ResidentImages,
    ResizedCrop,
    StreamedImages,
    build_sources,
    collate,
    find_columns,
    keyed_uniform,
    load_image_datasets,
    make_source,
    split_image_datasets,
)
from hfkd.errors import InputError


CROP = Augmentation(2, "reflect", True)
PART = Augmentation(horizontal_flip=True, resized_crop=ResizedCrop((0.3, 1.0)))


def photographs(count: int = 20, label_feature: Any = None, labels: list[Any] | None = None) -> Dataset:
    """Colour pictures of different sizes."""
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (20 + n % 3, 24 - n % 5, 3), dtype=np.uint8) for n in range(count)]
    columns: dict[str, list[Any]] = {"image": images}
    features: dict[str, Any] = {"image": datasets.Image()}
    if label_feature is not None:
        columns["label"], features["label"] = labels or [n % 2 for n in range(count)], label_feature
    return Dataset.from_dict(columns, features=Features(features))


def corrupt(dataset: Dataset, row: int) -> Dataset:
    rows = dataset.cast_column("image", datasets.Image(decode=False))[:]
    rows["image"][row] = {"bytes": b"broken", "path": "photo.jpg"}
    return Dataset.from_dict(rows, features=dataset.features)


def batches(source: ImageSource, epoch: int, batch_size: int = 7, workers: int = 0, **settings: Any) -> list[Any]:
    sampler = KeyedSampler(len(source), seed=1)
    sampler.set_epoch(epoch)
    loader = DataLoader(source, batch_size, sampler=sampler, collate_fn=collate, num_workers=workers)
    return [source.materialise(batch, **settings) for batch in loader]


def by_index(made: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    joined = {name: torch.cat([batch[name] for batch in made]) for name in made[0]}
    order = joined["index"].argsort()
    return {name: values[order] for name, values in joined.items()}


@pytest.fixture(scope="module")
def resident(digits: Dataset, digit_columns: ImageColumns) -> ResidentImages:
    preprocessing = Preprocessing.from_statistics("digits", 8, 1)
    return ResidentImages(digits.select(range(40)), digit_columns, preprocessing, augmentation=CROP, seed=3)


@pytest.fixture(scope="module")
def streamed() -> StreamedImages:
    dataset = photographs(20, ClassLabel(names=["ant", "bee"]))
    return StreamedImages(
        dataset, find_columns(dataset.features), Preprocessing(12), augmentation=PART, views=2, seed=3
    )


@pytest.fixture(params=["resident", "streamed"])
def source(request: pytest.FixtureRequest) -> ImageSource:
    return request.getfixturevalue(request.param)


def test_resident_batch(resident: ResidentImages, digits: Dataset) -> None:
    plain = resident.variant(augmentation=Augmentation())
    keys = torch.tensor([[0, 5], [0, 2], [4, 5]])
    batch = plain.materialise({"key": keys})
    assert sorted(batch) == ["index", "labels", "pixel_values"]
    assert batch["index"].tolist() == [5, 2, 5]
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"].tolist() == [digits[row]["label"] for row in (5, 2, 5)]
    mean, std = plain.preprocessing.mean[0], plain.preprocessing.std[0]
    expected = (np.asarray(digits[2]["image"]).astype(np.float32) / 255 - mean) / std
    assert np.allclose(batch["pixel_values"][1, 0].numpy(), expected, atol=1e-6)
    assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][2])
    augmented = resident.materialise({"key": keys})["pixel_values"]
    assert not torch.equal(augmented[0], augmented[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype(source: ImageSource, dtype: torch.dtype) -> None:
    exact = batches(source, 0, dtype=torch.float64)[0]
    batch = batches(source, 0, dtype=dtype)[0]
    assert batch["pixel_values"].dtype == dtype
    assert torch.allclose(batch["pixel_values"].double(), exact["pixel_values"], atol=2e-2, rtol=1e-6)
    assert batch["labels"].dtype == torch.int64


def test_same_samples_for_any_batch_size_and_workers(source: ImageSource) -> None:
    reference = by_index(batches(source, epoch=2))
    assert reference["index"].tolist() == list(range(len(source)))
    for batch_size, workers in ((4, 0), (len(source), 0), (7, 2)):
        other = by_index(batches(source, 2, batch_size, workers))
        assert other.keys() == reference.keys()
        for name, values in reference.items():
            assert torch.equal(other[name], values), name


def test_order_is_the_same_with_workers(source: ImageSource) -> None:
    orders = [torch.cat([b["index"] for b in batches(source, 1, 4, workers)]).tolist() for workers in (0, 2)]
    assert orders[0] == orders[1] != list(range(len(source)))


def test_epoch_and_seed_change_the_samples(source: ImageSource) -> None:
    reference = by_index(batches(source, 0))["pixel_values"]
    for other in (by_index(batches(source, 1)), by_index(batches(source.variant(seed=4), 0))):
        different = (other["pixel_values"] != reference).flatten(1).any(1)
        assert float(different.double().mean()) > 0.8


def test_two_views(source: ImageSource) -> None:
    batch = by_index(batches(source.variant(views=2), 0))
    assert not torch.equal(batch["pixel_values"], batch["pixel_values_2"])
    single = by_index(batches(source.variant(views=1), 0))
    assert "pixel_values_2" not in single
    assert torch.equal(single["pixel_values"], batch["pixel_values"])


def test_more_views_change_none_of_the_first(source: ImageSource) -> None:
    two, four = (by_index(batches(source.variant(views=views), 0)) for views in (2, 4))
    assert four.keys() - two.keys() == {"pixel_values_3", "pixel_values_4"}
    assert all(torch.equal(four[name], value) for name, value in two.items())
    views = [four[name] for name in ("pixel_values", "pixel_values_2", "pixel_values_3", "pixel_values_4")]
    assert not any(torch.equal(views[i], views[j]) for i in range(4) for j in range(i))


def test_two_views_without_labels() -> None:
    dataset = photographs(6)
    columns = find_columns(dataset.features, require_labels=False)
    for kind, augmentation in ((ResidentImages, CROP), (StreamedImages, CROP), (StreamedImages, PART)):
        source = kind(dataset, columns, Preprocessing(12), augmentation=augmentation, views=2)
        assert sorted(batches(source, 0)[0]) == ["index", "pixel_values", "pixel_values_2"]


@pytest.mark.parametrize("kind", [ResidentImages, StreamedImages])
def test_multi_label(kind: type[ImageSource]) -> None:
    dataset = photographs(3, List(ClassLabel(names=["ant", "bee", "cat"])), [[0, 2], [], [1]])
    source = kind(dataset, find_columns(dataset.features), Preprocessing(12))
    for dtype, label_dtype in ((torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.float64,) * 2):
        labels = by_index(batches(source, 0, dtype=dtype))["labels"]
        assert labels.dtype == label_dtype
        assert labels.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]


def test_resident_and_streamed_images_are_equal() -> None:
    dataset = photographs(8)
    columns = find_columns(dataset.features, require_labels=False)
    for augmentation in (Augmentation(), CROP):
        for preprocessing in (Preprocessing(12), Preprocessing(12, crop_fraction=0.75), Preprocessing(16, 1)):
            made = [
                by_index(batches(kind(dataset, columns, preprocessing, augmentation=augmentation), 3))["pixel_values"]
                for kind in (ResidentImages, StreamedImages)
            ]
            assert made[0].shape == (8, preprocessing.num_channels, preprocessing.image_size, preprocessing.image_size)
            assert torch.equal(made[0], made[1])


def test_streamed_resized_crop_is_the_box_resized_then_flipped(streamed: StreamedImages) -> None:
    source = streamed.variant(views=1)
    batch = source.materialise(collate(source.__getitems__([(4, 9)])))
    image = photographs(20)[9]["image"]
    part = image.resize((12, 12), 2, PART.box(*image.size, 3, 4, 9, 0))
    pixels = torch.from_numpy(np.array(part)).permute(2, 0, 1)
    if keyed_uniform(3, 4, torch.tensor([9]), 0, 3)[0, 2] < 0.5:
        pixels = pixels.flip(2)
    assert torch.equal(batch["pixel_values"][0], source.preprocessing.normalize(pixels[None])[0])


def test_corrupt_image_is_named_by_row_at_once_when_resident() -> None:
    dataset = corrupt(photographs(6), 4)
    columns = find_columns(dataset.features, require_labels=False)
    with pytest.raises(InputError, match=r"row 4 of the validation images \(photo.jpg\) cannot be decoded"):
        ResidentImages(dataset, columns, Preprocessing(8), name="validation")


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_image_is_named_by_row_when_streamed_to_the_step_that_needs_it(workers: int) -> None:
    dataset = corrupt(photographs(6), 4)
    columns = find_columns(dataset.features, require_labels=False)
    source = StreamedImages(dataset, columns, Preprocessing(8))
    sampler = KeyedSampler(6, shuffle=False)
    loader = DataLoader(source, 2, sampler=sampler, collate_fn=collate, num_workers=workers)
    made = list(loader)
    assert [source.materialise(batch)["index"].tolist() for batch in made[:2]] == [[0, 1], [2, 3]]
    with pytest.raises(InputError, match=r"row 4 of the train images \(photo.jpg\) cannot be decoded") as caught:
        source.materialise(made[2])
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="row 4"):
        source[(0, 4)]


def test_no_global_generator_moves(source: ImageSource) -> None:
    def states() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()

    before = states()
    keys = list(KeyedSampler(len(source), seed=1))[:5]
    source.materialise(collate(source.__getitems__(keys)))
    load_image_datasets(DataArguments())
    assert states() == before


def test_global_generators_do_not_matter(source: ImageSource) -> None:
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        made.append(by_index(batches(source, 0))["pixel_values"])
    assert torch.equal(made[0], made[1])


def test_variant_shares_pixels_and_refuses_another_size(resident: ResidentImages) -> None:
    other = resident.variant(augmentation=Augmentation())
    assert isinstance(other, ResidentImages)
    assert other.images.data_ptr() == resident.images.data_ptr()
    assert resident.augmentation == CROP
    with pytest.raises(ValueError, match=r"\(8, 1\) and cannot become \(9, 1\)"):
        resident.variant(preprocessing=Preprocessing(9, 1))
    with pytest.raises(InputError, match="views 0"):
        resident.variant(views=0)
    with pytest.raises(InputError, match="use StreamedImages"):
        resident.variant(augmentation=PART)


def test_bare_indices_only_without_augmentation(resident: ResidentImages) -> None:
    with pytest.raises(TypeError, match="use KeyedSampler"):
        resident[3]
    plain = resident.variant(augmentation=Augmentation())
    assert plain[3] == {"key": (0, 3)}
    loader = DataLoader(plain, 4, collate_fn=collate)
    assert next(iter(loader))["key"].tolist() == [[0, 0], [0, 1], [0, 2], [0, 3]]


def test_survives_pickling(source: ImageSource) -> None:
    restored = pickle.loads(pickle.dumps(source))
    assert torch.equal(by_index(batches(restored, 1))["pixel_values"], by_index(batches(source, 1))["pixel_values"])


def test_make_source_chooses_by_decoded_size() -> None:
    dataset = photographs(4)
    columns = find_columns(dataset.features, require_labels=False)
    size = 4 * 3 * 12 * 12
    assert isinstance(make_source(dataset, columns, Preprocessing(12), resident_limit=size), ResidentImages)
    assert isinstance(make_source(dataset, columns, Preprocessing(12), resident_limit=size - 1), StreamedImages)
    assert isinstance(make_source(dataset, columns, Preprocessing(12), augmentation=PART), StreamedImages)


def test_build_sources_for_digits() -> None:
    args = DataArguments(test_size=1597, validation_size=50)
    sources = build_sources(load_image_datasets(args), args, seed=9)
    assert sources.train.augmentation == Augmentation(1, "reflect", horizontal_flip=False)
    assert sources.train.seed == 9
    assert sources.preprocessing == Preprocessing.from_statistics("digits", 8, 1)
    for part, length in ((sources.validation, 50), (sources.test, 1597)):
        assert part is not None
        assert len(part) == length
        assert not part.augmentation
    coloured = build_sources(load_image_datasets(args), args, num_channels=3).train
    assert coloured.materialise({"key": torch.zeros(2, 2, dtype=torch.int64)})["pixel_values"].shape == (2, 3, 8, 8)


def test_build_sources_for_photographs() -> None:
    stored = {"train": photographs(20, ClassLabel(names=["ant", "bee"]))}
    args = DataArguments("photos", image_size=16, validation_size=4)
    data = split_image_datasets(stored, args)
    sources = build_sources(data, args, views=2)
    assert sources.train.augmentation == Augmentation(2, "reflect", horizontal_flip=True)
    assert (sources.train.views, sources.validation and sources.validation.views) == (2, 1)
    pixels = by_index(batches(sources.train.variant(augmentation=Augmentation(), views=1), 0))["pixel_values"]
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-3)  # measured on the training images
    assert pixels.std((0, 2, 3)).tolist() == pytest.approx([1, 1, 1], abs=1e-3)
    assert sources.validation is not None
    assert sources.validation.preprocessing == sources.train.preprocessing == sources.preprocessing

    large = build_sources(data, DataArguments("photos", image_size=100, normalization="imagenet"))
    assert isinstance(large.train, StreamedImages)
    assert large.train.augmentation.resized_crop is not None
    assert large.preprocessing.crop_fraction == 0.875
    with pytest.raises(InputError, match="not square: give --image_size"):
        build_sources(data, DataArguments("photos"))
    with pytest.raises(InputError, match="normalization 'train' measures images held in memory"):
        build_sources(data, DataArguments("photos", image_size=100, normalization="train"))
    with pytest.raises(InputError, match="crop_padding 16 is too large to reflect images of 16 pixels"):
        build_sources(data, DataArguments("photos", image_size=16, crop_padding=16))
    with pytest.raises(InputError, match="normalization 'cifar' is unknown"):
        build_sources(data, DataArguments("photos", image_size=16, normalization="cifar"))


def test_build_sources_with_a_processor() -> None:
    from transformers import ViTImageProcessorPil

    stored = {"train": photographs(6, ClassLabel(names=["ant", "bee"]))}
    data = split_image_datasets(stored, DataArguments("photos", validation_size=0))
    processor = ViTImageProcessorPil(size={"height": 24, "width": 24})
    args = DataArguments("photos", augmentation="none")
    assert build_sources(data, args, processor=processor).preprocessing == Preprocessing(24)
    args = DataArguments("photos", augmentation="none", image_size=16, normalization="cifar10")
    assert build_sources(data, args, processor=processor).preprocessing == Preprocessing.from_statistics("cifar10", 16)
