"""`hfkd train bigan` and `hfkd train vae`: from options to saved encoders; what they have no demo for."""

import json
import os

import pytest
import torch
from clean_process import run_clean
from hub_metadata import check_card
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModel

from hfkd.data import DataArguments
from hfkd.hub.publish import stage
from hfkd.scripts.cli import main
from hfkd.scripts.encoders import BiGanArguments, build_bigan
from hfkd.trainers.bigan import BiGanConfig


QUICK = ["--config", "digits", "--max_train_samples", "150", "--max_steps", "3", "--use_cpu", "true"]


def train(method, folder, *options):
    return main(["train", method, *QUICK, "--output_dir", str(folder), *options])


def snippet(folder):
    card = (folder / "README.md").read_text()
    assert check_card(card) == ([], [])
    return card.split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize(("method", "measured"), [("bigan", "generator_loss"), ("vae", "elbo")])
def test_trains_measures_and_leaves_a_card_that_runs(method, measured, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train(method, folder) == 0
    assert f"  {measured}" in capsys.readouterr().out
    results = json.loads((folder / "test_results.json").read_text())
    assert {"reconstruction_error", measured} <= results["metrics"].keys()
    assert (results["n_train"], results["n_test"]) == (150, 359)
    encoder = AutoModel.from_pretrained(folder)
    assert (encoder.config.num_channels, encoder.config.image_size) == (1, 8)
    assert not {"id2label", "label2id"} & json.loads((folder / "config.json").read_text()).keys()
    staged = stage(folder)
    assert (staged / "generator/model.safetensors").is_file() == (method == "bigan")
    assert (staged / "samples.png").is_file() == (method == "bigan")
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "image-feature-extraction" and not (
        set(card.data.tags) & {"image-classification"}
    )
    assert {result.metric_type for result in card.data.eval_results} >= {"mse"}
    Image.new("L", (20, 20), 90).save(tmp_path / "image.png")
    code = snippet(folder) + "\nprint(tuple(features.shape))"
    printed = run_clean(code, {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}, tmp_path)
    assert printed.split("\n")[-2] == str((1, encoder.config.hidden_sizes[-1]))
    if method == "bigan":
        assert Image.open(tmp_path / "sample.png").size == (8, 8)
        assert Image.open(folder / "samples.png").size == (8 * 33 - 1, 8 * 33 - 1)
        assert "| generator | HfkdBiganGeneratorModel |" in card.text


def test_a_run_goes_on_from_its_encoder(tmp_path):
    assert train("vae", tmp_path / "first") == 0
    assert train("vae", tmp_path / "second", "--encoder", str(tmp_path / "first"), "--learning_rate", "0") == 0
    first, second = (AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("first", "second"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_images_are_symmetric_unaugmented_and_where_the_generator_starts(tmp_path):
    data = DataArguments(max_train_samples=60, validation_size=0)
    config = BiGanConfig(str(tmp_path), use_cpu=True)
    job = build_bigan(config, data, BiGanArguments(encoder="bigan_encoder_8px", latent_size=3))
    assert not job.train.augmentation and job.train.preprocessing.mean == (0.5,)
    batch = job.train.materialise({"key": torch.tensor([(0, row) for row in range(60)])})
    assert (batch["pixel_values"].min(), batch["pixel_values"].max()) == (-1, 1)
    generator = job.trainer.model.students[1]
    assert generator.config.latent_size == 3
    torch.testing.assert_close(generator.sample(1, seed=0)[0], batch["pixel_values"].mean(0), atol=0.01, rtol=0)
    again = build_bigan(config, data, BiGanArguments(encoder="bigan_encoder_8px", latent_size=3))
    for one, other in zip(job.trainer.model.parameters(), again.trainer.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["demo", "bigan"], "bigan has no demo: choose one of online-adversarial"),
        (["benchmark", "vae"], "vae has no benchmark: choose one of online-adversarial"),
        (["train", "bigan", *QUICK, "--encoder", "resnet8"], "no kernel_sizes"),
        (["train", "bigan", *QUICK, "--encoder", "bigan_encoder"], "receptive field 32"),
        (["train", "vae", *QUICK, "--encoder", "bigan_encoder_8px"], "no depth"),
        (["train", "vae", *QUICK, "--normalization", "digits"], "choose normalization=symmetric"),
        (["train", "bigan", *QUICK, "--latent_size", "0"], "latent_size=0"),
        (["train", "bigan", *QUICK, "--image_size", "16"], "8x8 pixels with 1 channel(s), and the data has 16x16"),
    ],
)
def test_bad_input_is_one_line(argv, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hfkd: error:") and message in error
    assert not list(tmp_path.glob("*/config.json"))
