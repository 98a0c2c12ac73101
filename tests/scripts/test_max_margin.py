"""`hfkd train max-margin`: from options to a saved classifier that says how it was trained."""

import json
import os

import pytest
import torch
from clean_process import run_clean
from hub_metadata import check_card
from PIL import Image
from transformers import AutoModelForImageClassification

from hfkd.scripts.cli import main


QUICK = ["--config", "digits", "--max_steps", "20", "--hidden_sizes", "12", "10", "--use_cpu", "true"]


def train(folder, *options):
    return main(["train", "max-margin", *QUICK, "--output_dir", str(folder), *options])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("max_margin") / "run"
    assert train(folder) == 0
    return folder


def test_leaves_facts_results_and_a_card_that_runs(finished, tmp_path):
    facts = json.loads((finished / "config.json").read_text())["training_facts"]
    assert (facts["num_images"], facts["updates"], facts["weight_decay"]) == (100, 20, 5e-3)
    results = json.loads((finished / "test_results.json").read_text())
    assert (results["n_train"], results["n_test"]) == (100, 359) and results["metrics"]["accuracy"] > 0.3
    card = (finished / "README.md").read_text()
    assert check_card(card) == ([], [])
    Image.new("L", (20, 20), 90).save(tmp_path / "image.png")
    snippet = card.split("```python\n")[1].split("```")[0] + "\nprint(model.config.training_facts['updates'])"
    printed = run_clean(snippet, {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}, tmp_path)
    assert printed.split()[-1] == "20"


def test_a_run_goes_on_from_its_classifier(finished, tmp_path):
    options = ["train", "max-margin", "--train_per_class", "10", "--use_cpu", "true", "--max_steps", "1"]
    options += ["--classifier", str(finished), "--learning_rate", "0", "--output_dir", str(tmp_path / "second")]
    assert main(options) == 0
    first, second = (
        AutoModelForImageClassification.from_pretrained(folder).state_dict()
        for folder in (finished, tmp_path / "second")
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("regime", ["digits_paper_like", "digits_small_first_layer"])
def test_other_regimes_run(regime, tmp_path):
    assert train(tmp_path / "run", "--config", regime, "--hidden_sizes", "100", "100") == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["training_facts"]["weight_decay"] == 0
    assert (config["norm"], config["initial_scales"][0], config["bias"]) == (
        ("batch", 1.0, "all") if regime == "digits_paper_like" else ("none", 0.05, "first")
    )


def test_residual_networks_without_norm(tmp_path):
    options = ["--classifier", "resnet8", "--norm", "none", "--hidden_sizes", "4", "8", "8", "--max_steps", "2"]
    assert train(tmp_path / "run", *options, "--initial_scales") == 2  # an option without a value
    assert train(tmp_path / "run", *options) == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["model_type"], config["norm"], config["hidden_sizes"]) == ("hfkd_resnet", "none", [4, 8, 8])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--per_device_train_batch_size", "50"], "is smaller than the 100 training images"),
        (["--augmentation", "crop"], "the training images are augmented"),
        (["--train_per_class", "500"], "training rows: ask for fewer"),
        (["--classifier", "resnet8", "--initial_scales", "1", "1", "1"], "preset 'resnet8' has no initial_scales"),
        (["--classifier", "mlp_bm"], "nearest: mlp_bn"),
        (["--norm", "group"], "preset 'mlp': norm='group' is unknown"),
    ],
)
def test_bad_options_end_with_2_and_one_line(options, message, tmp_path, capsys):
    assert train(tmp_path / "run", *options) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("hfkd: error: ") and message in error and "\n" not in error
    assert not (tmp_path / "run").exists()
