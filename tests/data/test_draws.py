"""Keys in the place of images: what a batch of a run without data is made of."""

import math
import pickle

import torch
from torch.utils.data import DataLoader

from hfkd.data import KeyedDraws, KeyedSampler, collate, keyed_normal, travelling_normal
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


def travelled(update, place, period, count=3):
    return travelling_normal(0, 0, torch.tensor(update), torch.tensor(place), period, LATENT_STREAM, count)


def test_with_a_period_of_one_every_update_has_fresh_draws():
    drawn = travelled([0, 0, 1], [0, 1, 0], period=1)
    expected = [keyed_normal(0, 0, torch.tensor([index]), LATENT_STREAM, 3) for index in (0, 1, 2**32)]
    assert torch.equal(drawn, torch.cat(expected))


def test_draws_travel_from_one_to_the_next_by_equal_steps_and_stay_normal():
    period, place = 8, 5
    updates = range(3, 20)  # two whole ways: place 5 sets out in the updates 3, 11 and 19
    way = torch.cat([travelled([update], [place], period, count=4000) for update in updates])
    ends = [keyed_normal(0, 0, torch.tensor([place + 2**32 * n]), LATENT_STREAM, 4000) for n in (1, 2, 3)]
    assert all(torch.equal(way[8 * n], end[0]) for n, end in enumerate(ends))
    cosines = torch.nn.functional.cosine_similarity(way[1:], way[:-1])
    assert (cosines - math.cos(math.pi / 16)).abs().max() < 0.02  # the ends are at right angles but for their chance
    assert (way.std(dim=1) - 1).abs().max() < 0.05


def test_places_set_out_at_different_times():
    starts = [keyed_normal(0, 0, torch.tensor([place]), LATENT_STREAM, 3) for place in range(4)]
    at_start = [torch.equal(travelled([0], [place], 4), start) for place, start in enumerate(starts)]
    assert at_start == [True, False, False, False]
