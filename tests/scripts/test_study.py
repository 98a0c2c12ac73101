import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from hfkd.errors import InputError, RunError
from hfkd.scripts import study as study_module
from hfkd.scripts.results import COLUMNS, exclusive, read_csv
from hfkd.scripts.study import run_study
from hfkd.scripts.study_file import read_study
from hfkd.scripts.study_processes import Processes, cuda_devices


STUDY = {
    "name": "toy",
    "method": "online-adversarial",
    "settings": {"num_train_epochs": 1, "eval_strategy": "no", "validation_size": 0},
    "arms": {"vanilla": {"kl_weight": 0, "feature_loss": "none"}, "logit-only": {"feature_loss": "none"}, "afd": {}},
    "seeds": [0, 1],
    "reference": "vanilla",
}


def write(folder: Path, **changes) -> Path:
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False), encoding="utf-8")
    return path


class Runner:
    """Finishes each run at once with made-up accuracies, and keeps what it was asked for."""

    def __init__(self, fail_at: int | None = None, error: BaseException | None = None):
        self.runs, self.fail_at, self.error = [], fail_at, error

    def __call__(self, command, item, folder, lock):
        if len(self.runs) == self.fail_at:
            self.fail_at = None
            raise self.error
        self.runs.append(item)
        assert command[:3] == ["train", "online-adversarial", "--config"]
        accuracy = 0.8 + 0.01 * list(STUDY["arms"]).index(item.arm) + 0.001 * item.seed
        metrics = {"mean_accuracy": accuracy, "ensemble_accuracy": accuracy + 0.02, "maps_0_1_l1": 0.5}
        result = {"metrics": metrics, "n_train": 200, "n_test": 1597, "wall_s": 1.25}
        (folder / "test_results.json").write_text(json.dumps(result), encoding="utf-8")


def test_arms_of_a_seed_share_seed_and_data_seed(tmp_path):
    runs = list(read_study(write(tmp_path)).runs())
    assert [(run.arm, run.seed) for run in runs[:4]] == [
        ("vanilla", 0),
        ("logit-only", 0),
        ("afd", 0),
        ("vanilla", 1),
    ]
    assert all(run.settings["seed"] == run.settings["data_seed"] == run.seed for run in runs)
    assert runs[0].settings["feature_loss"] == "none"
    assert runs[2].settings["num_train_epochs"] == 1.0


def test_the_data_is_called_the_same_where_its_folder_is_not(tmp_path, monkeypatch):
    """A results file is read on other machines, and in clones without the data."""
    path = write(tmp_path, settings={**STUDY["settings"], "dataset_name": "data/cifar10"})
    monkeypatch.chdir(tmp_path)
    without = read_study(path).dataset
    (tmp_path / "data" / "cifar10").mkdir(parents=True)
    assert without == read_study(path).dataset == "cifar10"
    assert read_study(write(tmp_path, settings={"dataset_name": "uoft-cs/cifar10"})).dataset == "cifar10"


def test_rows_of_every_finished_run(tmp_path):
    study, results = read_study(write(tmp_path)), tmp_path / "out" / "results.csv"
    run_study(study, tmp_path / "out", results, Runner())
    rows = read_csv(results, COLUMNS)
    assert len(rows) == 3 * 2 * 3
    first = rows[0]
    assert tuple(first) == COLUMNS
    assert {key: first[key] for key in COLUMNS[:9]} == {
        "recipe": "toy",
        "arm": "vanilla",
        "dataset": "digits",
        "n_train": "200",
        "n_test": "1597",
        "seed": "0",
        "metric": "mean_accuracy",
        "value": "0.8",
        "wall_s": "1.2",
    }
    assert "torch" in first["versions"]
    assert first["hardware"]


def test_a_stopped_study_goes_on_and_no_row_comes_twice(tmp_path):
    study, out, results = read_study(write(tmp_path)), tmp_path / "out", tmp_path / "results.csv"
    stopped = Runner(fail_at=4, error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_study(study, out, results, stopped)
    assert len(read_csv(results, COLUMNS)) == 4 * 3
    rest = Runner()
    run_study(study, out, results, rest)
    assert [(run.arm, run.seed) for run in rest.runs] == [("logit-only", 1), ("afd", 1)]
    before = results.read_bytes()
    run_study(study, out, results, Runner(fail_at=0, error=AssertionError("nothing is left to run")))
    assert results.read_bytes() == before


def test_a_run_that_finished_just_before_the_kill_is_not_run_again(tmp_path, monkeypatch):
    study, out, results = read_study(write(tmp_path)), tmp_path / "out", tmp_path / "results.csv"

    def killed(*arguments, **keywords):
        raise SystemExit(143)

    with monkeypatch.context() as context:
        context.setattr(study_module, "append_csv", killed)
        with pytest.raises(SystemExit):
            run_study(study, out, results, Runner())
    rest = Runner()
    run_study(study, out, results, rest)
    assert len(rest.runs) == 5
    assert len(read_csv(results, COLUMNS)) == 18


def test_other_runs_finish_after_one_fails(tmp_path, capsys):
    study, results = read_study(write(tmp_path)), tmp_path / "results.csv"
    with pytest.raises(RunError, match="1 of 6 runs failed, the first: the loss is not finite"):
        run_study(study, tmp_path / "out", results, Runner(1, RunError("the loss is not finite")))
    assert len(read_csv(results, COLUMNS)) == 5 * 3
    out = capsys.readouterr().out
    assert "[2/6] logit-only, seed 0 failed" in out
    assert "[6/6] afd, seed 1: mean_accuracy 0.8210 in 1 s; 0 s left" in out


def test_changed_settings_are_refused(tmp_path):
    out, results = tmp_path / "out", tmp_path / "results.csv"
    run_study(read_study(write(tmp_path)), out, results, Runner())
    changed = {**STUDY["settings"], "learning_rate": 0.05}
    with pytest.raises(InputError, match="learning_rate=None, and the study now says 0.05: rename the arm"):
        run_study(read_study(write(tmp_path, settings=changed)), out, results, Runner())


def test_two_studies_in_one_folder_are_refused(tmp_path):
    study, out = read_study(write(tmp_path)), tmp_path / "out"
    (out / "runs").mkdir(parents=True)
    with exclusive(out / "runs"), pytest.raises(RunError, match="another process"):
        run_study(study, out, tmp_path / "results.csv", Runner())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arm": {}}, "unknown key 'arm' .did you mean 'arms'"),
        ({"method": "online-adversarail"}, "did you mean 'online-adversarial'"),
        ({"arms": {}}, "'arms' is missing or empty"),
        ({"arms": {"a": {"kl_wieght": 0}}, "reference": "a"}, "arm 'a': unknown option 'kl_wieght'"),
        ({"arms": {"a": {"temperature": -1}}, "reference": "a"}, "arm 'a': temperature=-1.0 is out of range"),
        ({"arms": {"a": {"seed": 1}}, "reference": "a"}, "seed is set by the study itself"),
        ({"arms": {"../a": {}}, "reference": "../a"}, "arm '../a' names a folder"),
        ({"arms": {"a": 3}, "reference": "a"}, "a: 3 is not a mapping"),
        ({"seeds": 3}, "seeds: 3 is not a list"),
        ({"seeds": [0, 0]}, "names one twice"),
        ({"reference": "vanila"}, "reference 'vanila' is no arm .did you mean 'vanilla'"),
        ({"recipe": "nowhere"}, "recipe 'nowhere' is neither a file beside it nor shipped"),
    ],
)
def test_bad_study_files_are_refused_before_any_run(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        read_study(write(tmp_path, **changes))


def test_arms_go_over_settings_and_settings_over_the_recipe(tmp_path):
    (tmp_path / "base.yaml").write_text("temperature: 2\nmomentum: 0.5\nlearning_rate: 0.2\n")
    arms = {"a": {"learning_rate": 0.4}, "b": {}}
    path = write(
        tmp_path, recipe="base.yaml", settings={"momentum": 0.6, "learning_rate": 0.3}, arms=arms, reference="a"
    )
    study = read_study(path)
    assert [study.arms["a"].settings[name] for name in ("temperature", "momentum", "learning_rate")] == [2.0, 0.6, 0.4]
    assert study.arms["b"].settings["learning_rate"] == 0.3


CHILD = """
import sys, time
from pathlib import Path
from hfkd.scripts import study, study_processes

# In place of `hfkd train`: a child that notes its signal and takes a moment to save.
child = '''
import os, signal, sys, time
def save(signum, frame):
    time.sleep(0.2); open("saved" + device, "w").write(str(signum)); sys.exit(128 + signum)
signal.signal(signal.SIGTERM, save); signal.signal(signal.SIGINT, save)
device = os.environ["CUDA_VISIBLE_DEVICES"]
open("started" + device, "w").close(); time.sleep(30)
'''
study.cuda_devices = lambda: sys.argv[2].split(",")
original = study_processes.subprocess.Popen
study_processes.subprocess.Popen = lambda command, **keywords: original([sys.executable, "-c", child], **keywords)
from hfkd.scripts.cli import main
sys.exit(main(["study", sys.argv[1], "--output_dir", "out"]))
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("devices", ["4", "4,7"])
def test_a_signal_reaches_each_run_which_saves_before_the_study_ends(tmp_path, signum, devices):
    """One run by itself sees all devices, of several each sees its own."""
    write(tmp_path)
    names = devices.split(",")
    command = [sys.executable, "-c", CHILD, "toy.yaml", devices]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "4"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while (
        not all((tmp_path / f"started{name}").exists() for name in names)
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    if process.poll() is None:
        os.kill(process.pid, signum)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 128 + signum, error
    assert {file.name: file.read_text() for file in tmp_path.glob("saved*")} == {
        f"saved{name}": str(int(signum)) for name in names
    }
    assert not (tmp_path / "out" / "results.csv").exists()


def test_runs_are_spread_over_the_devices(tmp_path, monkeypatch, capsys):
    """Never two at a time on one, and every run is measured once."""
    study, results = read_study(write(tmp_path)), tmp_path / "results.csv"
    busy, most, finish = [], [], Runner()

    class Child:
        def __init__(self, command, env, **keywords):
            self.device = env["CUDA_VISIBLE_DEVICES"]
            assert self.device not in busy
            busy.append(self.device)
            most.append(len(busy))

        def wait(self):
            time.sleep(0.05)
            busy.remove(self.device)
            return 0

    monkeypatch.setattr("hfkd.scripts.study_processes.subprocess.Popen", Child)
    processes = Processes(["4", "7", "GPU-1"])

    def runner(command, item, folder, lock):
        processes(command, item, folder, lock)
        finish(command, item, folder, lock)

    run_study(study, tmp_path / "out", results, runner, processes.each)
    assert max(most) == 3
    assert {(row["arm"], row["seed"]) for row in read_csv(results, COLUMNS)} == {
        (run.arm, str(run.seed)) for run in study.runs()
    }
    assert "[6/6]" in capsys.readouterr().out


def test_bad_input_of_a_run_ends_the_study_when_the_others_are_done(tmp_path):
    study, results = read_study(write(tmp_path)), tmp_path / "results.csv"
    processes = Processes(["0", "1"])
    with pytest.raises(InputError, match="no such data"):
        run_study(study, tmp_path / "out", results, Runner(1, InputError("no such data")), processes.each)
    assert 3 <= len(read_csv(results, COLUMNS)) <= 5 * 3


@pytest.mark.parametrize(
    ("visible", "count", "names"),
    [(None, 2, ["0", "1"]), ("3,GPU-5", 2, ["3", "GPU-5"]), ("", 0, []), (None, 0, [])],
)
def test_devices_have_the_names_that_this_process_sees(monkeypatch, visible, count, names):
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert cuda_devices() == names
