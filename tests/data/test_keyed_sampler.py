"""Order of samples through torch's loader and accelerate's wrappers, in one process and in two."""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.state import AcceleratorState
from torch.multiprocessing.spawn import spawn
from torch.utils.data import DataLoader

from hfkd.data import DrawsDataset, KeyedSampler, collate, keyed_permutation, keyed_uniform, set_sampler_epoch


LENGTH, BATCH, SKIPPED = 45, 4, 2
Keys = list[list[list[int]]]


def loader_for(accelerator: Accelerator, batch_size: int, drop_last: bool, workers: int) -> DataLoader:
    sampler = KeyedSampler(LENGTH, seed=3)
    return accelerator.prepare(
        DataLoader(
            DrawsDataset(LENGTH),
            batch_size,
            sampler=sampler,
            collate_fn=collate,
            drop_last=drop_last,
            num_workers=workers,
            # Ranks started by `spawn` would otherwise spawn their workers too, at seconds each.
            multiprocessing_context="fork" if workers else None,
        )
    )


def record(batch_size: int, drop_last: bool, workers: int) -> dict[str, Keys]:
    """Keys of epochs 0 to 2, and of the rest of epoch 1 as a resumed run sees it, from a fresh loader."""
    accelerator = Accelerator(cpu=True)
    loader = loader_for(accelerator, batch_size, drop_last, workers)
    seen: dict[str, Keys] = {}
    for epoch in range(3):
        set_sampler_epoch(loader, epoch)
        # As the Trainer does, and as accelerate's own __iter__ does again.
        loader.set_epoch(epoch)  # type: ignore[attr-defined]
        seen[f"epoch {epoch}"] = [batch["key"].tolist() for batch in loader]
    fresh = loader_for(accelerator, batch_size, drop_last, workers)
    set_sampler_epoch(fresh, 1)
    resumed = skip_first_batches(fresh, SKIPPED)
    resumed.set_epoch(1)
    seen["resumed epoch 1"] = [batch["key"].tolist() for batch in resumed]
    set_sampler_epoch(fresh, 2)
    fresh.set_epoch(2)  # type: ignore[attr-defined]
    seen["epoch 2 after resuming"] = [batch["key"].tolist() for batch in fresh]
    return seen


def record_rank(rank: int, port: int, folder: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    seen = {
        f"{drop_last} {workers}": record(BATCH, drop_last, workers)
        for drop_last, workers in ((True, 0), (True, 2), (False, 0))
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def fresh_accelerate_state() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Keys]]]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(record_rank, (port, str(folder)), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_sampler_yields_epoch_and_index() -> None:
    sampler = KeyedSampler(10, seed=4)
    sampler.set_epoch(6)
    keys = list(sampler)
    assert len(sampler) == len(keys) == 10
    assert [epoch for epoch, _ in keys] == [6] * 10
    assert [index for _, index in keys] == keyed_permutation(4, 6, 10).tolist()
    started = iter(sampler)
    sampler.set_epoch(7)
    assert list(started) == keys
    assert list(sampler) != keys
    ordered = KeyedSampler(3, shuffle=False)
    assert list(ordered) == [(0, 0), (0, 1), (0, 2)]


def test_draws_dataset_yields_keys_alone() -> None:
    loader = DataLoader(DrawsDataset(5), 2, sampler=KeyedSampler(5, shuffle=False), collate_fn=collate)
    made = list(loader)
    assert [batch.keys() for batch in made] == [{"key"}] * 3
    assert made[1]["key"].tolist() == [[0, 2], [0, 3]]
    epoch, index = made[1]["key"].unbind(1)
    assert torch.equal(keyed_uniform(0, epoch, index, 0, 2), keyed_uniform(0, 0, torch.tensor([2, 3]), 0, 2))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [True, False])
def test_one_process(drop_last: bool, workers: int) -> None:
    seen = record(BATCH, drop_last, workers)
    for epoch in range(3):
        keys = [[epoch, index] for index in keyed_permutation(3, epoch, LENGTH).tolist()]
        whole = [keys[start : start + BATCH] for start in range(0, LENGTH, BATCH)]
        assert seen[f"epoch {epoch}"] == (whole[:-1] if drop_last else whole)
    assert seen["resumed epoch 1"] == seen["epoch 1"][SKIPPED:]
    assert seen["epoch 2 after resuming"] == seen["epoch 2"]


def test_two_processes_join_to_one(two_ranks: list[dict[str, dict[str, Keys]]]) -> None:
    one = record(2 * BATCH, True, 0)
    for epoch in range(3):
        for workers in (0, 2):
            parts = [rank[f"True {workers}"][f"epoch {epoch}"] for rank in two_ranks]
            assert len(parts[0]) == len(parts[1]) == LENGTH // (2 * BATCH)
            assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(x) for x in one[f"epoch {epoch}"]]


def test_two_processes_resume_in_the_middle_of_an_epoch(two_ranks: list[dict[str, dict[str, Keys]]]) -> None:
    for rank in two_ranks:
        for seen in rank.values():
            assert seen["resumed epoch 1"] == seen["epoch 1"][SKIPPED:]
            assert seen["epoch 2 after resuming"] == seen["epoch 2"]


def test_two_processes_with_even_batches_see_every_sample(two_ranks: list[dict[str, dict[str, Keys]]]) -> None:
    for epoch in range(3):
        parts = [rank["False 0"][f"epoch {epoch}"] for rank in two_ranks]
        assert len(parts[0]) == len(parts[1])
        assert all(len(batch) == BATCH for part in parts for batch in part)
        keys = {tuple(key) for part in parts for batch in part for key in batch}
        assert keys == {(epoch, index) for index in range(LENGTH)}
