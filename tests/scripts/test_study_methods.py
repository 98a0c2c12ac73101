"""`hfkd study` over methods, and the protocols that it measures finished runs by."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoModel

from hfkd.errors import InputError, RunError
from hfkd.models import HfkdBiganGeneratorConfig, HfkdBiganGeneratorModel
from hfkd.scripts.cli import main
from hfkd.scripts.methods import RECIPES
from hfkd.scripts.report import write_report
from hfkd.scripts.results import COLUMNS, read_csv
from hfkd.scripts.study import run_study
from hfkd.scripts.study_file import read_study
from hfkd.scripts.study_protocols import metrics_of


STUDIES = RECIPES.parent / "studies"
STUDY = {
    "name": "toy",
    "method": "vicreg",
    "recipe": "digits",
    "settings": {"per_device_train_batch_size": 50},
    "arms": {
        "vicreg": {},
        "simsiam": {"method": "simsiam", "predictor_hidden_size": 32},
        "cohort": {"method": "online-adversarial", "recipe": None, "seeds": [1]},
        "random": {"num_train_epochs": 0},
    },
    "seeds": [0, 1],
    "protocols": ["knn", "linear-probe"],
    "protocol_settings": {"max_train_samples": 90, "knn_neighbours": 5},
    "metrics": ["linear_probe_accuracy", "knn_accuracy"],
}


def write(folder, **changes):
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False), encoding="utf-8")
    return path


class Runner:
    """Leaves what `hfkd train` and `hfkd evaluate` leave, with made-up numbers; fails at protocols of `broken`."""

    def __init__(self, broken=()):
        self.commands, self.broken = [], broken

    def __call__(self, command, item, folder, lock):
        options = dict(zip(command[2::2], command[3::2], strict=True))
        settings = yaml.safe_load(Path(options["--config"]).read_text())
        asked = [command[1], settings["seed"]] if command[0] == "train" else [options["--protocol"], settings]
        self.commands.append((item.arm, *asked))
        if command[0] == "train":
            metrics = {"knn_accuracy": 0.5, "representation_rank": 3.0}
            result = {"metrics": metrics, "n_train": 1438, "n_test": 359, "wall_s": 2.0}
            (folder / "test_results.json").write_text(json.dumps(result), encoding="utf-8")
            return
        assert command[1] == str(folder)
        if options["--protocol"] in self.broken:
            raise RunError("no more memory")
        metrics = {"student_0_accuracy": 0.6 + 0.1 * item.seed}
        result = {"metrics": metrics, "n_test": 359, "settings": {"training images": 90}}
        Path(options["--output"]).write_text(json.dumps(result), encoding="utf-8")


def run_in_this_process(command, item, folder, lock):
    assert main(command) == 0


# -- what a study file says -------------------------------------------------------------------------------------------


def test_arms_name_methods_recipes_and_seeds(tmp_path):
    study = read_study(write(tmp_path))
    assert [(run.arm, run.method.stem, run.seed) for run in study.runs()] == [
        ("vicreg", "vicreg", 0),
        ("simsiam", "simsiam", 0),
        ("random", "vicreg", 0),
        ("vicreg", "vicreg", 1),
        ("simsiam", "simsiam", 1),
        ("cohort", "online_adversarial", 1),
        ("random", "vicreg", 1),
    ]
    settings = {name: arm.settings for name, arm in study.arms.items()}
    assert [settings[name]["learning_rate"] for name in ("vicreg", "simsiam")] == [0.03, 0.3]  # each method's recipe
    assert settings["cohort"] == {"per_device_train_batch_size": 50}
    assert settings["random"] == {**settings["vicreg"], "num_train_epochs": 0.0}
    assert study.protocols == {
        "knn": {"max_train_samples": 90, "knn_neighbours": 5},
        "linear-probe": {"max_train_samples": 90},
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"variance_weight": 1}}, "settings, which arm 'simsiam' of simsiam shares: unknown option 'var"),
        ({"arms": {"a": {"method": "simsima"}}}, "arm 'a': unknown method 'simsima' .did you mean 'simsiam'"),
        ({"arms": {"a": {"method": "simsiam", "variance_weight": 1}}}, "arm 'a': unknown option 'variance_weight'"),
        ({"arms": {"a": {"recipe": "digitz"}}}, "arm 'a': recipe 'digitz' is neither.*shipped for vicreg: cifar"),
        ({"arms": {"a": {"seeds": [0, 0]}}}, "arm 'a': seeds: .0, 0. names one twice"),
        ({"arms": {"a": {}, "b": {"dataset_name": "mnist"}}}, "arm 'b' has dataset 'mnist' and arm 'a' has 'digits'"),
        ({"arms": {"a": {"method": "gan"}}}, "arm 'a': method gan leaves a generator, which protocols cannot probe"),
        ({"arms": {"a": {"train_per_class": 9}}}, "arm 'a', protocol knn: train_per_class 9 and max_train_samples 90"),
        ({"protocols": ["accuracy"]}, "protocols: 'accuracy' is unknown: choose of knn, linear-probe"),
        (
            {"protocols": ["linear-probe"]},
            "protocol_settings: knn_neighbours is for protocol knn: add it to protocols",
        ),
        (
            {"protocol_settings": {"knn_neighbors": 5}},
            "protocol_settings: unknown option 'knn_neighbors' .did you mean",
        ),
        ({"protocol_settings": {"knn_neighbours": 0}}, "protocol_settings: neighbours=0, temperature=0.07: kNN needs"),
        ({"protocol_settings": {"probe_epochs": 3}}, "protocol_settings: --probe_epochs is for --probe sgd"),
        ({"protocol_settings": {"output_dir": "x"}}, "protocol_settings: output_dir is set by the study itself"),
    ],
)
def test_bad_files_are_refused_before_any_run(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        read_study(write(tmp_path, **changes))


def test_settings_of_protocols_need_protocols(tmp_path):
    path = write(tmp_path)
    content = yaml.safe_load(path.read_text()) | {"protocol_settings": {"max_train_samples": 90}}
    del content["protocols"]
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match="max_train_samples is for protocol knn or linear-probe: add it to protocols"):
        read_study(path)


def test_metrics_of_one_student_and_of_several():
    assert metrics_of("linear-probe", {"student_0_accuracy": 0.5, "student_0_best_accuracy": 0.6}) == {
        "linear_probe_accuracy": 0.5,
        "linear_probe_best_accuracy": 0.6,
    }
    assert metrics_of("knn", {"student_0_accuracy": 0.5, "student_1_accuracy": 0.6}) == {
        "student_0_knn_probe_accuracy": 0.5,
        "student_1_knn_probe_accuracy": 0.6,
    }


# -- running ----------------------------------------------------------------------------------------------------------


def test_runs_are_trained_by_their_method_and_measured_by_each_protocol(tmp_path):
    study, results, runner = read_study(write(tmp_path)), tmp_path / "results.csv", Runner()
    run_study(study, tmp_path / "out", results, runner)
    knn, linear = study.protocols.values()
    assert runner.commands[3:6] == [
        ("simsiam", "simsiam", 0),
        ("simsiam", "knn", knn),
        ("simsiam", "linear-probe", linear),
    ]
    found = [
        (row["metric"], row["value"], row["n_train"])
        for row in read_csv(results, COLUMNS)
        if (row["arm"], row["seed"]) == ("cohort", "1")
    ]
    assert found == [
        ("knn_accuracy", "0.5", "1438"),
        ("representation_rank", "3.0", "1438"),
        ("knn_probe_accuracy", "0.7", "90"),
        ("linear_probe_accuracy", "0.7", "90"),
    ]
    text = write_report(study, read_csv(results, COLUMNS), tmp_path)
    assert "| simsiam | 2 | 65.00 ± 5.00 | +0.00 [+0.00, +0.00] | 50.00 ± 0.00 | +0.00 [+0.00, +0.00] |" in text
    again = Runner()
    run_study(study, tmp_path / "out", results, again)
    assert again.commands == []


def test_what_stopped_between_training_and_protocol_goes_on_with_the_protocol(tmp_path):
    study = read_study(write(tmp_path, arms={"vicreg": {}}, seeds=[0]))
    out, results = tmp_path / "out", tmp_path / "results.csv"
    with pytest.raises(RunError, match="1 of 1 runs failed, the first: no more memory"):
        run_study(study, out, results, Runner(broken=["linear-probe"]))
    assert read_csv(results, COLUMNS) == []
    rest = Runner()
    run_study(study, out, results, rest)
    assert rest.commands == [("vicreg", "linear-probe", {"max_train_samples": 90})]
    assert len(read_csv(results, COLUMNS)) == 4


def test_a_protocol_that_is_added_later_measures_the_finished_runs(tmp_path):
    changes = {"arms": {"vicreg": {}}, "seeds": [0], "metrics": ["knn_accuracy"]}
    out, results = tmp_path / "out", tmp_path / "results.csv"
    first = read_study(write(tmp_path, **changes, protocols=["knn"]))
    run_study(first, out, results, Runner())
    rest = Runner()
    run_study(read_study(write(tmp_path, **changes)), out, results, rest)
    assert [asked for _, asked, _ in rest.commands] == ["linear-probe"]
    metrics = [row["metric"] for row in read_csv(results, COLUMNS)]
    assert metrics == ["knn_accuracy", "representation_rank", "knn_probe_accuracy", "linear_probe_accuracy"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"arms": {"vicreg": {"method": "simsiam"}}},
            "started with method='vicreg', and the study now says 'simsiam'",
        ),
        ({"protocol_settings": {"knn_neighbours": 5}}, "max_train_samples=90, and the study now says None"),
    ],
)
def test_another_method_or_protocol_is_not_mixed_in(tmp_path, changes, message):
    common = {"arms": {"vicreg": {}}, "seeds": [0], "recipe": None}
    out, results = tmp_path / "out", tmp_path / "results.csv"
    run_study(read_study(write(tmp_path, **common)), out, results, Runner())
    with pytest.raises(InputError, match=message):
        run_study(read_study(write(tmp_path, **(common | changes))), out, results, Runner())


# -- the shipped studies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["squeeze_and_span_digits", "squeeze_and_span_mnist"])
def test_arms_are_the_rows_of_the_papers_tables(name):
    study = read_study(STUDIES / f"{name}.yaml")
    arms = {arm[0]: study.arms[arm].settings for arm in study.arms if arm[1] == "_"}
    weights = {row: (arm.get("variance_weight"), arm.get("covariance_weight")) for row, arm in arms.items()}
    assert weights == {"a": (0, 0), "b": (0, 0), "c": (0, 0), "d": (25, 0), "e": (25, 1), "f": (25, 1)}
    assert {row for row, arm in arms.items() if arm["synthetic_share"] == 1} == set("abcde")
    assert {row for row, arm in arms.items() if arm.get("squeeze_depth") == 0} == set("ab")
    assert {row for row, arm in arms.items() if arm.get("augment_synthetic") is False} == {"a"}
    budgets = {
        (arm.settings["num_train_epochs"], arm.settings["per_device_train_batch_size"])
        for name, arm in study.arms.items()
        if name != "random"
    }
    assert len(budgets) == 1 and study.arms["random"].settings["num_train_epochs"] == 0
    assert all(arm.settings["generator"] is None for name, arm in study.arms.items() if name.endswith("real"))


def test_digits_study_from_end_to_end(tmp_path):
    layers = {"hidden_sizes": [8, 4], "kernel_sizes": [4, 2], "strides": [1, 2]}
    config = HfkdBiganGeneratorConfig(latent_size=5, num_channels=1, initializer_range=0.3, **layers)
    HfkdBiganGeneratorModel(config).save_pretrained(tmp_path / "generator")
    content = yaml.safe_load((STUDIES / "squeeze_and_span_digits.yaml").read_text())
    content["settings"] |= {"generator": str(tmp_path / "generator"), "num_train_epochs": 0.2, "use_cpu": True}
    content["arms"] = {name: content["arms"][name] for name in ("f_squeeze_and_span", "random")}
    content |= {"reference": "random", "orderings": ["f_squeeze_and_span > random"], "seeds": [0]}
    path = tmp_path / "digits.yaml"
    path.write_text(yaml.safe_dump(content))
    study, out, results = read_study(path), tmp_path / "out", tmp_path / "results.csv"
    run_study(study, out, results, run_in_this_process)
    rows = read_csv(results, COLUMNS)
    metrics = {"knn_probe_accuracy", "linear_probe_accuracy", "knn_accuracy", "representation_rank"}
    for arm in study.arms:
        assert metrics <= {row["metric"] for row in rows if row["arm"] == arm}
    counts = {(row["n_train"], row["n_test"]) for row in rows if "_probe_" in row["metric"]}
    assert counts == {("200", "359")}
    assert "- f_squeeze_and_span > random: open: " in write_report(study, rows, out)
    trained, random = (AutoModel.from_pretrained(out / "runs" / arm / "seed_0") for arm in study.arms)
    assert sum(random.state_dict()[name].ne(value).any() for name, value in trained.state_dict().items()) > 10
    fresh = random.state_dict()
    assert all(not fresh[name].any() for name in fresh if name.endswith("running_mean"))  # it has seen no image
