"""The parent that a generator's run names, and stationarity under it, in `hfkd evaluate --protocol generation`."""

import json
import shutil

import pytest
import torch
from classifier_runs import MEAN, STD, processor, tiny_generator, tiny_mlp

from hfkd.data import DataArguments, build_sources, load_image_datasets
from hfkd.losses.generator_from_classifier import (
    closed_form_scale,
    cross_entropy_potential,
    gradients_of,
    stationarity_loss,
)
from hfkd.models.smooth_relu import smooth_relu_gates
from hfkd.scripts.cli import main
from hfkd.scripts.methods import find_method
from hfkd.scripts.options import resolved, write_run_file


METHOD = find_method("generator-from-classifier")
DIGITS = tuple(range(10))
DATA = {"max_train_samples": 60, "validation_size": 0.0}
# Learned multipliers stay behind with the run; the temperature is that of cross-entropy's, which take their place.
RUN = {"stationarity_set": "all", "per_group": False, "gate_sharpness": 10.0, "multipliers": "network"}


def named(model):
    model.config.id2label = {digit: str(digit) for digit in DIGITS}
    return model


@pytest.fixture
def family(tmp_path):
    """Folders of a parent that was trained on sixty digits, it says, and of a generator that was born from it."""
    parent, generator = tmp_path / "parent", tmp_path / "generator"
    named(tiny_mlp(num_labels=10)).save_pretrained(parent)
    processor().save_pretrained(parent)
    write_run_file(parent, "max-margin", resolved([DataArguments], DATA))
    named(tiny_generator((10,))).save_pretrained(generator)
    write_run_file(generator, METHOD.name, resolved(METHOD.dataclasses(), {"classifiers": [str(parent)], **RUN}))
    return parent, generator


def evaluate(generator, *options):
    """Exit code and result."""
    path = generator.parent / "result.json"
    words = ["evaluate", generator, "--protocol", "generation", "--output", path, "--num_images", 40, *options]
    code = main([str(word) for word in words])
    return code, json.loads(path.read_text()) if path.exists() else None


def by_hand(images, labels):
    """sqrt(L_st), globally over all tensors, with the multipliers of cross-entropy."""
    model = tiny_mlp(num_labels=10)
    theta = dict(model.named_parameters())
    with smooth_relu_gates(10.0):
        logits = model(((images + 1) / 2 - MEAN) / STD).logits
    found = gradients_of(cross_entropy_potential(logits, labels, logits.detach().std()), theta)
    scale = closed_form_scale(theta, found, per_group=False)
    scaled = {name: scale * gradient for name, gradient in found.items()}
    return stationarity_loss(theta, scaled, per_group=False).sqrt().item()


def test_the_parent_of_the_run_and_its_own_images(family, capsys):
    parent, generator = family
    code, result = evaluate(generator)
    assert code == 0
    assert result["settings"]["classifier"] == str(parent) and result["settings"]["training images"] == 60
    metrics = result["metrics"]
    assert list(metrics) == ["generator", "held_out", "noise", "training"]
    assert all("self_accuracy" in metrics[row] for row in ("generator", "held_out", "noise"))
    labels = torch.arange(40) % 10
    images = named(tiny_generator((10,))).eval().sample(40, labels, seed=0)
    assert metrics["generator"]["sqrt_stationarity"] == pytest.approx(by_hand(images, labels), rel=1e-4)
    assert list(metrics["training"]) == ["sqrt_stationarity"]
    assert 0 < metrics["training"]["sqrt_stationarity"] <= 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-2:] == ["training", "images"]
    assert next(line for line in lines if line.startswith("diversity")).split()[-1] == "-"


def test_the_training_row_is_of_the_images_that_the_parent_was_trained_on(family):
    """The first sixty digits are those of the split, in their order: by hand as above."""
    parent, generator = family
    data = {"train_split": "train[:60]", "test_split": "train[60:200]", "validation_size": 0.0}
    write_run_file(parent, "max-margin", resolved([DataArguments], data))
    code, result = evaluate(generator)
    assert code == 0 and result["settings"]["training images"] == 60
    arguments = DataArguments(**data, augmentation="none")
    source = build_sources(load_image_datasets(arguments), arguments).train
    wanted = by_hand(source.images.float() / 127.5 - 1, source.labels)
    assert result["metrics"]["training"]["sqrt_stationarity"] == pytest.approx(wanted, rel=1e-4)


def test_a_parent_that_is_gone(family, capsys):
    parent, generator = family
    shutil.rmtree(parent)
    assert evaluate(generator)[0] == 2
    assert "no run.yaml says which images" in capsys.readouterr().err
    code, result = evaluate(generator, "--dataset_name", "digits")
    assert code == 0 and result["settings"]["classifier"] == "not given"
    assert list(result["metrics"]) == ["generator", "held_out", "noise"]


def test_a_full_batch_classifier_without_the_generators_run(family):
    """Stationarity is then that of the method's own settings."""
    parent, generator = family
    (generator / "run.yaml").unlink()
    code, result = evaluate(generator, "--classifier", parent)
    assert code == 0 and "training" in result["metrics"]
