"""`hfkd sample` of generators as they are saved."""

import subprocess
import sys

import huggingface_hub
import pytest
import torch
from generative_runs import tiny_trainer
from hub_fixtures import hub  # noqa: F401
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_runs import tiny_resnet
from transformers import AutoModel

from hfkd.evaluation.image_grid import class_grid, image_grid
from hfkd.models import HfkdConditionalGeneratorConfig, HfkdConditionalGeneratorModel
from hfkd.scripts.cli import main


NAMES = ["zero", "one", "two", "three"]


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditional")
    settings = {"id2label": dict(enumerate(NAMES)), "latent_size": 4, "hidden_sizes": [8, 8]}
    HfkdConditionalGeneratorModel(HfkdConditionalGeneratorConfig.for_images(8, **settings)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Born from a classifier of one class, and one of three."""
    folder = tmp_path_factory.mktemp("several")
    settings = {"id2label": dict(enumerate(NAMES)), "class_counts": [1, 3], "latent_size": 4, "hidden_sizes": [8, 8]}
    HfkdConditionalGeneratorModel(HfkdConditionalGeneratorConfig.for_images(8, **settings)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bigan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bigan")
    tiny_trainer("bigan", folder).save_model()
    return folder


def sample(folder, tmp_path, *options):
    """Exit code and picture."""
    path = tmp_path / "grid.png"
    code = main(["sample", str(folder), "--output", str(path), *options])
    return code, Image.open(path).convert("L") if path.exists() else None


def error_of(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    return lines[-1]


def test_a_row_for_each_class(conditional, tmp_path, capsys):
    code, picture = sample(conditional, tmp_path, "--num_images", "10", "--seed", "3")
    assert code == 0
    generator = HfkdConditionalGeneratorModel.from_pretrained(conditional)
    labels = torch.arange(10) % 4
    assert picture.tobytes() == class_grid(generator.sample(10, labels, seed=3), labels).tobytes()
    assert picture.size == (3 * 33 - 1, 4 * 33 - 1)
    out = capsys.readouterr().out
    assert "10 images" in out and "seed 3; rows from the top: zero, one, two, three" in out


def test_chosen_classes_in_batches(conditional, tmp_path, capsys):
    code, picture = sample(conditional, tmp_path, "--labels", "3", "1", "3", "--num_images", "5", "--batch_size", "2")
    assert code == 0 and picture.size == (3 * 33 - 1, 2 * 33 - 1)
    assert "rows from the top: one, three" in capsys.readouterr().out


def test_classes_of_the_second_classifier(several, tmp_path, capsys):
    code, picture = sample(several, tmp_path, "--classifier_index", "1", "--num_images", "3")
    assert code == 0
    assert "rows from the top: one, two, three" in capsys.readouterr().out
    generator = HfkdConditionalGeneratorModel.from_pretrained(several)
    images = generator.sample(3, torch.arange(3), seed=0, classifier_index=1)
    assert picture.tobytes() == class_grid(images, torch.arange(3)).tobytes()
    assert sample(several, tmp_path, "--classifier_index", "2")[0] == 2
    assert "classifier_index 2 is outside the generator's 2 classifiers" in error_of(capsys)


def test_the_generator_of_a_bigan_run(bigan, tmp_path, capsys):
    code, picture = sample(bigan / "generator", tmp_path, "--num_images", "9")
    assert code == 0 and picture.size == (3 * 33 - 1, 3 * 33 - 1)
    assert "9 images" in (out := capsys.readouterr().out) and "rows" not in out
    assert sample(bigan / "generator", tmp_path, "--labels", "0")[0] == 2
    assert "labels [0]: this generator knows no classes" in error_of(capsys)


def test_the_encoder_of_a_bigan_run(bigan, tmp_path, capsys):
    code, picture = sample(bigan, tmp_path)
    assert code == 2 and picture is None
    error = error_of(capsys)
    assert f"'{bigan}' is a HfkdBiganEncoderModel, which makes no images" in error
    assert f"the generator beside it is {bigan / 'generator'}" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", "1", "4"], "label 4: the generator knows 4 classes: use 0 to 3"),
        (["--labels", "-1"], "label -1: "),
        (["--num_images", "0"], "num_images=0 is out of range"),
        (["--output", "grid.xyz"], "output 'grid.xyz': pictures of this ending are not known: use .png"),
        (["--output", "nowhere/grid.png"], "there is no folder 'nowhere'"),
        (["--lables", "1"], "--lables"),
    ],
)
def test_bad_options(conditional, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert main(["sample", str(conditional), *options]) == 2
    assert message in error_of(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_generator_in_a_folder_of_a_repo(bigan, hub, tmp_path):  # noqa: F811
    """In a process of its own, as HF_ENDPOINT is read when huggingface_hub is imported."""
    api = huggingface_hub.HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo("tester/bigan")
    api.upload_folder(repo_id="tester/bigan", folder_path=bigan)
    code = (
        "import sys; from hfkd.scripts.cli import main\n"
        "sys.exit(10 * main(['sample', 'tester/bigan/generators']) + main(['sample', 'tester/bigan/generator']))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=hub.environment(), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 20, done.stderr
    assert "generator 'tester/bigan/generators': the repo has no such folder" in done.stderr
    picture = Image.open(tmp_path / "samples.png").convert("L")
    assert picture.tobytes() == sample(bigan / "generator", tmp_path)[1].tobytes()


def test_a_network_that_is_no_generator(tmp_path, capsys):
    tiny_resnet(0).save_pretrained(tmp_path / "classifier")
    assert main(["sample", str(tmp_path / "classifier")]) == 2
    assert "is a HfkdResNetModel, which makes no images: give a generator's folder" in error_of(capsys)


def test_no_such_folder(tmp_path, capsys):
    assert main(["sample", str(tmp_path / "missing")]) == 2
    assert "is not a folder" in error_of(capsys)
    assert main(["sample"]) == 2
    assert "hfkd sample needs a generator first" in error_of(capsys)


def test_a_generator_without_some_of_its_weights(conditional, tmp_path, capsys):
    weights = load_file(conditional / "model.safetensors")
    lost = next(name for name in weights if name.endswith("weight"))
    del weights[lost]
    (tmp_path / "config.json").write_bytes((conditional / "config.json").read_bytes())
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert main(["sample", str(tmp_path)]) == 2
    assert f"lacks weights: {lost}: give a whole checkpoint" in error_of(capsys)


def test_points_make_no_picture(tmp_path, capsys):
    config = HfkdConditionalGeneratorConfig.for_images(1, 2, hidden_sizes=[8])
    HfkdConditionalGeneratorModel(config).save_pretrained(tmp_path / "points")
    assert main(["sample", str(tmp_path / "points"), "--output", str(tmp_path / "grid.png")]) == 2
    assert "makes images of 2 channels: only grey and RGB make a picture" in error_of(capsys)


def test_a_picture_that_cannot_be_written(conditional, tmp_path, capsys):
    (tmp_path / "grid.png").mkdir()
    assert main(["sample", str(conditional), "--output", str(tmp_path / "grid.png")]) == 1
    assert "grid.png: the picture cannot be written" in error_of(capsys)


def test_one_seed_gives_one_picture(bigan, tmp_path):
    first, again, other = (sample(bigan / "generator", tmp_path, "--seed", seed)[1] for seed in ("0", "0", "1"))
    assert first.tobytes() == again.tobytes() != other.tobytes()
    generator = AutoModel.from_pretrained(bigan / "generator")
    assert first.tobytes() == image_grid(generator.sample(64, seed=0)).tobytes()
