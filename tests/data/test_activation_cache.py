"""Activations on disk: what is kept is what was computed, and nothing else is taken for it."""

import json
import pickle

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hfkd.data import Augmentation, KeyedSampler, Preprocessing, ResidentImages, StreamedImages, collate
from hfkd.data.activation_cache import ActivationCache, CachedImages, open_activation_cache
from hfkd.errors import InputError


IDENTITY = {"weights below theta2": "w", "boundary": "b"}
PREPROCESSING = Preprocessing(8, 1)


@pytest.fixture(params=[ResidentImages, StreamedImages])
def source(request, digits: datasets.Dataset, digit_columns):
    return request.param(digits.select(range(50)), digit_columns, PREPROCESSING)


def encoder(source, dtype=torch.float32, stop_after=None):
    """Squares of the normalised pixels; it counts its batches in `calls`."""

    def encode(inputs):
        encode.calls += 1
        if stop_after is not None and encode.calls > stop_after:
            raise KeyboardInterrupt
        return source.materialise(inputs)["pixel_values"].square().to(dtype)

    encode.calls = 0
    return encode


def filled(folder, source, **settings):
    return open_activation_cache(folder, source, encoder(source, **settings), IDENTITY, batch_size=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gathers_what_was_computed_to_the_bit(tmp_path, source, dtype):
    cache = filled(tmp_path / "cache", source, dtype=dtype)
    index = torch.tensor([49, 3, 3, 0])
    keys = torch.stack([torch.zeros_like(index), index], dim=1)
    expected = source.materialise(collate([source[(0, int(i))] for i in index]) | {"key": keys})["pixel_values"]

    assert len(cache) == 50
    assert cache.gather(index).dtype == dtype
    assert torch.equal(cache.gather(index), expected.square().to(dtype))


def test_is_mapped_not_read(tmp_path, source):
    assert isinstance(filled(tmp_path / "cache", source)._array, np.memmap)


def test_is_filled_once(tmp_path, source):
    filled(tmp_path / "cache", source)
    again = encoder(source)
    cache = open_activation_cache(tmp_path / "cache", source, again, IDENTITY)
    assert again.calls == 0
    assert len(cache) == 50


def test_interrupted_filling_starts_again(tmp_path, source):
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path / "cache", source, stop_after=2)
    with pytest.raises(InputError, match="is damaged"):
        ActivationCache(tmp_path / "cache")
    first = filled(tmp_path / "cache", source)
    assert torch.equal(first.gather(torch.arange(50)), filled(tmp_path / "other", source).gather(torch.arange(50)))
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["activations.npy", "key.json"]


@pytest.mark.parametrize("part", IDENTITY)
def test_names_the_part_of_the_network_that_changed(tmp_path, source, part):
    filled(tmp_path / "cache", source)
    with pytest.raises(InputError, match=f"made with other {part}: delete the folder or name another"):
        open_activation_cache(tmp_path / "cache", source, encoder(source), IDENTITY | {part: "other"})


def test_names_images_and_preprocessing_that_changed(tmp_path, source, digits, digit_columns):
    filled(tmp_path / "cache", source)
    kind = type(source)
    for changed, rows, preprocessing in (
        ("images", range(1, 51), PREPROCESSING),
        ("preprocessing", range(50), Preprocessing(8, 1, std=(0.3,))),
        ("images, preprocessing", range(49), Preprocessing(8, 1, std=(0.3,))),
    ):
        other = kind(digits.select(rows), digit_columns, preprocessing)
        with pytest.raises(InputError, match=f"made with other {changed}: "):
            filled(tmp_path / "cache", other)


def cut_off(folder):
    content = (folder / "activations.npy").read_bytes()
    (folder / "activations.npy").write_bytes(content[:-100])


def lose_rows(folder):
    np.save(folder / "activations.npy", np.zeros((49, 1, 8, 8), dtype=np.float32))


def put_pickle(folder):
    np.save(folder / "activations.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)


DAMAGE = {
    "no activations": lambda folder: (folder / "activations.npy").unlink(),
    "cut off": cut_off,
    "rows lost": lose_rows,
    "pickled objects": put_pickle,
    "empty key": lambda folder: (folder / "key.json").write_text(""),
    "another key": lambda folder: (folder / "key.json").write_text(json.dumps({"shape": [50]})),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_refuses_a_damaged_cache(tmp_path, source, damage):
    filled(tmp_path / "cache", source)
    DAMAGE[damage](tmp_path / "cache")
    with pytest.raises(InputError, match="is (damaged|incomplete).*: delete the folder or name another") as error:
        filled(tmp_path / "cache", source)
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_made_is_named(tmp_path, source):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        filled(tmp_path / "file" / "cache", source)


# -- as a source -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_have_activations_labels_and_keys(tmp_path, source, workers):
    images = CachedImages(source)
    images.cache = filled(tmp_path / "cache", source)
    sampler = KeyedSampler(50, seed=3)
    loader = DataLoader(images, 20, sampler=sampler, collate_fn=collate, num_workers=workers)
    for inputs in loader:
        assert inputs.keys() == {"key"}
        batch = images.materialise(inputs)
        assert torch.equal(batch["pixel_values"], images.cache.gather(batch["index"]))
        assert torch.equal(batch["labels"], source.labels[batch["index"]])


def test_variants_have_the_images(tmp_path, source):
    images = CachedImages(source)
    inputs = collate([source[(0, index)] for index in range(4)])
    assert torch.equal(
        images.variant(seed=1).materialise(inputs)["pixel_values"], source.materialise(inputs)["pixel_values"]
    )


def test_is_small_when_it_is_sent_to_a_worker_process(tmp_path, source):
    images = CachedImages(source)
    images.cache = filled(tmp_path / "cache", source, dtype=torch.float64)
    before = len(pickle.dumps(CachedImages(source)))
    assert len(pickle.dumps(images)) < before + 100


def test_refuses_augmented_images(source):
    for settings in ({"augmentation": Augmentation(horizontal_flip=True)}, {"views": 2}):
        with pytest.raises(InputError, match="augmentation=none"):
            CachedImages(source.variant(**settings))
