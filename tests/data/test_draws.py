"""Keys in the place of images: what a batch of a run without data is made of."""

import pickle

import torch
from torch.utils.data import DataLoader

from hfkd.data import KeyedDraws, KeyedSampler, collate, keyed_normal
from hfkd.data.keyed_random import EVALUATION, LATENT_STREAM


def batches(source, batch_size=4, workers=0):
    context = "fork" if workers else None
    sampler = KeyedSampler(len(source), shuffle=False)
    loader = DataLoader(
        source, batch_size, sampler=sampler, collate_fn=collate, num_workers=workers, multiprocessing_context=context
    )
    return [source.materialise(batch) for batch in loader]


def test_a_batch_is_its_numbers():
    first, second, rest = batches(KeyedDraws(10))
    assert first["index"].tolist() == [0, 1, 2, 3] and first["epoch"].tolist() == [0] * 4
    assert second["index"].tolist() == [4, 5, 6, 7] and rest["index"].tolist() == [8, 9]
    assert first["index"].dtype == torch.int64 and first.keys() == {"epoch", "index"}


def test_workers_and_pickling_change_nothing():
    source = KeyedDraws(10, epoch=3)
    again = pickle.loads(pickle.dumps(source))
    for one, other in zip(batches(source), batches(again, workers=2), strict=True):
        assert torch.equal(one["index"], other["index"]) and torch.equal(one["epoch"], other["epoch"])


def test_evaluation_draws_are_those_of_no_update():
    training, evaluation = (batches(KeyedDraws(8, epoch=epoch), 8)[0] for epoch in (0, EVALUATION))
    assert torch.equal(training["index"], evaluation["index"])
    drawn = [keyed_normal(0, one["epoch"], one["index"], LATENT_STREAM, 3) for one in (training, evaluation)]
    assert (drawn[0] - drawn[1]).abs().min() > 0
