"""`hfkd evaluate --protocol knn | linear-probe`: the probes' options, and the network that is saved with its head."""

import json
import os

import pytest
import torch
from clean_process import run_clean
from generative_runs import tiny_trainer
from hub_metadata import check_card
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import tiny_resnet
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, Trainer, TrainingArguments

from hfkd.data import load_digits
from hfkd.evaluation.knn import KNNSettings, knn_accuracy
from hfkd.hub.manifest import file_sha256, verify_manifest
from hfkd.hub.remote_code import write_code
from hfkd.models import HfkdDcganDiscriminatorConfig, HfkdDcganDiscriminatorModel, build_image_processor, build_student
from hfkd.scripts.cli import main


SGD = ["--probe", "sgd", "--probe_learning_rate", "1", "--probe_epochs", "3", "--probe_batch_size", "50"]
DIGITS = ["--dataset_name", "digits", "--max_train_samples", "200"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """An encoder without a head, as a trainer saves it, with a card."""
    folder = tmp_path_factory.mktemp("encoder")
    names = [str(digit) for digit in range(10)]
    classifier = build_student("vae_encoder_8px", class_names=names, image_size=8, num_channels=1)
    tiny_trainer("vae", folder, networks=[classifier], license="mit").save_model()
    return folder


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Two students that know five classes."""
    folder = tmp_path_factory.mktemp("cohort")
    students = [tiny_resnet(seed, num_labels=5) for seed in (0, 1)]
    for student, place in zip(students, (folder, folder / "student_1"), strict=True):
        student.save_pretrained(place)
        build_image_processor(8, 3, [0.3] * 3, [0.4] * 3).save_pretrained(place)
    write_code(students, folder)
    return folder


@pytest.fixture(scope="module")
def discriminator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("discriminator")
    config = HfkdDcganDiscriminatorConfig(num_channels=1, image_size=16, width=8)
    HfkdDcganDiscriminatorModel(config).save_pretrained(folder)
    build_image_processor(16, 1, [0.5], [0.5]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def probed(encoder, tmp_path_factory):
    """The encoder with a logistic probe's head, and the result that the command wrote."""
    folder = tmp_path_factory.mktemp("probed")
    output = folder / "result.json"
    assert evaluate(encoder, "linear-probe", "--output_dir", folder / "model", "--output", output) == 0
    return folder / "model", json.loads(output.read_text())


def evaluate(checkpoint, protocol, *options):
    argv = ["evaluate", checkpoint, *DIGITS, "--protocol", protocol, *options]
    return main([str(argument) for argument in argv])


def result_of(tmp_path, *argv):
    assert evaluate(*argv, "--output", tmp_path / "result.json") == 0
    return json.loads((tmp_path / "result.json").read_text())


def error_of(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


# -- options ---------------------------------------------------------------------------------------


def test_knn_with_the_papers_settings(encoder, tmp_path):
    usual = result_of(tmp_path, encoder, "knn")
    papers = result_of(tmp_path, encoder, "knn", "--knn_neighbours", "200", "--knn_temperature", "0.1")
    assert usual["settings"] | {"neighbours": 20, "temperature": 0.07} == usual["settings"]
    assert papers["settings"] | {"neighbours": 200, "temperature": 0.1} == papers["settings"]
    assert usual["metrics"] != papers["metrics"]


def test_the_papers_nearest_neighbours_by_hand():
    """Weights exp(cosine / 0.1) of 403.43, 14764.8 and 2981.0: class 0 wins by 14764.8 against 3384.4."""
    bank, labels = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), torch.tensor([1, 0, 1])
    query = torch.tensor([[0.6, 0.8]])
    assert knn_accuracy(bank, labels, query, torch.tensor([0]), KNNSettings(3, 0.1))[0] == 1.0


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_sgd_probe_of_every_student(cohort, tmp_path, capsys, optimizer):
    result = result_of(tmp_path, cohort, "linear-probe", *SGD, "--probe_optimizer", optimizer)
    assert list(result["metrics"]) == [f"student_{k}_{name}" for k in (0, 1) for name in ("accuracy", "best_accuracy")]
    assert all(
        result["metrics"][f"student_{k}_best_accuracy"] >= result["metrics"][f"student_{k}_accuracy"] for k in (0, 1)
    )
    settings = result["settings"]
    assert settings["probe"] == "sgd" and settings["optimizer"] == optimizer and settings["epochs"] == 3
    assert settings["augmentation"] == "random resized crops (0.08, 1)"  # of digits, which are not flipped
    out = capsys.readouterr().out
    assert "student 0 best" in out and "learning_rate: 1" in out


def test_sgd_probe_of_images_as_they_are_is_another_measurement(cohort, tmp_path):
    options = [cohort, "linear-probe", *SGD]
    augmented = result_of(tmp_path, *options)
    plain = result_of(tmp_path, *options, "--probe_augment", "false")
    flipped = result_of(tmp_path, *options, "--horizontal_flip", "true")
    seeded = result_of(tmp_path, *options, "--probe_seed", "1", "--bf16", "true")
    assert len({json.dumps(found["metrics"]) for found in (augmented, plain, flipped, seeded)}) == 4
    assert plain["settings"]["augmentation"] == "none" and seeded["settings"]["bf16"] is True
    assert flipped["settings"]["augmentation"] == "random resized crops (0.08, 1), flips"


def test_large_images_are_cut_where_they_are_decoded(tmp_path):
    folder = tmp_path / "large"
    tiny_resnet(0).save_pretrained(folder)
    build_image_processor(100, 1, [0.3], [0.4]).save_pretrained(folder)
    few = ["--max_train_samples", "40", "--test_size", "20", "--probe", "sgd", "--probe_epochs", "2"]
    cut = result_of(tmp_path, folder, "linear-probe", *few, "--probe_learning_rate", "1")
    whole = result_of(tmp_path, folder, "linear-probe", *few, "--probe_augment", "false")
    assert cut["settings"]["augmentation"] == "random resized crops (0.08, 1)" and cut["n_test"] == 20
    assert whole["settings"]["augmentation"] == "none"


def test_a_discriminator_has_features(discriminator, tmp_path, capsys):
    single = result_of(tmp_path, discriminator, "linear-probe")
    multi = result_of(tmp_path, discriminator, "linear-probe", "--features", "blocks")
    assert single["settings"]["features"] == "last" and multi["settings"]["features"] == "blocks"
    assert 0.3 < single["metrics"]["student_0_accuracy"] < multi["metrics"]["student_0_accuracy"]
    assert result_of(tmp_path, discriminator, "linear-probe", *SGD)["metrics"].keys() > single["metrics"].keys()
    assert evaluate(discriminator, "accuracy") == 2
    assert "was saved without a classifier" in error_of(capsys)
    weights = load_file(discriminator / "model.safetensors")
    assert evaluate(discriminator, "linear-probe", "--output_dir", tmp_path / "new") == 2
    assert "has no place for a classifier" in error_of(capsys) and not (tmp_path / "new").exists()
    after = AutoModel.from_pretrained(discriminator).state_dict()
    assert all(torch.equal(value, after[name]) for name, value in weights.items())


@pytest.mark.parametrize(
    ("protocol", "options", "message"),
    [
        ("knn", ["--probe", "sgd"], "--probe is for --protocol linear-probe, and --protocol is 'knn'"),
        ("linear-probe", ["--knn_neighbours", "3"], "--knn_neighbours is for --protocol knn"),
        ("linear-probe", ["--probe_epochs", "3"], "--probe_epochs is for --probe sgd, and --probe is 'logistic'"),
        ("accuracy", ["--bf16", "true"], "--bf16 is for --protocol linear-probe"),
        ("knn", ["--output_dir", "somewhere"], "--output_dir is for --protocol linear-probe"),
        ("knn", ["--knn_neighbours", "0"], "neighbours=0"),
        ("linear-probe", [*SGD, "--probe_learning_rate", "-1"], "learning_rate=-1"),
        ("linear-probe", ["--output_dir", "somewhere"], "output_dir=somewhere: the checkpoint has 2 students"),
        ("linear-probe", ["--features", "blocks"], "features=blocks needs a discriminator"),
    ],
)
def test_options_without_effect_are_refused(cohort, tmp_path, capsys, monkeypatch, protocol, options, message):
    monkeypatch.chdir(tmp_path)
    assert evaluate(cohort, protocol, *options) == 2
    assert message in error_of(capsys) and not (tmp_path / "somewhere").exists()


# -- the folder with the head ----------------------------------------------------------------------


def images_and_labels(folder):
    """The digits that were tested on, as the saved processor makes them."""
    digits = load_digits().train_test_split(test_size=0.2, seed=0)["test"]
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = processor([image.convert("RGB") for image in digits["image"]], return_tensors="pt")["pixel_values"]
    return pixels, torch.tensor(digits["label"])


def test_one_folder_is_backbone_and_classifier(encoder, probed):
    folder, result = probed
    verify_manifest(folder)
    classifier, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert classifier.config.id2label == {digit: str(digit) for digit in range(10)}
    backbone, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    first = AutoModel.from_pretrained(encoder).state_dict()
    assert all(torch.equal(value, first[name]) for name, value in backbone.state_dict().items())
    pixels, _ = images_and_labels(folder)
    with torch.no_grad():
        features, logits = backbone.eval()(pixels).pooler_output, classifier.eval()(pixels).logits
    torch.testing.assert_close(logits, features @ classifier.classifier.weight.T + classifier.classifier.bias)
    assert result["metrics"]["student_0_accuracy"] > 0.5


def test_its_accuracy_is_the_probes(probed, tmp_path):
    folder, result = probed
    measured = result_of(tmp_path, folder, "accuracy")
    assert measured["metrics"]["accuracy"] == result["metrics"]["student_0_accuracy"]
    assert measured["n_test"] == result["n_test"]


def test_its_card_names_the_parent_the_settings_and_the_result(encoder, probed, tmp_path):
    folder, result = probed
    text = (folder / "README.md").read_text()
    assert check_card(text) == ([], [])
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit" and card.data.pipeline_tag == "image-classification"
    (measured,) = card.data.eval_results
    assert measured.metric_value == pytest.approx(result["metrics"]["student_0_accuracy"])
    digest = file_sha256(encoder / "model.safetensors")
    assert f"Backbone: `{encoder.name}` (local; model.safetensors sha256 `{digest}`" in text
    assert "Settings of the probe:" in text and "| `inverse_regularisation` | `1.0` |" in text
    Image.new("L", (20, 20), 90).save(tmp_path / "image.png")
    code = text.split("```python\n")[1].split("```")[0]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    assert "'label': " in run_clean(code, environment, tmp_path)


def test_a_plain_trainer_fine_tunes_it(probed, tmp_path):
    folder, _ = probed
    model = AutoModelForImageClassification.from_pretrained(folder)
    pixels, labels = images_and_labels(folder)
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(pixels[:96], labels[:96], strict=True)]
    settings = {"learning_rate": 1e-5, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(str(tmp_path / "tuned"), max_steps=6, per_device_train_batch_size=96, **settings)
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    trainer.save_model()
    tuned = AutoModelForImageClassification.from_pretrained(tmp_path / "tuned")
    assert not torch.equal(
        tuned.classifier.weight, AutoModelForImageClassification.from_pretrained(folder).classifier.weight
    )


def test_the_head_of_an_sgd_probe_is_saved_too_and_nothing_is_overwritten(cohort, tmp_path, capsys):
    options = [*SGD, "--output_dir", tmp_path / "model"]
    result = result_of(tmp_path, cohort / "student_1", "linear-probe", *options)
    measured = result_of(tmp_path, tmp_path / "model", "accuracy")
    assert measured["metrics"]["accuracy"] == result["metrics"]["student_0_accuracy"]
    assert evaluate(cohort / "student_1", "linear-probe", *options) == 2
    assert "it exists and is not an empty folder: choose another" in error_of(capsys)
