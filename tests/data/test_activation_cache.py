"""Activations on disk: what is kept is what was computed, and nothing else is taken for it."""

import json
import os
import pickle
import secrets

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hfkd.data import (
    Augmentation,
    KeyedSampler,
    Preprocessing,
    ResidentImages,
    StreamedImages,
    collate,
    find_columns,
)
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


def overtaken(folder, source, **faster):
    """An encoder that, once it has begun, sees another process fill the same folder to the end."""
    encode = encoder(source)

    def slow(inputs):
        if encode.calls == 1:
            filled(folder, source, **faster)
        return encode(inputs)

    return slow


def test_of_two_that_fill_one_folder_the_first_to_finish_is_taken(tmp_path, source):
    folder = tmp_path / "cache"
    slower = open_activation_cache(folder, source, overtaken(folder, source), IDENTITY, batch_size=16)
    everything = torch.arange(50)
    assert torch.equal(slower.gather(everything), filled(tmp_path / "alone", source).gather(everything))
    assert sorted(path.name for path in folder.iterdir()) == ["activations.npy", "key.json"]


def test_another_network_that_was_faster_is_not_taken_for_the_own(tmp_path, source):
    folder = tmp_path / "cache"
    with pytest.raises(InputError, match="made with other boundary"):
        open_activation_cache(
            folder, source, overtaken(folder, source), IDENTITY | {"boundary": "other"}, batch_size=16
        )
    assert len(filled(folder, source)) == 50


def test_what_a_killed_process_left_is_swept(tmp_path, source):
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "unfinished-0123456789abcdef").write_bytes(bytes(100))
    filled(folder, source)
    assert sorted(path.name for path in folder.iterdir()) == ["activations.npy", "key.json"]


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


@pytest.mark.parametrize("change", ["pixels", "time alone"])
def test_names_files_that_were_replaced(tmp_path, change):
    """Records that hold paths look the same as before."""
    paths = [str(tmp_path / f"{number}.png") for number in range(4)]
    for path in paths:
        Image.new("L", (8, 8), 1).save(path)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=4)})
    dataset = datasets.Dataset.from_dict({"image": paths, "label": range(4)}, features=features)
    source = StreamedImages(dataset.select([3, 1]), find_columns(features), PREPROCESSING)
    filled(tmp_path / "cache", source)
    os.utime(paths[0], ns=(1, 1))  # not among the images
    filled(tmp_path / "cache", source)
    if change == "pixels":
        before = os.stat(paths[1]).st_mtime_ns
        Image.effect_noise((8, 8), 50).save(paths[1])
        os.utime(paths[1], ns=(before, before))
    else:
        os.utime(paths[1], ns=(1, 1))
    with pytest.raises(InputError, match="made with other images: "):
        filled(tmp_path / "cache", source)


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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device of a full disk")
def test_a_full_disk_is_named(tmp_path, source, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda size: "name")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/unfinished-name").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\): free space") as error:
        filled(tmp_path / "cache", source)
    assert "\n" not in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_file_has_holes_on_the_way(tmp_path, source):
    """A full disk kills the process that writes to a hole of a mapped file."""
    sizes, encode = [], encoder(source)

    def watched(inputs):
        sizes.extend(path.stat().st_size for path in (tmp_path / "cache").iterdir())
        return encode(inputs)

    cache = open_activation_cache(tmp_path / "cache", source, watched, IDENTITY, batch_size=16)
    whole = (tmp_path / "cache/activations.npy").stat().st_size
    assert len(cache) == 50 and len(sizes) >= 3 and max(sizes) < whole


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
