"""The benchmark of the cached teacher, on networks small enough for a test: what it compares is what it says."""

import gc

import pytest
import torch

from hfkd.models import HfkdResNetConfig, HfkdResNetForImageClassification
from hfkd.scripts import benchmark_distillation
from hfkd.scripts.benchmark_distillation import Step, benchmark, epochs


def tiny_network(preset):
    depths = {"resnet56": [1, 2], "resnet20": [1, 1]}[preset]
    torch.manual_seed(len(depths))
    return HfkdResNetForImageClassification(HfkdResNetConfig(depths=depths, hidden_sizes=[4, 8], num_labels=10))


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(benchmark_distillation, "BATCH", 4)
    monkeypatch.setattr(benchmark_distillation, "EPOCH", 2)
    monkeypatch.setattr(benchmark_distillation, "network", tiny_network)
    monkeypatch.setattr(benchmark_distillation, "keep_freed_memory", lambda: None)
    # Garbage is collected between rounds; past all imports that takes longer than these rounds.
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_a_row_for_each_precision():
    rows = benchmark(1)
    assert [row.what.rpartition(", ")[0] for row in rows] == [
        "epoch with a live teacher / with a cached one, resnet56 -> resnet20",
        "epoch with a live teacher / with a cached one, resnet56 -> resnet20, bf16",
    ]
    assert all(row.value > 0 and row.to_reach == 1.5 and row.at_least for row in rows)


def test_both_epochs_teach_the_same_and_one_alone_runs_the_teacher(monkeypatch):
    taught, runs = [], []
    take, teach = Step.take, Step.teacher_logits
    monkeypatch.setattr(Step, "take", lambda self, *given: (taught.append(given[2]), take(self, *given)))
    monkeypatch.setattr(Step, "teacher_logits", lambda self, images: (runs.append(1), teach(self, images))[1])
    epochs(1)

    # Filling runs it once over all images; then three rounds of warm-up and one that counts, of two batches each.
    assert len(runs) == 1 + 4 * 2
    assert len(taught) == 2 * 4 * 2
    distinct = torch.stack([taught[0], taught[1]])
    for k in range(0, len(taught), 2):
        torch.testing.assert_close(torch.stack(taught[k : k + 2]), distinct, rtol=1e-5, atol=1e-6)
