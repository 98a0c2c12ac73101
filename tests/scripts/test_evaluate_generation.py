"""`hfkd evaluate GENERATOR --protocol generation` on the digits."""

import json
import shutil

import pytest
import torch
from generative_runs import tiny_trainer
from PIL import Image
from tiny_runs import tiny_resnet

from hfkd.data import DataArguments
from hfkd.models import HfkdConditionalGeneratorConfig, HfkdConditionalGeneratorModel, build_image_processor
from hfkd.scripts.cli import main
from hfkd.scripts.options import resolved, write_run_file


DIGITS = [str(digit) for digit in range(10)]
ROWS = ("generator", "held_out", "noise")


def save_generator(folder, names=DIGITS, **settings):
    small = {"latent_size": 4, "hidden_sizes": [8, 8], "id2label": dict(enumerate(names))}
    config = HfkdConditionalGeneratorConfig.for_images(8, **small, **settings)
    HfkdConditionalGeneratorModel(config).save_pretrained(folder)
    return folder


def save_classifier(folder, seed, data=None, **settings):
    """A classifier of digits with random weights; with `data` also the options that it was trained with."""
    model = tiny_resnet(seed, norm="none", **settings)
    model.config.id2label = {number: str(number) for number in range(model.config.num_labels)}
    model.save_pretrained(folder)
    build_image_processor(8, 3, [0.3] * 3, [0.4] * 3).save_pretrained(folder)
    if data is not None:
        write_run_file(folder, "online-adversarial", resolved([DataArguments], data))
    return folder


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return save_generator(tmp_path_factory.mktemp("generator"))


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """Trained on 100 of the digits, it says."""
    return save_classifier(tmp_path_factory.mktemp("parent"), 0, {"max_train_samples": 100, "validation_size": 0.0})


@pytest.fixture(scope="module")
def bigan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bigan")
    tiny_trainer("bigan", folder).save_model()
    return folder


def evaluate(checkpoint, tmp_path, *options):
    """Exit code and result."""
    path = tmp_path / "result.json"
    words = ["evaluate", checkpoint, "--protocol", "generation", "--output", path, "--num_images", 40, *options]
    code = main([str(word) for word in words])
    return code, json.loads(path.read_text()) if path.exists() else None


def error_of(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_generator_beside_held_out_images_and_noise(generator, parent, tmp_path, capsys):
    """The parent's run says which images it was trained on."""
    code, result = evaluate(generator, tmp_path, "--classifier", parent, "--picture", tmp_path / "nearest.png")
    assert code == 0 and tuple(result["metrics"]) == ROWS and result["protocol"] == "generation"
    assert result["n_test"] == 359
    settings = result["settings"]
    assert settings["training images"] == 100 and settings["images of generator"] == 40
    assert settings["judge"] == f"5 nearest of {settings['reference images']} held-out images"
    names = list(result["metrics"]["generator"])
    assert names[:2] == ["self_accuracy", "judge_accuracy"] and {"nearest_ssim", "coverage", "diversity"} < set(names)
    assert all(list(result["metrics"][row]) == names for row in ROWS)
    assert result["metrics"]["held_out"]["judge_accuracy"] > 0.8
    assert result["metrics"]["noise"]["diversity"] > 1.5
    out = capsys.readouterr().out
    assert "generator   held-out images             noise" in out
    held_out = result["metrics"]["held_out"]["judge_accuracy"]
    row = next(line for line in out.splitlines() if line.startswith("judge accuracy"))
    assert row.split()[3] == f"{held_out:.4f}"
    # A row for each of ten classes: the sample and four of the training images.
    assert Image.open(tmp_path / "nearest.png").size == (5 * 33 - 1, 10 * 33 - 1)


def test_the_card_shows_what_was_measured(bigan, tmp_path):
    folder = tmp_path / "generator"
    shutil.copytree(bigan / "generator", folder)
    before = shutil.copyfile(bigan / "README.md", folder / "README.md").read_text()
    for seed in (0, 1):
        code, result = evaluate(folder, tmp_path, "--dataset_name", "digits", "--update_card", "--seed", seed)
        assert code == 0
    card = (folder / "README.md").read_text()
    added = card.partition("## Beside real images\n")[2].partition("## Training\n")[0]
    assert card.replace(f"## Beside real images\n{added}", "") == before
    metrics = result["metrics"]
    for name, value in metrics["generator"].items():
        cells = f"{value:.4f} | {metrics['held_out'][name]:.4f} | {metrics['noise'][name]:.4f} |"
        assert f"| {name.replace('_', ' ')} | {cells}" in added
    assert "- seed: 1\n" in added and "](nearest.png)" in added and "share the picture only where" in added
    assert Image.open(folder / "nearest.png").size[1] == 10 * 33 - 1


def test_a_generator_without_a_card(generator, tmp_path, capsys):
    assert evaluate(generator, tmp_path, "--dataset_name", "digits", "--update_card")[0] == 2
    assert "is no folder with a card" in error_of(capsys)


def test_self_accuracy_is_the_parents(generator, parent, tmp_path):
    """By hand: the parent sees its own normalisation of the generator's images."""
    _, result = evaluate(generator, tmp_path, "--classifier", parent, "--seed", 7)
    images = HfkdConditionalGeneratorModel.from_pretrained(generator).sample(40, torch.arange(40) % 10, seed=7)
    with torch.no_grad():
        found = tiny_resnet(0, norm="none").eval()(((images + 1) / 2 - 0.3) / 0.4).logits.argmax(1)
    wanted = (found == torch.arange(40) % 10).double().mean().item()
    assert result["metrics"]["generator"]["self_accuracy"] == pytest.approx(wanted)


def test_a_network_as_judge_gives_a_frechet_distance(generator, tmp_path):
    judge = save_classifier(tmp_path / "judge", 1)
    code, result = evaluate(generator, tmp_path, "--dataset_name", "digits", "--judge", judge)
    assert code == 0 and result["settings"]["judge"] == str(judge)
    distances = [result["metrics"][row]["frechet_distance"] for row in ROWS]
    assert distances[1] < min(distances[0], distances[2])
    assert "self_accuracy" not in result["metrics"]["generator"]


def test_another_dataset_is_not_cut_as_the_parents(generator, tmp_path):
    """Options of the run hold for its own dataset; the user's own go over them."""
    data = {"dataset_name": "somewhere", "max_train_samples": 100}
    parent = save_classifier(tmp_path / "parent", 0, data)
    _, result = evaluate(generator, tmp_path, "--classifier", parent, "--dataset_name", "digits")
    assert result["settings"]["training images"] == 1294
    parent = save_classifier(tmp_path / "digits", 0, {"max_train_samples": 100})
    _, result = evaluate(
        generator, tmp_path, "--classifier", parent, "--dataset_name", "digits", "--max_train_samples", 60
    )
    assert result["settings"]["training images"] == 60


def test_a_generator_without_classes(bigan, tmp_path, capsys):
    """Its classes are the judge's, and the data is that of the run around it."""
    write_run_file(bigan, "bigan", resolved([DataArguments], {"max_train_samples": 200}))
    code, result = evaluate(bigan / "generator", tmp_path, "--picture", tmp_path / "nearest.png")
    assert code == 0 and result["settings"]["training images"] == 200
    for row in ROWS:
        metrics = result["metrics"][row]
        assert "judge_accuracy" not in metrics and 0 < metrics["judge_confidence"] <= 1
        assert sum(metrics[f"judge_share_{digit}"] for digit in range(10)) == pytest.approx(1)
    assert Image.open(tmp_path / "nearest.png").size[1] == 10 * 33 - 1
    assert "judge confidence" in capsys.readouterr().out


def test_a_generator_of_several_classifiers(tmp_path):
    """The second knows the digits."""
    folder = save_generator(tmp_path / "several", ["a", "b", *DIGITS], class_counts=[2, 10])
    options = ["--dataset_name", "digits", "--max_train_samples", 50]
    assert evaluate(folder, tmp_path, *options, "--classifier_index", 1)[0] == 0
    assert evaluate(folder, tmp_path, *options)[0] == 2


def test_data_that_nothing_names(generator, tmp_path, capsys):
    assert evaluate(generator, tmp_path)[0] == 2
    assert "name them with --dataset_name, or give the run's folder by --classifier" in error_of(capsys)


def test_another_number_of_classes(tmp_path, capsys):
    folder = save_generator(tmp_path / "three", "abc")
    assert evaluate(folder, tmp_path, "--dataset_name", "digits")[0] == 2
    assert "three' knows 3 classes and 'digits' has 10" in error_of(capsys)
    judge = save_classifier(tmp_path / "judge", 0, num_labels=4)
    folder = save_generator(tmp_path / "ten")
    assert evaluate(folder, tmp_path, "--dataset_name", "digits", "--judge", judge)[0] == 2
    assert "the judge knows 4 classes and 'digits' has 10: give a judge of the same classes" in error_of(capsys)


def test_a_judge_without_a_classifier(generator, bigan, tmp_path, capsys):
    assert evaluate(generator, tmp_path, "--dataset_name", "digits", "--judge", bigan)[0] == 2
    assert "was saved without a classifier" in error_of(capsys)


def test_a_generator_under_a_classifiers_protocol(generator, capsys):
    assert main(["evaluate", str(generator), "--dataset_name", "digits"]) == 2
    error = error_of(capsys)
    assert f"checkpoint '{generator}' is a generator and no classifier: " in error
    assert f"hfkd evaluate {generator} --protocol generation" in error


def test_a_classifier_under_the_generators_protocol(parent, bigan, tmp_path, capsys):
    assert evaluate(parent, tmp_path)[0] == 2
    assert "is a HfkdResNetModel, which makes no images: give a generator's folder" in error_of(capsys)
    assert evaluate(bigan, tmp_path)[0] == 2
    assert f"the generator beside it is {bigan / 'generator'}" in error_of(capsys)


def test_options_of_the_other_protocols(parent, capsys):
    assert main(["evaluate", str(parent), "--dataset_name", "digits", "--num_images", "5"]) == 2
    assert "--num_images is for --protocol generation, and --protocol is 'accuracy'" in error_of(capsys)


def test_a_picture_is_refused_before_anything_is_measured(generator, tmp_path, capsys):
    assert evaluate(generator, tmp_path, "--dataset_name", "digits", "--picture", tmp_path / "no/nearest.png")[0] == 2
    assert "there is no folder" in error_of(capsys)
