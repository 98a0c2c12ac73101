"""Batches of which a share is synthetic: which keys, which images are read, and what several ranks make of it."""

import pytest
import torch
from torch.utils.data import DataLoader

from hfkd.data import (
    KeyedSampler,
    MixedImages,
    Preprocessing,
    SyntheticDraws,
    ViewAugmentation,
    collate,
    make_source,
    synthetic_count,
)
from hfkd.data.mixed import synthetic_positions
from hfkd.errors import InputError


@pytest.fixture(params=[2**30, 0], ids=["resident", "streamed"])
def source(request, digits, digit_columns):
    return make_source(
        digits.select(range(40)),
        digit_columns,
        Preprocessing(8, 1),
        resident_limit=request.param,
        augmentation=ViewAugmentation(),
        views=2,
        seed=5,
    )


@pytest.mark.parametrize(
    ("batch", "share", "count"), [(512, 0.5, 256), (512, 1.0, 512), (7, 0.5, 3), (10, 0.3, 3), (4, 0, 0)]
)
def test_the_split_is_rounded_down_and_spread_evenly(batch, share, count):
    places = synthetic_positions(batch, share)
    assert sum(places) == synthetic_count(batch, share) == count
    for start in range(batch):
        assert abs(sum(places[:start]) - start * share) < 1


def test_ranks_together_have_the_split_of_the_joined_batch():
    assert synthetic_positions(12, 0.25) == synthetic_positions(4, 0.25) * 3


@pytest.mark.parametrize("workers", [0, 2])
def test_real_rows_are_the_sources_and_the_others_are_keys(source, workers):
    mixed = MixedImages(source, 0.3)
    read = []
    if workers == 0:
        inner = source.__getitems__
        source.__getitems__ = lambda keys: (read.extend(keys), inner(keys))[1]
    sampler = KeyedSampler(len(mixed), seed=1)
    sampler.set_epoch(4)
    keys = list(sampler)[:10]
    context = "fork" if workers else None
    loader = DataLoader(
        mixed, batch_size=10, sampler=sampler, collate_fn=collate, num_workers=workers, multiprocessing_context=context
    )
    batch = mixed.materialise(next(iter(loader)))
    chosen = synthetic_positions(10, 0.3)
    assert batch["synthetic_index"].tolist() == [key[1] for key, one in zip(keys, chosen, strict=True) if one]
    assert batch["synthetic_epoch"].tolist() == [4] * 3
    real = [key for key, one in zip(keys, chosen, strict=True) if not one]
    expected = source.materialise(collate(source.__getitems__(real)))
    for name in ("pixel_values", "pixel_values_2", "index", "labels"):
        assert torch.equal(batch[name], expected[name])
    assert (batch["pixel_values"] - batch["pixel_values_2"]).abs().amax(dim=(1, 2, 3)).min() > 0.01
    assert not read or read[: len(real)] == real


def test_variants_are_of_the_source():
    class Source:
        def variant(self, **settings):
            return settings

    assert MixedImages(Source(), 0.5).variant(views=1) == {"views": 1}


def test_draws_keep_their_epoch():
    """Every epoch draws samples of its own."""
    draws = SyntheticDraws(6)
    batch = draws.materialise(collate(draws.__getitems__([(3, 1), (3, 4)])))
    assert {name: value.tolist() for name, value in batch.items()} == {
        "synthetic_epoch": [3, 3], "synthetic_index": [1, 4],
    }  # fmt: skip


def test_an_unreadable_image_is_named(source, monkeypatch):
    monkeypatch.setattr(source, "__getitems__", lambda keys: [{"error": "row 3 is broken"}], raising=False)
    batch = collate(MixedImages(source, 0.5).__getitems__([(0, 0), (0, 1), (0, 2)]))
    assert batch == {"error": "row 3 is broken"}
    with pytest.raises(InputError, match="row 3 is broken"):
        MixedImages(source, 0.5).materialise(batch)
