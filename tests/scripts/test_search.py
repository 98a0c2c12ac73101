"""`hfkd search`: trials of a tiny generator from a tiny classifier, whatever stops them."""

import json
import signal
import sys

import pytest
import yaml
from classifier_runs import processor, tiny_mlp

from hfkd.errors import InputError, RunError
from hfkd.scripts import search as searches
from hfkd.scripts.cli import main
from hfkd.scripts.methods import find_method
from hfkd.scripts.options import read_yaml
from hfkd.scripts.search_space import describe, read_space
from hfkd.trainers.interrupt import TrainingInterrupted


METHOD = find_method("generator-from-classifier")
SPACE = "learning_rate: {low: 1e-4, high: 0.01, log: true}\nper_device_train_batch_size: {choices: [12, 16]}\n"
QUICK = ["--max_steps", "2", "--warmup_updates", "0", "--latent_size", "4", "--hidden_sizes", "8", "8", "32"]
QUICK += ["--per_device_eval_batch_size", "16", "--save_strategy", "no", "--use_cpu", "true"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    tiny_mlp().save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


def run(classifier, folder, trials, *options, space=SPACE):
    path = folder.parent / "space.yaml"
    path.write_text(space)
    words = ["search", METHOD.name, "--trials", trials, "--space", path, "--output_dir", folder, *QUICK, *options]
    return main([*map(str, words), "--classifiers", str(classifier)])


def drawn(folder, number):
    """The searched options of a trial, by the run's own file."""
    options = read_yaml(folder / f"trial_{number}" / "run.yaml")
    return {name: options[name] for name in ("learning_rate", "per_device_train_batch_size")}


def loss(folder, number):
    return json.loads((folder / f"trial_{number}" / "test_results.json").read_text())["metrics"]["loss"]


def interfere(monkeypatch, numbers, error):
    """Let `train` raise in these trials; gives the list of the trials that were asked for."""
    real, asked = searches.train, []

    def train(method, values, show_logs):
        asked.append(int(values["output_dir"].rpartition("_")[2]))
        if asked[-1] in numbers:
            raise error
        return real(method, values, show_logs=show_logs)

    monkeypatch.setattr(searches, "train", train)
    return asked


@pytest.fixture(scope="module")
def searched(classifier, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "search"
    assert run(classifier, folder, 3) == 0
    return folder


def test_the_best_trial_is_the_one_with_the_least_loss(searched):
    best = yaml.safe_load((searched / "best.yaml").read_text())
    number = min(range(3), key=lambda trial: loss(searched, trial))
    assert best == read_yaml(searched / f"trial_{number}" / "run.yaml")
    assert (searched / "best.yaml").read_text().startswith(f"# hfkd train {METHOD.name} --config best.yaml ")
    found = [drawn(searched, trial) for trial in range(3)]
    assert len({one["learning_rate"] for one in found}) == 3
    assert all(1e-4 <= one["learning_rate"] <= 0.01 for one in found)
    assert all(one["per_device_train_batch_size"] in (12, 16) for one in found)


def test_a_stopped_search_goes_on_as_if_it_had_not_been(classifier, searched, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "search"
    with monkeypatch.context() as patch:
        interfere(patch, [1], TrainingInterrupted(signal.SIGTERM, "checkpoint-1"))
        assert run(classifier, folder, 3) == 128 + signal.SIGTERM
    asked = interfere(monkeypatch, [], None)
    assert run(classifier, folder, 3) == 0
    assert asked == [1, 2]
    assert [drawn(folder, number) for number in range(3)] == [drawn(searched, number) for number in range(3)]
    assert [loss(folder, number) for number in range(3)] == [loss(searched, number) for number in range(3)]
    assert "best of 3 trials: number" in capsys.readouterr().out
    assert run(classifier, folder, 3) == 0 and asked == [1, 2]  # nothing is left to do


def test_a_trial_that_fails_is_told_and_left_behind(classifier, tmp_path, monkeypatch, capsys):
    interfere(monkeypatch, [0], RunError("the loss is nan"))
    assert run(classifier, tmp_path / "search", 2) == 0
    out = capsys.readouterr().out
    assert "trial 0 with learning_rate=" in out and "failed: the loss is nan" in out
    assert "best of 1 trials: number 1" in out


def test_no_trial_that_succeeds(classifier, tmp_path, monkeypatch, capsys):
    interfere(monkeypatch, [0, 1], RunError("the loss is nan"))
    assert run(classifier, tmp_path / "search", 2) == 1
    assert "all 2 trials failed" in capsys.readouterr().err


def test_another_search_in_the_same_folder(classifier, searched, capsys):
    assert run(classifier, searched, 3, "--seed", "5") == 2
    assert "holds a search whose options have seed=None, and now it is 5" in capsys.readouterr().err
    assert run(classifier, searched, 3, space=SPACE.replace("0.01", "0.02")) == 2
    assert "holds a search whose space have learning_rate=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["online-adversarial"], "online-adversarial has no criterion without data"),
        ([], "hfkd search needs a method first: generator-from-classifier"),
        ([METHOD.name, "--push_to_hub", "true"], "push_to_hub is set by the search itself"),
        ([METHOD.name, "--trials", "0"], "trials=0 is out of range"),
    ],
)
def test_what_cannot_be_searched(words, message, capsys):
    assert main(["search", *words]) == 2
    assert message in capsys.readouterr().err


def test_without_optuna(classifier, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert run(classifier, tmp_path / "search", 1) == 2
    assert "pip install 'hfkd[search]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "nothing to search"),
        ("learning_rat: {low: 0.1, high: 1}", "did you mean 'learning_rate'"),
        ("learning_rate: 0.1", "learning_rate: 0.1 needs low and high"),
        ("learning_rate: {lo: 0.1, high: 1}", "did you mean 'low'"),
        ("learning_rate: {low: 1, high: 0.1}", "low=1.0, high=0.1 is no range"),
        ("learning_rate: {low: 0, high: 0.1, log: true}", "is no range of logarithms"),
        ("learning_rate: {low: -1, high: 0.1}", "learning_rate=-1.0 is out of range"),
        ("duality: {low: symmetric, high: walls}", "is not a range of numbers"),
        ("duality: {choices: [symmetric, wall]}", "'wall' is not one of"),
        ("duality: {choices: []}", "choices=[] is not a list"),
        ("max_steps: {choices: [5, 0]}", "max_steps=0: a run without data"),
    ],
)
def test_a_space_that_is_none(text, message, tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_space(path, METHOD, {})
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_the_default_space():
    space = read_space(searches.SPACES / f"{METHOD.stem}.yaml", METHOD, {})
    assert space["learning_rate"] == {"low": 3e-4, "high": 5e-3, "log": True}
    assert space["per_device_train_batch_size"] == {"choices": [128, 256, 512, 1024]}
    assert {"total_variation_weight", "stationarity_weight"} < set(space)
    assert describe({"learning_rate": 0.00123456, "max_steps": 5}) == "learning_rate=0.00123, max_steps=5"
