"""`hfkd train gan` and what the other commands do with its result."""

import json
import os

import pytest
import torch
from clean_process import run_clean
from hub_metadata import check_card
from PIL import Image
from tiny_runs import tiny_resnet
from transformers import AutoModel

from hfkd.data import DataArguments
from hfkd.hub.publish import stage
from hfkd.models import build_image_processor
from hfkd.scripts.cli import main
from hfkd.scripts.gan import GanArguments, build
from hfkd.trainers.gan import GanConfig


QUICK = ["--config", "digits", "--max_train_samples", "150", "--max_steps", "3", "--use_cpu", "true"]


def train(folder, *options):
    return main(["train", "gan", *QUICK, "--output_dir", str(folder), *options])


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    tiny_resnet(0).save_pretrained(folder)
    build_image_processor(8, 3, [0.3] * 3, [0.4] * 3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(judge, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gan") / "run"
    assert train(folder, "--judge", str(judge), "--width", "8") == 0
    return folder


def test_trains_measures_and_leaves_a_card_that_runs(trained, tmp_path):
    results = json.loads((trained / "test_results.json").read_text())
    assert {"frechet_distance", "judge_confidence", "smallest_judge_share"} <= results["metrics"].keys()
    assert (results["n_train"], results["n_test"]) == (150, 359)
    config = AutoModel.from_pretrained(trained).config
    assert (config.num_channels, config.image_size, config.width, config.latent_size) == (1, 8, 8, 32)
    staged = stage(trained)
    assert (staged / "discriminator/model.safetensors").is_file() and (staged / "samples.png").is_file()
    card = (trained / "README.md").read_text()
    assert check_card(card) == ([], [])
    code = card.split("```python\n")[1].split("```")[0] + "\nprint(tuple(images.shape), tuple(features.shape))"
    printed = run_clean(code, {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}, tmp_path)
    assert printed.split("\n")[-2] == "(10, 1, 8, 8) (10, 8)"
    assert Image.open(tmp_path / "sample.png").size == (8, 8)


def test_sample_and_evaluate_take_the_result(trained, tmp_path, capsys):
    assert main(["sample", str(trained), "--num_images", "9", "--output", str(tmp_path / "grid.png")]) == 0
    assert Image.open(tmp_path / "grid.png").size == (3 * 33 - 1, 3 * 33 - 1)
    words = ["evaluate", str(trained), "--protocol", "generation", "--num_images", "40"]
    assert main([*words, "--output", str(tmp_path / "result.json")]) == 0
    found = json.loads((tmp_path / "result.json").read_text())["metrics"]["generator"]
    assert "judge_confidence" in found and "judge_accuracy" not in found
    assert main(["sample", str(trained / "discriminator"), "--output", str(tmp_path / "no.png")]) == 2
    assert "makes no images" in capsys.readouterr().err


def test_a_run_goes_on_from_both_networks(trained, tmp_path):
    options = ["--generator", str(trained), "--learning_rate", "0", "--max_train_samples", "150", "--max_steps", "2"]
    assert main(["train", "gan", *options, "--use_cpu", "true", "--output_dir", str(tmp_path / "on")]) == 0
    for place in ("", "discriminator"):
        first, second = (AutoModel.from_pretrained(folder / place) for folder in (trained, tmp_path / "on"))
        for (name, one), two in zip(first.named_parameters(), second.parameters(), strict=True):
            assert torch.equal(one, two), name


def test_images_are_symmetric_and_networks_follow_the_seed(tmp_path):
    data, config = DataArguments(max_train_samples=60, validation_size=0), GanConfig(str(tmp_path), use_cpu=True)
    arguments = GanArguments(width=4, latent_size=3, discriminator_norm="none")
    job, again = (build(config, data, arguments) for _ in range(2))
    assert not job.train.augmentation and job.train.preprocessing.mean == (0.5,)
    generator, discriminator = job.trainer.model.students
    assert (generator.config.width, generator.config.latent_size, discriminator.config.norm) == (4, 3, "none")
    for one, other in zip(job.trainer.model.parameters(), again.trainer.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_stylegan2_takes_a_step(tmp_path):
    options = ["--generator", "stylegan2", "--width", "8", "--latent_size", "16", "--max_steps", "1"]
    assert train(tmp_path / "run", *options, "--per_device_train_batch_size", "4", "--max_train_samples", "20") == 0
    generator = AutoModel.from_pretrained(tmp_path / "run")
    assert generator.config.model_type == "hfkd_stylegan2_generator" and generator.config.channel_max == 8
    assert generator.sample(2, seed=0).shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--generator", "dcgn"], "generator 'dcgn'"),
        (["--discriminator", "stylegan3"], "'stylegan3'"),
        (["--width", "0"], "width=0"),
        (["--image_size", "28"], "image_size=28 is no power of two"),
        (["--generator", "stylegan2", "--discriminator_norm", "none"], "discriminator_norm=none has no effect"),
        (["--discriminator_norm", "group"], "norm='group' is unknown"),
        (["--discriminator_norm", "batch", "--image_size", "16"], "choose r1_weight=0"),
        (["--normalization", "digits"], "choose normalization=symmetric"),
        (["--judge", "nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_bad_input_is_one_line(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "gan", *QUICK, *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hfkd: error:") and message in error
    assert not list(tmp_path.glob("*/config.json"))


def test_options_of_fresh_weights_do_not_go_with_a_checkpoint(trained, tmp_path, capsys):
    assert train(tmp_path, "--generator", str(trained), "--width", "8") == 2
    assert "width=8 has no effect" in capsys.readouterr().err
