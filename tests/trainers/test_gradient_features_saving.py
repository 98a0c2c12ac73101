"""What a run of gradient features leaves on disk: a model that loads anywhere, and its card."""

import json
import re
import shutil

import pytest
import torch
from clean_process import run_clean
from gradient_feature_runs import tiny_model, tiny_trainer
from mixed_cohorts import write_image
from test_online_adversarial import assert_equal, weights
from tiny_runs import digit_sources
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hfkd.hub.manifest import verify_manifest


MODES = ["full", "gradient", "activation", "finetune"]
STRANGER = """
import json, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from transformers import AutoModelForImageClassification, pipeline
found = {}
for folder in FOLDERS:
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    classify = pipeline("image-classification", model=folder, trust_remote_code=True)
    trainable = [name for name, parameter in model.train().named_parameters() if parameter.requires_grad]
    found[folder] = {
        "scores": {answer["label"]: answer["score"] for answer in classify("image.png", top_k=10)},
        "trainable": trainable,
        "module": type(model).__module__.partition(".")[0],
    }
exec(SNIPPET)
found["card"] = {answer["label"]: answer["score"] for answer in classify("image.png", top_k=10)}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A trained and saved model of every mode."""
    made = {}
    for mode in MODES:
        folder = tmp_path_factory.mktemp("run") / mode
        settings = {"learning_rate": 0.05, "save_strategy": "steps", "save_steps": 3, "max_steps": 6}
        trainer = tiny_trainer(folder, tiny_model(mode), **settings)
        trainer.train()
        trainer.evaluate()
        trainer.save_model()
        made[mode] = (folder, trainer)
    return made


def digits():
    source = digit_sources().test
    return source.materialise({"key": torch.stack([torch.zeros(100), torch.arange(100)], dim=1).long()})


@pytest.mark.parametrize("mode", MODES)
def test_loads_by_auto_class_with_the_same_logits(runs, mode):
    folder, trainer = runs[mode]
    model, images = trainer.model.students[0].eval(), digits()["pixel_values"]
    for place in (folder, folder / "checkpoint-6"):
        again = AutoModelForImageClassification.from_pretrained(place)
        assert_equal(weights(again), weights(model))
        assert torch.equal(again(images).logits, model(images).logits)
    earlier = AutoModelForImageClassification.from_pretrained(folder / "checkpoint-3")
    assert not torch.equal(earlier(images).logits, model(images).logits)
    backbone = AutoModel.from_pretrained(folder)
    assert torch.equal(backbone(images).pooler_output, model.base_model(images).pooler_output)


@pytest.fixture(scope="module")
def strangers_view(runs, tmp_path_factory):
    """What a process without hfkd makes of an image: with each model, and with the code of a card."""
    here = tmp_path_factory.mktemp("stranger")
    image = write_image(here)
    (snippet,) = re.findall(r"```python\n(.*?)```", (runs["full"][0] / "README.md").read_text(), re.DOTALL)
    code = STRANGER.replace("SNIPPET", repr(snippet)).replace("FOLDERS", repr([str(f) for f, _ in runs.values()]))
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(here / "home"), "OMP_NUM_THREADS": "1"}
    return image, json.loads(run_clean(code.replace("image.png", str(image)), environment, here).splitlines()[-1])


@pytest.mark.parametrize("mode", MODES)
def test_loads_without_hfkd(runs, strangers_view, mode):
    (folder, trainer), (image, found) = runs[mode], strangers_view
    own = pipeline("image-classification", model=str(folder))
    scores = pytest.approx({a["label"]: a["score"] for a in own(str(image), top_k=10)}, rel=1e-4, abs=1e-6)
    assert found[str(folder)]["scores"] == scores
    assert found[str(folder)]["module"] == "transformers_modules"
    trained = [name for name, p in trainer.model.students[0].named_parameters() if p.requires_grad]
    assert found[str(folder)]["trainable"] == trained
    if mode == "full":
        assert found["card"] == scores


def test_card_is_whole(runs):
    folder, trainer = runs["full"]
    card = (folder / "README.md").read_text()
    accuracy = trainer.measured[digit_sources().test.name]["eval_accuracy"]
    assert f"| Model | {accuracy:.4f} |" in card and "![Training curves](curve.png)" in card
    assert "arxiv:2004.05529" in card and "mu2020gradfeat" in card and "| `mode` | `full` |" in card


@pytest.mark.parametrize("mode", MODES)
def test_files_are_what_they_should_be(runs, mode):
    folder = runs[mode][0]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".py", ".md", ".png"}
    for checkpoint in folder.glob("checkpoint-*"):
        verify_manifest(checkpoint)


@pytest.mark.parametrize("mode", ["full", "finetune"])
def test_plain_trainer_fine_tunes_the_saved_model(runs, mode, tmp_path):
    folder = runs[mode][0]
    model = AutoModelForImageClassification.from_pretrained(folder, num_labels=3, ignore_mismatched_sizes=True)
    before, batch = weights(model), digits()
    rows = zip(batch["pixel_values"], batch["labels"], strict=True)
    rows = [{"pixel_values": pixels, "labels": label} for pixels, label in rows if label < 3]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=6, learning_rate=0.1, report_to="none", use_cpu=True, disable_tqdm=True,
        gradient_accumulation_steps=2, logging_steps=1, lr_scheduler_type="constant", save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=rows, processing_class=AutoImageProcessor.from_pretrained(folder)
    )
    trainer.train()
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] < 3  # a mean over the accumulated batches, not their sum
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    linearised = {f"backbone.base.{name}" for name in model.config.theta2}
    assert {name for name in changed if ".base." in name} == (linearised if mode == "finetune" else set())
    assert "activation_weight" in changed and "omega" not in changed
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert again.config.num_labels == 3
    assert torch.equal(again(batch["pixel_values"]).logits, model.eval()(batch["pixel_values"]).logits)


def test_a_trained_model_is_trained_on_in_a_new_run(runs, tmp_path):
    """From its folder, with its own omega; the parent is named in the card."""
    folder, _ = runs["full"]
    shutil.copytree(folder, tmp_path / "parent", ignore=shutil.ignore_patterns("checkpoint-*"))
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "parent")
    before = weights(model)
    trainer = tiny_trainer(tmp_path / "run", model, omega="given", max_steps=2)
    trainer.train()
    trainer.save_model()
    after = weights(model)
    assert torch.equal(after["omega"], before["omega"])
    assert not torch.equal(after["activation_weight"], before["activation_weight"])
    assert "Starting point: `parent` (local" in (tmp_path / "run/README.md").read_text()
