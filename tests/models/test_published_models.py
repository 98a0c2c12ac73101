"""Saved folders are whole custom-code repos: they load without hfkd, and everyday tools work on them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from published_files import check_imports
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from hfkd.models import (
    HfkdMlpModel,
    HfkdResNetConfig,
    HfkdResNetForImageClassification,
    HfkdResNetModel,
    HfkdWideResNetConfig,
    HfkdWideResNetForImageClassification,
    HfkdWideResNetModel,
    build_image_processor,
    build_student,
    code_files,
)


CODE = {
    "resnet8": {
        "configuration_convnet.py",
        "configuration_resnet.py",
        "layers.py",
        "modeling_convnet.py",
        "modeling_resnet.py",
    },
    "wrn_10_2": {
        "configuration_convnet.py",
        "configuration_wide_resnet.py",
        "layers.py",
        "modeling_convnet.py",
        "modeling_wide_resnet.py",
    },
    "mlp": {"configuration_convnet.py", "configuration_mlp.py", "modeling_convnet.py", "modeling_mlp.py"},
}
A_WEIGHT = {
    "resnet8": "backbone.stages.2.0.branch.0.weight",
    "wrn_10_2": "backbone.stages.2.0.branch.0.weight",
    "mlp": "backbone.stages.1.0.0.weight",
}
AUTO_MAPS = {
    "resnet8": {
        "AutoConfig": "configuration_resnet.HfkdResNetConfig",
        "AutoModel": "modeling_resnet.HfkdResNetModel",
        "AutoModelForImageClassification": "modeling_resnet.HfkdResNetForImageClassification",
    },
    "wrn_10_2": {
        "AutoConfig": "configuration_wide_resnet.HfkdWideResNetConfig",
        "AutoModel": "modeling_wide_resnet.HfkdWideResNetModel",
        "AutoModelForImageClassification": "modeling_wide_resnet.HfkdWideResNetForImageClassification",
    },
    "mlp": {
        "AutoConfig": "configuration_mlp.HfkdMlpConfig",
        "AutoModel": "modeling_mlp.HfkdMlpModel",
        "AutoModelForImageClassification": "modeling_mlp.HfkdMlpForImageClassification",
    },
}
DIGITS = [str(digit) for digit in range(10)]

# Runs where hfkd cannot be imported: every folder by each Auto class and as a pipeline; prints what they give.
STRANGER = """
import importlib.abc, json, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hfkd":
            raise ModuleNotFoundError("hfkd is not here")

sys.meta_path.insert(0, Block())
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageClassification, pipeline

torch.set_num_threads(1)
results = {}
for folder in sys.argv[2:]:
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    backbone = AutoModel.from_pretrained(folder, trust_remote_code=True)
    classify = pipeline("image-classification", model=folder, trust_remote_code=True)
    image = Image.open(sys.argv[1])
    pixels = classify.image_processor(image.convert("RGB"), return_tensors="pt").pixel_values
    with torch.no_grad():
        results[folder] = {
            "logits": model(pixels).logits.tolist(),
            "pooled": backbone(pixels).pooler_output.tolist(),
            "scores": {row["label"]: row["score"] for row in classify(image, top_k=10)},
            "module": type(model).__module__,
        }
assert not any(name.split(".")[0] == "hfkd" for name in sys.modules)
print(json.dumps(results))
"""


@pytest.fixture(params=CODE)
def name(request):
    return request.param


def classifier(name, **settings):
    return build_student(name, **{"class_names": DIGITS, "image_size": 8, "num_channels": 1, **settings}).eval()


@pytest.fixture(scope="module")
def strangers_view(tmp_path_factory):
    """Each family saved with its processor, and what a clean process makes of the folders, for one grey digit."""
    root = tmp_path_factory.mktemp("published")
    image = Image.fromarray((load_digits().images[0] * 15).astype(np.uint8))
    image.save(root / "digit.png")
    models = {name: classifier(name) for name in CODE}
    processor = build_image_processor(8, 1, [0.3], [0.37])
    for name, model in models.items():
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(root / "modules")}
    run = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, root / "digit.png", *(root / name for name in CODE)],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout.splitlines()[-1])
    pixels = processor(image, return_tensors="pt").pixel_values
    return {name: (models[name], pixels, results[str(root / name)]) for name in CODE}


def test_loads_without_hfkd(name, strangers_view):
    model, pixels, result = strangers_view[name]
    assert result["module"].startswith("transformers_modules.")
    with torch.no_grad():
        logits, pooled = model(pixels).logits, model.base_model(pixels).pooler_output
    torch.testing.assert_close(torch.tensor(result["logits"]), logits)
    torch.testing.assert_close(torch.tensor(result["pooled"]), pooled)


def test_pipeline_without_hfkd_classifies_a_grey_digit(name, strangers_view):
    model, pixels, result = strangers_view[name]
    with torch.no_grad():
        probabilities = model(pixels).logits.softmax(-1)[0]
    scores = torch.tensor([result["scores"][label] for label in DIGITS])
    torch.testing.assert_close(scores, probabilities)


@pytest.mark.parametrize("save", ["classifier", "backbone"])
def test_every_save_has_the_code_and_the_full_auto_map(tmp_path, name, save):
    model = classifier(name)
    (model if save == "classifier" else model.base_model).save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.glob("*.py")} == CODE[name]
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAPS[name]


def test_auto_classes_know_the_families(tmp_path, name):
    model, images = classifier(name), torch.randn(2, 1, 8, 8)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    backbone = AutoModel.from_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    assert (type(loaded), type(backbone)) == (type(model), type(model.base_model))
    assert torch.equal(loaded(images).logits, model(images).logits)
    assert torch.equal(backbone(images).pooler_output, model.base_model(images).pooler_output)


@pytest.mark.parametrize("norm", ["group", "none"])
def test_norm_variants_survive_saving(tmp_path, norm):
    for model in (
        HfkdResNetForImageClassification(HfkdResNetConfig(depths=[1, 1, 1], norm=norm, shortcut="A")),
        HfkdWideResNetForImageClassification(HfkdWideResNetConfig(depth=10, norm=norm)),
    ):
        model.save_pretrained(tmp_path)
        images = torch.randn(2, 3, 8, 8)
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
        assert torch.equal(loaded(images).logits, model.eval()(images).logits)


def test_published_files_import_only_what_everyone_has(name):
    check_imports(code_files(classifier(name)))


def test_code_files_of_ours_of_stock_and_of_remote_models(tmp_path, name, remote_modules):
    model = classifier(name)
    assert {file.name for file in code_files(model)} == CODE[name]
    assert code_files(ResNetForImageClassification(ResNetConfig(hidden_sizes=[8], depths=[1], embedding_size=8))) == []

    model.save_pretrained(tmp_path / "first")
    remote_class = get_class_from_dynamic_module(
        AUTO_MAPS[name]["AutoModelForImageClassification"], tmp_path / "first"
    )
    remote = remote_class.from_pretrained(tmp_path / "first")
    assert type(remote).__module__.startswith("transformers_modules.")
    files = code_files(remote)
    assert {file.name for file in files} == CODE[name]
    assert all(file.is_relative_to(tmp_path / "modules") for file in files)

    remote.save_pretrained(tmp_path / "second")
    assert {file.name for file in (tmp_path / "second").glob("*.py")} == CODE[name]
    assert json.loads((tmp_path / "second" / "config.json").read_text())["auto_map"] == AUTO_MAPS[name]


def test_plain_trainer_fine_tunes_and_its_output_loads(tmp_path, name):
    classifier(name).save_pretrained(tmp_path / "pretrained")
    model = AutoModelForImageClassification.from_pretrained(
        tmp_path / "pretrained", num_labels=3, ignore_mismatched_sizes=True
    )
    before = load_file(tmp_path / "pretrained" / "model.safetensors")[A_WEIGHT[name]]
    images, labels = load_digits(n_class=3, return_X_y=True)
    data = [
        {"pixel_values": torch.tensor(image, dtype=torch.float32).view(1, 8, 8) / 16, "labels": int(label)}
        for image, label in zip(images[:64], labels[:64], strict=True)
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "tuned"),
        max_steps=8,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    assert not trainer.model_accepts_loss_kwargs
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.7 * losses[0] < 0.7 * 2 * np.log(3)  # and not summed over the accumulation steps
    trainer.save_model()
    tuned = AutoModelForImageClassification.from_pretrained(tmp_path / "tuned")
    assert tuned.config.num_labels == 3
    batch = torch.stack([row["pixel_values"] for row in data[:4]])
    assert torch.equal(tuned(batch).logits, model.eval()(batch).logits)
    assert not torch.equal(tuned.state_dict()[A_WEIGHT[name]], before)
    assert {file.name for file in (tmp_path / "tuned").glob("*.py")} == CODE[name]


def test_backbone_classes_load_from_classifier_weights(tmp_path):
    for name, backbone_class in (
        ("resnet8", HfkdResNetModel),
        ("wrn_10_2", HfkdWideResNetModel),
        ("mlp", HfkdMlpModel),
    ):
        model = classifier(name)
        model.save_pretrained(tmp_path / name)
        backbone = backbone_class.from_pretrained(tmp_path / name)
        for key, tensor in model.base_model.state_dict().items():
            assert torch.equal(backbone.state_dict()[key], tensor)
