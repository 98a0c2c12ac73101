import json
import re
from pathlib import Path

import pytest
from PIL import Image

from hfkd.errors import RunError
from hfkd.scripts import demo_generator_from_classifier as demos
from hfkd.scripts.cli import main
from hfkd.scripts.methods import find_method
from hfkd.scripts.options import resolved
from hfkd.scripts.train import repeats


@pytest.fixture
def short(monkeypatch):
    """Forty updates of each, and a generator that fits; the recipes' other settings stay."""
    original = demos.read_yaml
    quick = {"max_steps": 40, "hidden_sizes": [16, 16], "logging_steps": 10}
    of = {"generator_from_classifier": {**quick, "hidden_sizes": [16, 16, 64], "per_device_eval_batch_size": 64}}
    monkeypatch.setattr(demos, "read_yaml", lambda path: {**original(path), **of.get(path.parent.name, quick)})
    monkeypatch.setattr(demos, "IMAGES", 40)


def test_demo_trains_measures_reloads_and_may_be_repeated(short, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "generator-from-classifier"]) == 0
    out = capsys.readouterr().out
    folder = Path("hfkd-demo/generator-from-classifier")
    assert "40 generated digits" in out and "try next:" in out
    header = next(line for line in out.splitlines() if "held-out images" in line)
    assert header.split() == ["generator", "held-out", "images", "noise", "training", "images"]
    row = next(line for line in out.splitlines() if line.startswith("sqrt stationarity"))
    assert all(0 <= float(value) < 1.01 for value in row.split()[2:]) and len(row.split()) == 6
    assert next(line for line in out.splitlines() if line.startswith("judge accuracy")).split()[-1] == "-"
    assert f"a new process loaded the generator from {folder} and drew a 7 of 1 x 8 x 8 values" in out
    facts = json.loads((folder / "classifier/config.json").read_text())["training_facts"]
    assert facts["num_images"] == 100 and facts["weight_decay"] > 0
    for name in ("README.md", "config.json", "run.yaml", "samples.png", "classifier/README.md"):
        assert (folder / name).is_file(), name
    assert "## Beside real images" in (folder / "README.md").read_text()
    assert Image.open(folder / "nearest.png").size == (5 * 33 - 1, 10 * 33 - 1)
    assert re.search(r"done in \d+ s", out)

    # It may be run again: each of its runs replaces only what it would give once more.
    for name, own in ((demos.CLASSIFIER, folder / "classifier"), (demos.METHOD, folder)):
        options = demos._settings(name, own)
        if name == demos.METHOD:
            options["classifiers"] = [str(folder / "classifier")]
        assert repeats(own, resolved(find_method(name).dataclasses(), options)), name


def test_demo_leaves_another_run_alone(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    assert main(["demo", "generator-from-classifier", "--output_dir", str(tmp_path)]) == 2
    assert f"output_dir={tmp_path} holds the students of another run" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_a_generator_that_does_not_load_fails_the_demo(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RunError, match="the saved generator could not be loaded in a new process"):
        demos._reload(tmp_path)
