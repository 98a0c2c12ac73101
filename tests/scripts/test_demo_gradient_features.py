import json
import re
from pathlib import Path

import pytest

from hfkd.scripts import demo_gradient_features
from hfkd.scripts.cli import main
from hfkd.scripts.methods import find_method
from hfkd.scripts.options import resolved
from hfkd.scripts.train import repeats


@pytest.fixture
def short(monkeypatch):
    original = demo_gradient_features.read_yaml
    monkeypatch.setattr(demo_gradient_features, "read_yaml", lambda path: {**original(path), "num_train_epochs": 1})
    monkeypatch.setitem(demo_gradient_features.BASE, "num_train_epochs", 1)


def test_demo_trains_compares_reloads_and_may_be_repeated(short, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "gradient-features"]) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "hfkd-demo/gradient-features"
    assert "accuracy on 997 test digits" in out and "never saw a 5, 6, 7, 8 or 9" in out
    for name in demo_gradient_features.MODES.values():
        assert re.search(rf"{re.escape(name)} .* ± ", out), name
    verdicts = out[out.index("in words") :].splitlines()[1:4]
    assert all("classifier on both" in line for line in verdicts)
    assert re.search(r"a new process loaded the full model from hfkd-demo/gradient-features and read a \d as \d", out)
    assert "try next:" in out
    result = json.loads((folder / "test_results.json").read_text())
    assert (result["n_train"], result["n_test"]) == (200, 997)
    printed = re.search(r"linear classifier on both .*?([\d.]+) ±", out).group(1)
    assert float(printed) == pytest.approx(100 * result["metrics"]["accuracy"], abs=0.006)
    base = json.loads((folder / "base/config.json").read_text())
    assert len(base["id2label"]) == 5
    for name in ("README.md", "run.yaml", "activation/config.json", "gradient/config.json", "finetune/config.json"):
        assert (folder / name).is_file(), name

    # It may be run again: each of its runs replaces only what it would give once more.
    method = find_method("gradient-features")
    for mode, options in demo_gradient_features._settings(method, folder.relative_to(tmp_path)).items():
        assert repeats(Path(options["output_dir"]), resolved(method.dataclasses(), options)), mode


def test_demo_leaves_the_students_of_another_run_alone(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    assert main(["demo", "gradient-features", "--output_dir", str(tmp_path)]) == 2
    assert f"output_dir={tmp_path} holds the students of another run" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
