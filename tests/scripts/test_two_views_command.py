"""`hfkd train` of VICReg, SimSiam and encoding: from options to saved encoders, their cards and their probes."""

import json

import pytest
from hub_metadata import check_card
from tiny_runs import tiny_resnet
from transformers import AutoModel
from two_view_runs import tiny_generator

from hfkd.hub.manifest import file_sha256
from hfkd.hub.remote_code import write_code
from hfkd.models import build_image_processor
from hfkd.scripts.cli import main


QUICK = ["--config", "digits", "--max_train_samples", "150", "--max_steps", "2", "--use_cpu", "true"]
QUICK += ["--per_device_train_batch_size", "50", "--bf16", "false"]


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generator")
    tiny_generator().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    tiny_resnet(3).save_pretrained(folder)
    build_image_processor(8, 1, [0.3], [0.4]).save_pretrained(folder)
    write_code([tiny_resnet(3)], folder)
    return folder


def train(method, folder, *options):
    return main([str(argument) for argument in ["train", method, *QUICK, "--output_dir", folder, *options]])


@pytest.mark.parametrize("method", ["vicreg", "simsiam", "latent-encoding"])
def test_trains_measures_and_leaves_a_card(method, generator, classifier, tmp_path, capsys):
    folder, options = tmp_path / "run", ["--synthetic_share", "0.5", "--generator", generator]
    if method == "latent-encoding":
        options += ["--perceptual_network", classifier]
    assert train(method, folder, *options) == 0
    assert "knn" in capsys.readouterr().out
    results = json.loads((folder / "test_results.json").read_text())
    wanted = {"knn_accuracy", "representation_std", "representation_rank"}
    assert wanted | ({"reconstruction_error"} if method == "latent-encoding" else set()) <= results["metrics"].keys()
    assert (results["n_train"], results["n_test"]) == (150, 359)
    text = (folder / "README.md").read_text()
    assert check_card(text) == ([], [])
    assert (
        f"`{generator.name}` (local; model.safetensors sha256 `{file_sha256(generator / 'model.safetensors')}`" in text
    )
    assert AutoModel.from_pretrained(folder).config.num_channels == 1
    # Run in `test_squeeze_and_span_command`, whose cards have the same lines.
    code = text.split("```python\n")[1].split("```")[0]
    assert str(folder) in code and "AutoModel.from_pretrained(repo" in code and "features = " in code


def test_a_run_without_generator_is_probed_and_goes_on(tmp_path):
    assert train("vicreg", tmp_path / "first") == 0
    probe = ["evaluate", tmp_path / "first", "--protocol", "linear-probe", "--output_dir", tmp_path / "probed"]
    assert main([str(argument) for argument in probe]) == 0
    assert main(["evaluate", str(tmp_path / "probed"), "--dataset_name", "digits"]) == 0
    assert train("simsiam", tmp_path / "second", "--student", tmp_path / "probed") == 0


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("vicreg", ["--augmentation", "none"], "the augmentation changes nothing"),
        ("vicreg", ["--synthetic_share", "0.5"], "synthetic_share=0.5 needs a generator: give --generator"),
        ("simsiam", ["--synthetic_share", "1", "--generator", "nowhere"], "nowhere"),
        ("latent-encoding", ["--augmentation", "ssl"], "augmentation=ssl: a generator makes no augmented images"),
        (
            "latent-encoding",
            ["--normalization", "digits", "--generator", "GENERATOR"],
            "choose normalization=symmetric",
        ),
        ("latent-encoding", ["--image_size", "16", "--generator", "GENERATOR"], "makes images of 8x8 pixels"),
    ],
)
def test_bad_input_is_one_line(method, options, message, generator, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [str(generator) if option == "GENERATOR" else option for option in options]
    assert train(method, tmp_path / "run", *options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hfkd: error:") and message in error
    assert not (tmp_path / "run").exists()
