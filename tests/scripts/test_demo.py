import json
import re

import pytest

from hfkd.errors import RunError
from hfkd.scripts import demo_online_adversarial
from hfkd.scripts.cli import main
from hfkd.scripts.demo_parts import reload


@pytest.fixture
def short(monkeypatch):
    original = demo_online_adversarial.read_yaml
    monkeypatch.setattr(demo_online_adversarial, "read_yaml", lambda path: {**original(path), "num_train_epochs": 2})


def test_demo_trains_compares_reloads_and_says_where_everything_lies(short, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "accuracy on 1,597 test digits" in out
    for name in ("student 0, with its peer", "ensemble of the pair", "student 1, alone", "two that learned alone"):
        assert re.search(rf"{name}.* ± ", out), name
    verdict = next(line for line in out.splitlines() if "the first student with its peer" in line)
    assert "the same student alone" in verdict
    assert "at 95 % confidence" in verdict or "level" in verdict
    assert re.search(r"a new process loaded student 0 from hfkd-demo/online-adversarial and read a \d as \d", out)
    assert "try next:" in out
    result = json.loads((tmp_path / "hfkd-demo/online-adversarial/test_results.json").read_text())
    assert (result["n_train"], result["n_test"]) == (200, 1597)
    printed = re.search(r"student 0, with its peer\s+([\d.]+)", out).group(1)
    assert float(printed) == pytest.approx(100 * result["metrics"]["student_0_accuracy"], abs=0.006)
    for name in ("README.md", "config.json", "student_1/config.json", "run.yaml", "alone/config.json"):
        assert (tmp_path / "hfkd-demo/online-adversarial" / name).is_file(), name


def test_demo_can_be_repeated_in_the_same_folder(short, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo_online_adversarial, "reload", lambda folder: "")  # tried above
    for _ in range(2):
        assert main(["demo", "online-adversarial", "--output_dir", str(tmp_path / "demo")]) == 0


def test_demo_leaves_the_students_of_another_run_alone(short, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    (tmp_path / "run.yaml").write_text("seed: 7\n")
    assert main(["demo", "--output_dir", str(tmp_path)]) == 2
    assert f"output_dir={tmp_path} holds the students of another run" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "run.yaml"}
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"


def test_a_student_that_does_not_load_fails_the_demo(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RunError, match="could not be loaded in a new process"):
        reload(tmp_path)
