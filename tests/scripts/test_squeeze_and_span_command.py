"""`hfkd train squeeze-and-span`: from options to a saved student, with a generator of another run."""

import json
import os

import pytest
import torch
from clean_process import run_clean
from hub_metadata import check_card
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModel

from hfkd.data import DataArguments, MixedImages, SyntheticDraws, ViewAugmentation
from hfkd.models import HfkdBiganGeneratorConfig, HfkdBiganGeneratorModel, HfkdResNetModel
from hfkd.scripts.cli import main
from hfkd.scripts.methods import METHODS
from hfkd.scripts.options import build, read_options
from hfkd.scripts.squeeze_and_span import SelfSupervisedArguments
from hfkd.scripts.squeeze_and_span import build as build_job
from hfkd.trainers.squeeze_and_span import CODE_PRESET, SqueezeAndSpanConfig


SMALL = {"representation_size": 16, "squeeze_hidden_size": 16, "projector_layers": 2}
QUICK = ["--config", "digits", "--max_train_samples", "150", "--max_steps", "2", "--per_device_train_batch_size", "40"]
QUICK += ["--use_cpu", "true", *(part for name, value in SMALL.items() for part in (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    layers = {"hidden_sizes": [8, 4], "kernel_sizes": [4, 2], "strides": [1, 2]}
    config = HfkdBiganGeneratorConfig(latent_size=5, num_channels=1, initializer_range=0.3, **layers)
    HfkdBiganGeneratorModel(config).save_pretrained(folder)
    return folder


def train(generator, folder, *options):
    return main(
        ["train", "squeeze-and-span", *QUICK, "--generator", str(generator), "--output_dir", str(folder), *options]
    )


def test_trains_measures_and_leaves_a_card_that_runs(generator, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train(generator, folder) == 0
    assert "knn" in capsys.readouterr().out
    results = json.loads((folder / "test_results.json").read_text())
    assert {"knn_accuracy", "representation_rank"} <= results["metrics"].keys()
    assert (results["n_train"], results["n_test"]) == (150, 359)
    student = AutoModel.from_pretrained(folder)
    assert isinstance(student, HfkdResNetModel) and student.config.zero_init_residual
    card = (folder / "README.md").read_text()
    assert check_card(card) == ([], [])
    assert ModelCard(card).data.pipeline_tag == "image-feature-extraction"
    assert f"Teacher: `{generator.name}` (local; model.safetensors sha256" in card and str(generator) not in card
    Image.new("L", (20, 20), 90).save(tmp_path / "image.png")
    code = card.split("```python\n")[1].split("```")[0] + "\nprint(tuple(features.shape))"
    printed = run_clean(code, {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}, tmp_path)
    assert printed.split("\n")[-2] == "(1, 64)"
    assert main(["evaluate", str(folder), "--protocol", "knn"]) == 0


def make(generator, tmp_path, student="resnet8", **config):
    settings = {"per_device_train_batch_size": 40, "max_steps": 2, "use_cpu": True, **SMALL, **config}
    data = DataArguments(max_train_samples=150, validation_size=0)
    return build_job(
        SqueezeAndSpanConfig(str(tmp_path), **settings),
        data,
        SelfSupervisedArguments(generator=str(generator), student=student),
    )


def test_what_the_job_is_made_of(generator, tmp_path):
    job = make(generator, tmp_path)
    assert isinstance(job.trainer.train_dataset, MixedImages) and len(job.train) == 150
    assert isinstance(job.train.augmentation, ViewAugmentation) and not job.train.augmentation.horizontal_flip
    assert job.trainer.synthetic_augmentation.crop == job.train.augmentation.crop
    last = [m for m in job.trainer.model.students[0].modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert sum(not m.weight.any() for m in last) == 3
    again = make(generator, tmp_path)
    for one, other in zip(job.trainer.model.parameters(), again.trainer.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_all_synthetic_has_no_training_images(generator, tmp_path):
    job = make(generator, tmp_path, student="wrn_10_2", synthetic_share=1.0)
    assert isinstance(job.trainer.train_dataset, SyntheticDraws) and job.train is None
    job.trainer.train()
    assert "eval_knn_accuracy" in job.trainer.evaluate(job.test)
    job.trainer.save_model()
    assert "digits" not in (tmp_path / "README.md").read_text()


def test_the_released_codes_recipe_is_its_preset():
    method = METHODS["squeeze_and_span"]
    kinds = method.dataclasses()
    found = {
        name: build(kinds, read_options(kinds, ["--config", name, "--use_cpu", "true"], "", method.recipes))[-1]
        for name in ("cifar10", "cifar10_released_code")
    }
    for name, value in CODE_PRESET.items():
        assert getattr(found["cifar10_released_code"], name) == value != getattr(found["cifar10"], name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--synthetic_share", "0"], "no synthetic sample to squeeze"),
        (["--image_size", "16"], "images of 8x8 pixels and the student's are 16x16"),
        (["--augmentation", "crop"], "pass a ViewAugmentation"),
        (["--augmentation", "none"], "the augmentation changes nothing"),
        (["--student", "mlp", "--zero_init_residual", "true"], "has no zero_init_residual"),
        (["--gradient_accumulation_steps", "2"], "raise per_device_train_batch_size"),
    ],
)
def test_bad_input_is_one_line(generator, options, message, tmp_path, capsys):
    assert train(generator, tmp_path / "run", *options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hfkd: error:") and message in error
    assert not (tmp_path / "run").exists()


def test_a_generator_is_asked_for(tmp_path, capsys):
    assert main(["train", "squeeze-and-span", *QUICK, "--output_dir", str(tmp_path)]) == 2
    assert "needs a generator: give --generator" in capsys.readouterr().err
