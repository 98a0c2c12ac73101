"""The benchmark of squeeze-and-span, on networks small enough for a test: what it compares is what it says."""

import csv
import gc

import pytest
import torch

from hfkd.scripts import benchmark_squeeze_and_span as benchmarks
from hfkd.scripts.cli import main
from hfkd.trainers.squeeze_and_span import SqueezeAndSpanConfig, SqueezeAndSpanTrainer


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(benchmarks, "STUDENT", "resnet8")
    monkeypatch.setattr(benchmarks, "SIZE", 8)
    monkeypatch.setattr(benchmarks, "BATCH", 12)
    monkeypatch.setattr(benchmarks, "LATENTS", 4)
    monkeypatch.setattr(benchmarks, "HEADS", {"representation_size": 8, "squeeze_hidden_size": 8})
    monkeypatch.setattr(benchmarks, "keep_freed_memory", lambda: None)
    # Garbage is collected between rounds; past all imports that takes longer than these rounds.
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_command_writes_a_row_for_each_comparison(tmp_path, capsys):
    words = ["benchmark", "squeeze-and-span", "--repeats", "2", "--output", str(tmp_path / "speed.csv")]
    assert main(words) == 0
    with open(tmp_path / "speed.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["to_reach"] for row in rows] == ["<= 1.1", "", "<= 1.1", ""]
    assert len({row["what"] for row in rows}) == 4 and all(float(row["value"]) > 0 for row in rows)
    assert "its parts in bare PyTorch (generator, augmentation, three student passes" in capsys.readouterr().out


def config(folder, **settings):
    settings = {"per_device_train_batch_size": 12, "max_steps": 2, "use_cpu": True, **benchmarks.HEADS, **settings}
    return SqueezeAndSpanConfig(str(folder), save_strategy="no", disable_tqdm=True, **settings)


def test_the_parts_train_what_the_trainer_trains(tmp_path):
    source = benchmarks.random_images(12)
    trainer = SqueezeAndSpanTrainer(benchmarks.make_student(), benchmarks.make_generator(), config(tmp_path), source)
    parts = benchmarks.Parts(source.variant(views=2), config(tmp_path))
    own = [tuple(p.shape) for group in parts.optimizer.param_groups for p in group["params"]]
    theirs = [tuple(p.shape) for p in trainer.model.parameters() if p.requires_grad]
    assert sorted(own) == sorted(theirs)

    networks = [parts.student, parts.squeeze, parts.projector]
    before = [[parameter.clone() for parameter in network.parameters()] for network in networks]
    generator = {name: value.clone() for name, value in parts.generator.state_dict().items()}
    parts.step()
    for network, old in zip(networks, before, strict=True):
        assert any(not torch.equal(*pair) for pair in zip(network.parameters(), old, strict=True))
    assert all(torch.equal(value, generator[name]) for name, value in parts.generator.state_dict().items())


def test_a_pool_is_made_once(tmp_path, monkeypatch):
    made = []
    original = SqueezeAndSpanTrainer._draw_pool
    monkeypatch.setattr(
        SqueezeAndSpanTrainer, "_draw_pool", lambda self, epoch: made.append(int(epoch[0])) or original(self, epoch)
    )
    benchmarks.step_against_parts(3, bf16=False, pool=True)
    assert made == [0]
