"""`hfkd evaluate` on images with several labels each."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from generative_runs import tiny_trainer
from safetensors.torch import load_file, save_file
from sklearn.metrics import average_precision_score
from tiny_runs import tiny_resnet

from hfkd.data import load_digits
from hfkd.hub.remote_code import write_code
from hfkd.models import build_image_processor, build_student
from hfkd.scripts.cli import main


NAMES = ["even", "large", "round"]  # of a digit


def labels_of(digit: int) -> list[int]:
    """One digit has no label at all."""
    return [number for number, holds in enumerate((digit % 2 == 0, digit > 5, digit in (0, 6, 8, 9))) if holds]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The digits as parquet files: 100 to train on, 80 to test on."""
    folder = tmp_path_factory.mktemp("several")
    features = datasets.Features({"image": datasets.Image(), "tags": [datasets.ClassLabel(names=NAMES)]})
    digits = load_digits()
    for split, rows in (("train", range(100)), ("test", range(100, 180))):
        part = digits.select(rows)
        columns = {"image": part["image"], "tags": [labels_of(digit) for digit in part["label"]]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """Two students with an output for each label, as they are saved."""
    folder = tmp_path_factory.mktemp("cohort")
    students = [tiny_resnet(seed, num_labels=len(NAMES)) for seed in (0, 1)]
    for student, place in zip(students, (folder, folder / "student_1"), strict=True):
        student.config.id2label = dict(enumerate(NAMES))
        student.save_pretrained(place)
        build_image_processor(8, 3, [0.5] * 3, [0.5] * 3).save_pretrained(place)
    write_code(students, folder)
    return folder


def test_mean_average_precision_of_each_student(data, cohort, tmp_path, capsys):
    argv = ["evaluate", cohort, "--dataset_name", data, "--output", tmp_path / "result.json", "--batch_size", "30"]
    assert main([str(argument) for argument in argv]) == 0
    digits = load_digits().select(range(100, 180))
    pixels = torch.tensor(np.stack(digits["image"]), dtype=torch.float32)[:, None] / 255
    truth = np.array([[number in labels_of(digit) for number in range(3)] for digit in digits["label"]])
    wanted = {}
    for seed in (0, 1):
        with torch.no_grad():
            scores = tiny_resnet(seed, num_labels=3).eval()((pixels - 0.5) / 0.5).logits
        wanted[f"student_{seed}_mean_average_precision"] = average_precision_score(truth, scores.numpy())
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["metrics"] == {name: pytest.approx(value, abs=1e-6) for name, value in wanted.items()}
    assert result["n_test"] == 80
    out = capsys.readouterr().out
    assert "mean average precision on 80 test images" in out and "accuracy" not in out
    for seed in (0, 1):
        assert f"student {seed}  {wanted[f'student_{seed}_mean_average_precision']:.4f}" in out


@pytest.mark.parametrize("protocol", ["knn", "linear-probe"])
def test_probes_want_one_label_for_each_image(data, cohort, capsys, protocol):
    assert main(["evaluate", str(cohort), "--dataset_name", str(data), "--protocol", protocol]) == 2
    assert f"error: protocol '{protocol}' needs one label per image, and " in capsys.readouterr().err


def test_other_labels_than_the_students_know(cohort, capsys):
    assert main(["evaluate", str(cohort), "--dataset_name", "digits"]) == 2
    assert "the checkpoint knows 3 classes and 'digits' has 10" in capsys.readouterr().err


def test_an_encoder_has_no_accuracy_of_its_own(tmp_path, capsys):
    """It knew ten classes before its head was left out; a fresh one would be measured."""
    names = [str(digit) for digit in range(10)]
    classifier = build_student("vae_encoder_8px", class_names=names, image_size=8, num_channels=1)
    tiny_trainer("vae", tmp_path, networks=[classifier]).save_model()
    argv = ["evaluate", str(tmp_path), "--dataset_name", "digits"]
    assert main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"hfkd: error: checkpoint '{tmp_path}' was saved without a classifier: ")
    assert main([*argv, "--protocol", "knn"]) == 0


def test_a_checkpoint_without_some_of_its_weights(cohort, tmp_path, capsys):
    """What no protocol may measure: the probes would be of random features."""
    folder = tmp_path / "damaged"
    shutil.copytree(cohort, folder)
    weights = load_file(folder / "student_1/model.safetensors")
    del weights[next(name for name in weights if name.startswith("backbone."))]
    save_file(weights, folder / "student_1/model.safetensors", {"format": "pt"})
    assert main(["evaluate", str(folder), "--dataset_name", "digits", "--protocol", "knn"]) == 2
    assert "student_1 lacks weights: backbone." in capsys.readouterr().err
