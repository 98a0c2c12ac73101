import json
import re
from pathlib import Path

import pytest
from transformers import AutoModel

from hfkd.scripts import demo_squeeze_and_span as demos
from hfkd.scripts.cli import main
from hfkd.scripts.methods import find_method
from hfkd.scripts.options import resolved
from hfkd.scripts.train import repeats


@pytest.fixture
def short(monkeypatch):
    """A few updates of small networks; the recipes' other settings stay."""
    original = demos.read_yaml
    small = {
        "gan": {"num_train_epochs": 0.1, "width": 8, "latent_size": 5},
        "squeeze_and_span": {
            "num_train_epochs": 0.1,
            "per_device_train_batch_size": 40,
            "representation_size": 16,
            "squeeze_hidden_size": 16,
        },
    }
    monkeypatch.setattr(demos, "read_yaml", lambda path: {**original(path), **small[path.parent.name]})


def test_demo_trains_probes_reloads_and_may_be_repeated(short, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "squeeze-and-span"]) == 0
    captured = capsys.readouterr()
    out, folder = captured.out, Path("hfkd-demo/squeeze-and-span")
    assert "LOAD REPORT" not in captured.err
    assert "accuracy on 359 test digits" in out and "try next:" in out
    shown = {name: re.search(rf"{name} +([\d.]+) ± [\d.]+ % +([\d.]+) ± [\d.]+ %", out) for name in demos.PROBES}
    assert all(shown.values())
    verdict = out[out.index("in words") :].splitlines()[1]
    assert "the student" in verdict and "the same network untrained" in verdict
    assert re.search(rf"a new process loaded the probed student from {folder}/classifier and read a \d as \d", out)

    knn = [json.loads((folder / part / "test_results.json").read_text())["metrics"] for part in ("", "untrained")]
    for place, metrics in enumerate(knn, start=1):  # the trainer's own measure is the same
        assert float(shown["200 nearest neighbours"][place]) == pytest.approx(100 * metrics["knn_accuracy"], abs=0.3)
    card = (folder / "README.md").read_text()
    assert "Teacher: `teacher` (local; model.safetensors sha256" in card and "samples.png" in card
    assert "inverse_regularisation" in (folder / "classifier/README.md").read_text()
    assert AutoModel.from_pretrained(folder).config.model_type == "hfkd_resnet"
    for name in ("run.yaml", "samples.png", "teacher/samples.png", "teacher/discriminator/config.json"):
        assert (folder / name).is_file(), name

    # It may be run again: each of its runs replaces only what it would give once more.
    for method, settings in zip(("gan", demos.METHOD, demos.METHOD), demos._settings(folder), strict=True):
        options = resolved(find_method(method).dataclasses(), settings)
        assert repeats(Path(settings["output_dir"]), options), settings["output_dir"]


def test_demo_leaves_another_run_alone(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    assert main(["demo", "squeeze-and-span", "--output_dir", str(tmp_path)]) == 2
    assert f"output_dir={tmp_path} holds the students of another run" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
