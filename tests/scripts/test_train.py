"""`hfkd train`, `hfkd evaluate` and `hfkd push` on a tiny run, through the command."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from hfkd.scripts.cli import main
from hfkd.scripts.results import read_csv
from hfkd.scripts.study import COLUMNS


FAST = [
    "--max_steps",
    "4",
    "--max_train_samples",
    "64",
    "--per_device_train_batch_size",
    "16",
    "--eval_strategy",
    "no",
]


def hfkd(capsys, *argv: str) -> tuple[int, str, str]:
    code = main([str(argument) for argument in argv])
    out, error = capsys.readouterr()
    return code, out, error.strip().rpartition("\n")[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("train") / "run"
    argv = ["train", "online_adversarial", *FAST, "--save_strategy", "steps", "--save_steps", "2"]
    assert main([*argv, "--output_dir", str(folder), "--seed", "3"]) == 0
    return folder


def test_a_finished_run_leaves_weights_options_and_results(finished):
    result = json.loads((finished / "test_results.json").read_text())
    assert result["n_train"] == 64
    assert result["n_test"] == 359
    assert result["wall_s"] > 0
    assert {"student_0_accuracy", "student_1_top5", "ensemble_accuracy"} <= result["metrics"].keys()
    assert not any(name.startswith("test_") or "per_second" in name for name in result["metrics"])
    for name in ("config.json", "model.safetensors", "student_1/model.safetensors", "README.md", "run.yaml"):
        assert (finished / name).is_file(), name


def test_run_file_repeats_the_run_to_the_bit(finished, tmp_path, capsys):
    code, out, _ = hfkd(
        capsys, "train", "online-adversarial", "--config", finished / "run.yaml", "--output_dir", tmp_path / "again"
    )
    assert code == 0
    assert "accuracy on 359 test images" in out
    for name in ("model.safetensors", "student_1/model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes()


def test_only_a_run_of_the_same_options_may_replace_a_finished_one(tmp_path, capsys):
    """Without checkpoints, students are all that is left of a run."""
    folder = tmp_path / "run"
    argv = ["train", "online-adversarial", *FAST, "--save_strategy", "no", "--output_dir", folder]
    assert hfkd(capsys, *argv)[0] == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, _, error = hfkd(capsys, *argv, "--seed", "4")
    assert code == 2
    assert f"output_dir={folder} holds the students of another run" in error
    assert error.endswith("choose another folder, or move them away")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    code = main([str(part) for part in argv])
    assert code == 0
    assert f"hfkd: note: this run replaces its own earlier result in {folder}\n" in capsys.readouterr().err
    assert (folder / "model.safetensors").read_bytes() == before[folder / "model.safetensors"]


def test_a_run_that_is_refused_replaces_nothing(finished, capsys):
    """Its own earlier result lies there, and so do that run's checkpoints."""
    code, _, error = hfkd(
        capsys, "train", "online-adversarial", "--config", finished / "run.yaml", "--output_dir", finished
    )
    assert code == 2
    assert "--resume_from_checkpoint true" in error and "replaces" not in error


def test_resume_goes_on_to_the_same_bits(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished / "checkpoint-2", folder / "checkpoint-2")
    argv = ["train", "online-adversarial", "--config", finished / "run.yaml", "--output_dir", folder]
    code, _, error = hfkd(capsys, *argv)
    assert code == 2
    assert "--resume_from_checkpoint true" in error
    assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]
    code, _, error = hfkd(capsys, *argv, "--resume_from_checkpoint", "true")
    assert code == 0, error
    assert json.loads((folder / "test_results.json").read_text())["wall_s"] is None
    assert (folder / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_evaluate_measures_what_training_measured(finished, tmp_path, capsys):
    code, out, error = hfkd(capsys, "evaluate", finished, "--output", tmp_path / "result.json")
    assert code == 0, error
    result = json.loads((tmp_path / "result.json").read_text())
    trained = json.loads((finished / "test_results.json").read_text())["metrics"]
    assert result["n_test"] == 359
    assert result["metrics"] == {name: pytest.approx(trained[name]) for name in result["metrics"]}
    assert set(result["metrics"]) == {name for name in trained if "accuracy" in name or "top5" in name} - {
        "discriminator_0_accuracy",
        "discriminator_1_accuracy",
    }
    assert "student 0" in out
    assert "±" in out


@pytest.mark.parametrize(("protocol", "setting"), [("knn", "neighbours"), ("linear-probe", "max_iter")])
def test_probes_of_frozen_features(finished, tmp_path, capsys, protocol, setting):
    code, out, error = hfkd(
        capsys,
        "evaluate",
        finished,
        "--protocol",
        protocol,
        "--output",
        tmp_path / "result.json",
        "--batch_size",
        "100",
    )
    assert code == 0, error
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["metrics"]) == {"student_0_accuracy", "student_1_accuracy"}
    assert min(result["metrics"].values()) > 0.3  # even barely trained features beat chance
    assert setting in result["settings"]
    assert setting in out


def test_a_study_through_the_command(tmp_path, capsys):
    """Two real runs in processes of their own; then one of them once more, as if killed before its results."""
    file = tmp_path / "tiny.yaml"
    settings = {"max_steps": 2, "max_train_samples": 32, "per_device_train_batch_size": 16, "eval_strategy": "no"}
    settings["save_strategy"] = "no"
    file.write_text(
        yaml.safe_dump(
            {
                "method": "online-adversarial",
                "settings": settings,
                "arms": {"vanilla": {"kl_weight": 0, "feature_loss": "none"}, "afd": {}},
                "seeds": [0],
            }
        )
    )
    code, out, error = hfkd(capsys, "study", file, "--output_dir", tmp_path / "out")
    assert code == 0, error
    rows = read_csv(tmp_path / "out" / "results.csv", COLUMNS)
    assert {(row["arm"], row["n_train"], row["n_test"]) for row in rows} == {
        ("vanilla", "32", "359"),
        ("afd", "32", "359"),
    }
    assert "| afd | 1 |" in out
    assert (tmp_path / "out" / "figure.png").is_file()
    (tmp_path / "out" / "results.csv").unlink()
    (tmp_path / "out" / "runs" / "afd" / "seed_0" / "test_results.json").unlink()
    code, _, error = hfkd(capsys, "study", file, "--output_dir", tmp_path / "out")
    assert code == 0, error

    def values(rows):
        return [(row["arm"], row["metric"], row["value"]) for row in rows]

    assert values(read_csv(tmp_path / "out" / "results.csv", COLUMNS)) == values(rows)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train"], "needs a method first"),
        (["train", "online-adversarail"], "did you mean 'online-adversarial'"),
        (["train", "online-adversarial", "--studnets", "resnet8"], "did you mean '--students'"),
        (["train", "online-adversarial", "--students", "resnet8"], "1 student(s)"),
        (["train", "online-adversarial", "--students", "resnet9", "resnet8"], "'resnet9' is no preset"),
        (["train", "online-adversarial", "--teacher", "resnet8"], "preset with fresh weights"),
        (["train", "online-adversarial", "--dataset_name", "./nowhere"], "not a folder"),
        (["train", "online-adversarial", "--temperature", "0"], "temperature=0.0"),
        (["train", "online-adversarial", "--config", "nowhere.yaml"], "neither a file nor a shipped recipe"),
        (["evaluate"], "needs a checkpoint first"),
        (["evaluate", "./nowhere"], "'./nowhere' is not a folder"),
        (["evaluate", "."], "cannot be loaded"),
        (["evaluate", ".", "--protocol", "generations"], "invalid choice: 'generations'"),
        (["evaluate", ".", "--protocol", "generation"], "generator '.' cannot be loaded"),
        (["push", "./nowhere", "me/x"], "holds no config.json"),
        (["push", "."], "the following arguments are required: repo_id"),
        (["study", "nowhere.yaml"], "cannot be read"),
        (["benchmark", "afd"], "unknown method 'afd'"),
        (["demo", "afd"], "unknown method 'afd'"),
        (["env", "--verbose"], "unrecognized arguments: --verbose"),
    ],
)
def test_bad_input_ends_with_2_and_one_line(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    code, _, error = hfkd(capsys, *argv)
    assert code == 2
    assert error.startswith("hfkd: error: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []
