"""`hfkd train gradient-features`: bases of every kind, random branches, several labels, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from gradient_feature_runs import several_label_digits
from safetensors.torch import load_file, save_file
from tiny_runs import tiny_resnet
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

from hfkd.errors import InputError
from hfkd.models import HfkdWideResNetConfig, HfkdWideResNetForImageClassification, build_image_processor, load_base
from hfkd.scripts.cli import main
from hfkd.scripts.gradient_base import GradientBaseArguments, build_model
from hfkd.scripts.options import check_values, read_yaml
from hfkd.scripts.study_file import read_study


FAST = ["--max_steps", "4", "--max_train_samples", "64", "--per_device_train_batch_size", "16", "--use_cpu", "true"]
STUDIES = sorted((Path(__file__).parents[2] / "scripts/studies").glob("*.yaml"))
DIGITS = tuple(map(str, range(10)))


def hfkd(capsys, *argv: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in argv])
    out, error = capsys.readouterr()
    return code, out, error.strip().replace("\r", "\n").rpartition("\n")[2]  # progress bars end with a carriage return


def save(network, folder, channels=1, processor=True) -> Path:
    network.save_pretrained(folder)
    if processor:
        build_image_processor(8, channels, [0.3] * channels, [0.4] * channels).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A classifier of four things, with statistics of its own."""
    return save(tiny_resnet(3, width=6, num_labels=4), tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("train") / "run"
    argv = [
        "train",
        "gradient_features",
        *FAST,
        "--base",
        base,
        "--output_dir",
        folder,
        "--omega_weight_decay",
        "0.01",
    ]
    assert main([str(a) for a in [*argv, "--save_strategy", "steps", "--save_steps", "2"]]) == 0
    return folder


# -- from the command to its results -----------------------------------------------------------------


def test_a_run_leaves_a_model_of_the_digits_in_the_bases_statistics(finished, base):
    result = json.loads((finished / "test_results.json").read_text())
    assert (result["n_train"], result["n_test"]) == (64, 359)
    assert set(result["metrics"]) == {"loss", "accuracy", "top5_accuracy"}
    model = AutoModelForImageClassification.from_pretrained(finished)
    assert list(model.config.id2label.values()) == list(DIGITS) and model.config.mode == "full"
    assert json.loads((finished / "preprocessor_config.json").read_text())["image_mean"] == [0.3] * 3
    card = (finished / "README.md").read_text()
    assert "| `mode` | `full` |" in card and "| `theta2` | `['backbone.stages.1.0." in card
    assert f"Starting point: `{base.name}` (local; model.safetensors sha256" in card
    assert "| Model | " in card


def test_evaluate_measures_what_training_measured(finished, tmp_path, capsys):
    code, out, error = hfkd(capsys, "evaluate", finished, "--output", tmp_path / "result.json")
    assert code == 0, error
    measured = json.loads((tmp_path / "result.json").read_text())["metrics"]
    trained = json.loads((finished / "test_results.json").read_text())["metrics"]
    assert measured == {name: pytest.approx(trained[name]) for name in ("accuracy", "top5_accuracy")}
    assert "accuracy on 359 test images" in out and "top-5" in out


@pytest.mark.parametrize("protocol", ["knn", "linear-probe"])
def test_probes_are_of_the_bases_features(finished, base, tmp_path, capsys, protocol):
    """As the base itself gives them: batch norms are folded, and the gradients are not looked at."""
    found = []
    for number, checkpoint in enumerate((finished, base)):
        result = tmp_path / f"{number}.json"
        data = ["--dataset_name", "digits", "--max_train_samples", "64"]
        code, _, error = hfkd(capsys, "evaluate", checkpoint, "--protocol", protocol, *data, "--output", result)
        assert code == 0, error
        found.append(json.loads(result.read_text())["metrics"])
    # Rounding may decide between two neighbours.
    assert found[0] == {"student_0_accuracy": pytest.approx(found[1]["student_0_accuracy"], abs=1 / 359)}
    assert found[0]["student_0_accuracy"] > 0.3


def test_run_file_repeats_the_run_to_the_bit(finished, tmp_path, capsys):
    argv = ["train", "gradient-features", "--config", finished / "run.yaml", "--output_dir", tmp_path / "again"]
    assert hfkd(capsys, *argv)[0] == 0
    assert (tmp_path / "again/model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_resume_goes_on_to_the_same_bits(finished, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (finished / "checkpoint-2").rename(tmp_path / "run/checkpoint-2")
    argv = ["train", "gradient-features", "--config", finished / "run.yaml", "--output_dir", tmp_path / "run"]
    code, out, error = hfkd(capsys, *argv, "--resume_from_checkpoint", "true")
    assert code == 0, error
    assert "omega_accuracy" not in out
    assert (tmp_path / "run/model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_whitened_inputs_by_option_and_in_the_card(base, tmp_path, capsys):
    folder = tmp_path / "run"
    options = ["--config", "digits", "--base", base, "--whiten", "--max_steps", 2, "--output_dir", folder]
    code, _, error = hfkd(capsys, "train", "gradient-features", "--use_cpu", "true", *options)
    assert code == 0, error
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert model.config.whiten and all(
        (root != torch.eye(len(root))).any() for root in model.backbone.whitening.buffers()
    )
    assert "| `whiten` | `True` |" in (folder / "README.md").read_text()


@pytest.mark.parametrize("mode", ["activation", "gradient", "finetune"])
def test_other_modes(base, tmp_path, capsys, mode):
    code, _, error = hfkd(
        capsys, "train", "gradient-features", *FAST, "--base", base, "--mode", mode, "--theta2", "backbone.stages.*",
        "--output_dir", tmp_path / "run", "--save_strategy", "no"
    )  # fmt: skip
    assert code == 0, error
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "run").config
    assert config.mode == mode and {name.split(".")[2] for name in config.theta2} == {"0", "1"}


def test_several_labels_for_each_image(base, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    several_label_digits().to_parquet(tmp_path / "data/train.parquet")
    several_label_digits().to_parquet(tmp_path / "data/test.parquet")
    common = ["--dataset_name", tmp_path / "data", "--validation_size", "0", "--save_strategy", "no"]
    argv = ["train", "gradient-features", *FAST[:2], *common, "--base", base, "--use_cpu", "true"]
    code, out, error = hfkd(capsys, *argv, "--output_dir", tmp_path / "run", "--evaluation_crops", "2")
    assert code == 0, error
    metrics = json.loads((tmp_path / "run/test_results.json").read_text())["metrics"]
    assert set(metrics) == {"loss", "mean_average_precision", "mean_average_precision_11_point"}
    assert "mean average precision on 80 test images\n  area" in out and "11 point" in out
    code, _, error = hfkd(capsys, "evaluate", tmp_path / "run", "--output", tmp_path / "result.json")
    assert code == 0, error
    whole = json.loads((tmp_path / "result.json").read_text())["metrics"]
    assert set(whole) == set(metrics) - {"loss"} and whole != {name: metrics[name] for name in whole}
    card = (tmp_path / "run/README.md").read_text()
    assert "Mean average precision (11 points)" in card


# -- bases -------------------------------------------------------------------------------------------


def stock_resnet():
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    )


def wide_resnet():
    return HfkdWideResNetForImageClassification(HfkdWideResNetConfig(depth=10, widen_factor=1, num_labels=3))


@pytest.mark.parametrize("make", [stock_resnet, wide_resnet, lambda: wide_resnet().base_model, lambda: "resnet8"])
def test_networks_of_every_kind(make, tmp_path, capsys):
    """With their own head, without one, and without a processor: then the data's statistics hold."""
    network = make()
    name = network if isinstance(network, str) else save(network, tmp_path / "base", channels=3, processor=False)
    code, _, error = hfkd(
        capsys, "train", "gradient-features", *FAST[:2], "--max_train_samples", "32", "--base", name, "--use_cpu",
        "true", "--output_dir", tmp_path / "run", "--save_strategy", "no", "--image_size", "16"
    )  # fmt: skip
    assert code == 0, error
    assert (tmp_path / "run/model.safetensors").is_file()


@pytest.mark.parametrize("theta1", ["pretrained", "random"])
@pytest.mark.parametrize("theta2", ["pretrained", "random"])
def test_gradient_branch_is_random_where_it_is_asked_for(base, theta1, theta2):
    network = load_base(str(base))
    arguments = GradientBaseArguments(gradient_theta1=theta1, gradient_theta2=theta2)
    model, again, other = (build_model(network, arguments, DIGITS, seed) for seed in (0, 0, 1))
    backbone, linearised = model.backbone, set(model.config.theta2)
    assert (backbone.gradient_base is None) == (theta1 == theta2 == "pretrained")
    own, mixed = backbone.base.state_dict(), backbone.linearised_base.state_dict()
    weights = [name for name in own if name.endswith("weight")]
    same = {name for name in weights if torch.equal(own[name], mixed[name])}
    assert same & linearised == (linearised & set(weights) if theta2 == "pretrained" else set())
    assert same - linearised == (set(weights) - linearised if theta1 == "pretrained" else set())
    for name, value in mixed.items():
        assert torch.equal(value, again.backbone.linearised_base.state_dict()[name])
    drawn = other.backbone.linearised_base.state_dict()
    assert ("random" in (theta1, theta2)) == any(not torch.equal(mixed[name], drawn[name]) for name in weights)
    pixels = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(backbone.features(pixels), backbone.base(pixels).logits)


def test_random_networks_of_the_ablation_train(base, tmp_path, capsys):
    random = ["--gradient_theta1", "random", "--gradient_theta2", "random", "--omega", "random"]
    argv = ["train", "gradient-features", *FAST, "--base", base, *random, "--save_strategy", "no"]
    code, _, error = hfkd(capsys, *argv, "--output_dir", tmp_path / "run")
    assert code == 0, error
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "run").config.separate_gradient_base


# -- recipes and studies -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies(path):
    study = read_study(path)
    assert study.metrics and study.reference in study.arms


@pytest.mark.parametrize("name", ["gradient_features_ablation", "gradient_features_digits"])
def test_ablation_has_every_combination(name):
    study = read_study(next(path for path in STUDIES if path.stem == name))
    keys = ("mode", "gradient_theta1", "gradient_theta2", "omega")
    found = {name: tuple(arm.settings.get(key) for key in keys) for name, arm in study.arms.items()}
    for arm, (mode, *random) in found.items():
        kind, _, letters = arm.partition("_")
        assert mode == kind
        assert [value == "random" for value in random] == [letter == "r" for letter in letters or "ppp"]
    assert len(set(found.values())) == len(found) == 18


def test_the_codes_recipe_is_the_codes_preset():
    from hfkd.scripts.methods import METHODS
    from hfkd.trainers.gradient_features import CODE_PRESET

    method = METHODS["gradient_features"]
    recipe = method.recipes / "code.yaml"
    values = check_values(read_yaml(recipe), method.dataclasses(), str(recipe))
    assert {name: values[name] for name in CODE_PRESET["full"]} == dict(CODE_PRESET["full"])


# -- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "need a base network: give --base FOLDER_OR_HUB_ID"),
        (["--base", "./nowhere"], "base './nowhere': there is no such folder"),
        (["--base", "resnet9"], "base 'resnet9' is no preset (nearest: "),
        (["--base", "BASE", "--theta2", "99"], "k=99 top blocks"),
        (["--base", "BASE", "--theta2", "backbone.stages.7"], "'backbone.stages.7' names no parameter"),
        (["--base", "BASE", "--theta2", "backbone.stages.1", "backbone.stages.1.0"], "overlap"),
        (["--base", "BASE", "--theta2"], "argument --theta2: expected at least one argument"),
        (["--base", "BASE", "--mode", "activation", "--gradient_theta2", "random"], "has no gradient branch"),
        (["--base", "BASE", "--mode", "finetune", "--omega", "random"], "omega=random has no effect"),
        (
            ["--base", "BASE", "--mode", "finetune", "--whiten", "true"],
            "whiten=True have no effect with mode=finetune",
        ),
        (["--base", "BASE", "--mode", "both"], "invalid choice: 'both'"),
        (["--base", "vae_encoder", "--image_size", "3"], "cannot take images"),
        (["--base", "BASE", "--evaluation_crops", "0"], "evaluation_crops=0"),
    ],
)
def test_bad_input_ends_with_2_and_one_line(base, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    argv = [str(base) if part == "BASE" else part for part in argv]
    code, _, error = hfkd(capsys, "train", "gradient-features", "--use_cpu", "true", *argv)
    assert code == 2, error
    assert error.startswith("hfkd: error: ") and message in error
    assert list(tmp_path.iterdir()) == []


def test_an_empty_theta2(base, tmp_path, capsys):
    (tmp_path / "empty.yaml").write_text("theta2: []")
    argv = ["--config", tmp_path / "empty.yaml", "--base", base, "--output_dir", tmp_path / "run"]
    code, _, error = hfkd(capsys, "train", "gradient-features", *argv)
    assert code == 2 and "theta2 is empty" in error


def test_third_party_remote_code(tmp_path):
    auto_map = {"AutoConfig": "configuration_x.XConfig", "AutoModelForImageClassification": "modeling_x.X"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x_net", "auto_map": auto_map}))
    (tmp_path / "configuration_x.py").write_text("raise SystemExit('executed')")
    with pytest.raises(InputError, match="'x_net'\\) is third-party remote code"):
        load_base(str(tmp_path))


def test_a_base_that_lacks_weights(tmp_path):
    save(tiny_resnet(0), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if "stages" in name and name.endswith("weight"))
    save_file({k: v for k, v in weights.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"lacks weights: {lost}"):
        load_base(str(tmp_path))


def test_a_language_model_is_no_base(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match="base .* is of type 'bert', which has no image classifier"):
        load_base(str(tmp_path))
