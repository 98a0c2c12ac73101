"""The benchmark of GBC, on networks small enough for a test: what it compares is what it says."""

import csv
import gc

import pytest
import torch

from hfkd.scripts import benchmark_generator_from_classifier as benchmarks
from hfkd.scripts.cli import main
from hfkd.trainers.convergence import ConvergenceConditions


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(benchmarks, "SIZE", 8)
    monkeypatch.setattr(benchmarks, "BATCH", 20)
    monkeypatch.setattr(benchmarks, "HIDDEN", (12, 12))
    monkeypatch.setattr(benchmarks, "keep_freed_memory", lambda: None)
    # Garbage is collected between rounds; past all imports that takes longer than these rounds.
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_command_writes_a_row_for_each_comparison(tmp_path, capsys):
    words = ["benchmark", "generator-from-classifier", "--repeats", "2", "--output", str(tmp_path / "speed.csv")]
    assert main(words) == 0
    with open(tmp_path / "speed.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["to_reach"] for row in rows] == ["<= 4", ">= 15", "<= 1.05"]
    assert all(float(row["value"]) > 0 for row in rows)
    assert float(rows[1]["value"]) > 2  # twenty passes against one
    assert "loop over the images / one weighted backward pass" in capsys.readouterr().out


def test_the_loop_over_images_gives_the_same_gradient():
    """In double precision, so that only a mistake could tell them apart."""
    found = []
    for kind in (benchmarks.PerImage, ConvergenceConditions):
        case = benchmarks.ImagesAlone(kind)
        case.conditions.double()
        case.images = case.images.double()
        found.append(case.gradient())
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("plain", [False, True])
def test_the_bare_loop_trains_the_generator_alone(tmp_path, plain):
    loop = benchmarks.BareLoop(benchmarks.settings_in(str(tmp_path)), plain=plain)
    classifier, before = loop.conditions.fingerprint(), [parameter.clone() for parameter in loop.trained]
    loop.step()
    assert loop.conditions.fingerprint() == classifier
    assert all(not torch.equal(old, new) for old, new in zip(before, loop.trained, strict=True))
