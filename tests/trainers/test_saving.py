"""What a run leaves on disk: students that load anywhere, whole checkpoints, no pickle, and a card whose code runs."""

import json
import re
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from mixed_cohorts import COHORTS, StrangersView, expected, make_cohort, our_resnet, students, write_image
from published_files import check_imports
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_runs import digit_sources
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hfkd.hub.manifest import file_sha256, verify_manifest
from hfkd.hub.remote_code import student_folder
from hfkd.trainers import publishing


# The fixtures below train and load once for all tests.
COHORT_NAMES = list(COHORTS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Both cohorts after training, saved."""
    made = {}
    for name in COHORTS:
        folder = tmp_path_factory.mktemp("run") / name.replace(" ", "-")
        trainer = make_cohort(folder, students(name))
        trainer.train()
        metrics = trainer.evaluate()
        trainer.save_model()
        made[name] = SimpleNamespace(folder=folder, trainer=trainer, students=list(trainer.model.students))
        made[name].metrics = metrics
    return made


@pytest.fixture(scope="module")
def distilled(runs, tmp_path_factory):
    """One more student, taught by a student of an earlier run that is loaded from its folder."""
    folder = tmp_path_factory.mktemp("run") / "offline"
    parent = runs["ours first"].folder / "student_1"
    teacher = AutoModelForImageClassification.from_pretrained(parent)
    trainer = make_cohort(folder, [our_resnet()], teacher=teacher, eval_strategy="no")
    trainer.train()
    trainer.save_model(str(folder.with_name("elsewhere")))
    return SimpleNamespace(folder=folder.with_name("elsewhere"), parent=parent, student=trainer.model.students[0])


@pytest.fixture(scope="module")
def tuned(runs, tmp_path_factory):
    """A cohort's root student and a peer, fine-tuned by the plain Trainer to three classes."""
    made = {}
    for name, where in (("root", {}), ("peer", {"subfolder": "student_1"})):
        model = AutoModelForImageClassification.from_pretrained(
            runs["ours first"].folder, **where, num_labels=3, ignore_mismatched_sizes=True
        )
        before = {key: value.clone() for key, value in model.state_dict().items()}
        folder = tmp_path_factory.mktemp("tuned")
        arguments = TrainingArguments(
            str(folder),
            max_steps=4,
            save_steps=2,
            learning_rate=1e-2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        processor = AutoImageProcessor.from_pretrained(runs["ours first"].folder)
        trainer = Trainer(model, arguments, train_dataset=_three_classes(), processing_class=processor)
        trainer.train()
        trainer.save_model()
        made[name] = SimpleNamespace(folder=folder, model=model, before=before)
    return made


def _three_classes():
    batch = digit_sources(3).test.materialise(
        {"key": torch.stack([torch.zeros(100), torch.arange(100)], dim=1).long()}
    )
    rows = zip(batch["pixel_values"], batch["labels"], strict=True)
    return [{"pixel_values": pixels, "labels": label} for pixels, label in rows if label < 3]


@pytest.fixture(scope="module")
def strangers_view(runs, distilled, tuned, tmp_path_factory):
    """What a user without hfkd gets from all of these folders."""
    view = StrangersView()
    for name, run in runs.items():
        for place in (run.folder, run.folder / "checkpoint-4", run.folder / "checkpoint-6"):
            view.load(f"{name} {place.name} 0", place)
            for k in (1, 2):
                view.load(f"{name} {place.name} {k}", place, subfolder=f"student_{k}")
        view.run_snippets(f"{name} card", snippets(run.folder))
    view.run_snippets("distilled card", snippets(distilled.folder))
    for name, one in tuned.items():
        view.load(f"tuned {name}", one.folder)
    folder = tmp_path_factory.mktemp("stranger")
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    found = view.look(environment, folder)
    return SimpleNamespace(found=found, image=folder / "image.png")


def snippets(folder):
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)


def metadata(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def assert_same(found, wanted):
    assert "failed" not in found, found.get("failed")
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


# -- every student loads -----------------------------------------------------------------------


@pytest.mark.parametrize("cohort", COHORT_NAMES)
def test_every_student_loads_where_hfkd_is_installed(runs, cohort, tmp_path):
    run, image = runs[cohort], write_image(tmp_path)
    for k, student in enumerate(run.students):
        wanted = expected(student, image)
        where = {"subfolder": f"student_{k}"} if k else {}
        model = AutoModelForImageClassification.from_pretrained(run.folder, **where)
        assert type(model) is type(student)
        assert_same(expected(model, image), wanted)
        backbone = AutoModel.from_pretrained(run.folder, **where)
        assert type(backbone) is type(student.base_model)
        classify = pipeline("image-classification", model=str(run.folder), model_kwargs=where)
        scores = {answer["label"]: answer["score"] for answer in classify(str(image), top_k=10)}
        assert scores == pytest.approx(wanted["scores"], rel=1e-5)


@pytest.mark.parametrize("cohort", COHORT_NAMES)
def test_every_student_loads_where_it_is_not(runs, cohort, strangers_view):
    for k, student in enumerate(runs[cohort].students):
        found = strangers_view.found[f"{cohort} {runs[cohort].folder.name} {k}"]
        assert_same(found, expected(student, strangers_view.image))
        room = "transformers_modules" if type(student).__name__.startswith("Hfkd") else "transformers"
        assert found["class"] == f"{room}.{type(student).__name__}"


@pytest.mark.parametrize("cohort", COHORT_NAMES)
def test_every_checkpoint_is_itself_the_students(runs, cohort, strangers_view):
    for k, student in enumerate(runs[cohort].students):
        # The last checkpoint has the final weights, the one before it others.
        assert_same(strangers_view.found[f"{cohort} checkpoint-6 {k}"], expected(student, strangers_view.image))
        checkpoint = runs[cohort].folder / "checkpoint-4"
        where = {"subfolder": f"student_{k}"} if k else {}
        earlier = AutoModelForImageClassification.from_pretrained(checkpoint, **where)
        wanted = expected(earlier, strangers_view.image)
        assert_same(strangers_view.found[f"{cohort} checkpoint-4 {k}"], wanted)
        assert wanted["logits"] != expected(student, strangers_view.image)["logits"]


# -- what the files hold -----------------------------------------------------------------------


@pytest.mark.parametrize("cohort", COHORT_NAMES)
def test_no_pickle_and_nothing_else_unexpected(runs, cohort):
    files = [path for path in runs[cohort].folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".py", ".md", ".png"}
    assert not [path for path in files if path.relative_to(runs[cohort].folder).parts[0].startswith(".")]
    for checkpoint in runs[cohort].folder.glob("checkpoint-*"):
        verify_manifest(checkpoint)
    for path in files:
        content = path.read_bytes()
        assert not content.startswith((b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK")), path
        if path.suffix == ".json":
            json.loads(content, parse_constant=pytest.fail)  # NaN and Infinity are not JSON


@pytest.mark.parametrize("cohort", COHORT_NAMES)
def test_weights_are_the_students_and_nothing_of_the_training(runs, cohort):
    run = runs[cohort]
    training_only = run.trainer.model.training_only.state_dict()
    assert len(training_only) > 10
    for place in (run.folder, run.folder / "checkpoint-6"):
        for k, student in enumerate(run.students):
            file = student_folder(place, k) / "model.safetensors"
            with safe_open(file, "pt") as stored:
                assert stored.metadata() == {"format": "pt"}
            saved = load_file(file)
            # Stock models rename some keys as they are saved, so it is the contents that are compared.
            assert contents(saved) == contents(student.state_dict())
    state = load_file(run.folder / "checkpoint-6/training_state/networks.safetensors")
    assert contents(state) == contents(training_only)
    assert not (run.folder / "training_state").exists()


def contents(state):
    return sorted((tuple(value.shape), value.flatten().tolist()) for value in state.values())


@pytest.mark.parametrize("cohort", COHORT_NAMES)
def test_published_code_imports_only_what_everyone_has(runs, cohort):
    files = sorted(runs[cohort].folder.rglob("*.py"))
    assert len({path.name for path in files}) == 7  # two families, which share three files
    for folder in {file.parent for file in files}:
        check_imports(list(folder.glob("*.py")))


# -- the card ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cohort", COHORT_NAMES)
def test_the_cards_code_runs(runs, cohort, strangers_view):
    run, image = runs[cohort], strangers_view.image
    assert len(snippets(run.folder)) == 2
    first, second = (expected(student, image) for student in run.students[:2])
    wanted = {"logits": first["logits"], "classify": first["scores"], "peer": second["scores"]}
    assert_same(strangers_view.found[f"{cohort} card"], wanted)


@pytest.mark.parametrize("cohort", COHORT_NAMES)
def test_the_card_has_a_curve_and_what_was_measured(runs, cohort):
    run = runs[cohort]
    assert (run.folder / "curve.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "![Training curves](curve.png)" in (run.folder / "README.md").read_text()
    (entry,) = metadata(run.folder)["model-index"]
    values = {metric["name"]: metric["value"] for result in entry["results"] for metric in result["metrics"]}
    for k in range(3):
        assert values[f"Accuracy, Student {k}"] == run.metrics[f"eval_student_{k}_accuracy"]
    assert values["Accuracy, Ensemble (mean of logits)"] == run.metrics["eval_ensemble_accuracy"]


def test_a_local_teacher_stands_in_the_body(distilled, strangers_view):
    text, parent = (distilled.folder / "README.md").read_text(), distilled.parent
    digest = file_sha256(parent / "model.safetensors")
    assert f"Teacher: `{parent.name}` (local; model.safetensors sha256 `{digest}`)" in text
    assert "base_model" not in metadata(distilled.folder)
    assert str(parent) not in text
    assert (distilled.folder / "config.json").is_file() and not list(distilled.folder.glob("student_*"))
    # Saved elsewhere than into output_dir: the card loads the folder that it lies in.
    wanted = expected(distilled.student, strangers_view.image)
    assert len(snippets(distilled.folder)) == 1
    assert_same(strangers_view.found["distilled card"], {"logits": wanted["logits"], "classify": wanted["scores"]})


@pytest.mark.parametrize("stale", ["measured before training", "best model restored"])
def test_the_card_tells_no_numbers_of_other_weights(tmp_path, stale):
    if stale == "measured before training":
        trainer = make_cohort(tmp_path, max_steps=2, eval_strategy="no")
        trainer.evaluate()
        trainer.train()
    else:
        settings = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
        trainer = make_cohort(tmp_path, **settings)
        trainer.train()
        assert trainer.state.best_global_step < trainer.state.global_step
    trainer.save_model()
    assert "model-index" not in metadata(tmp_path)
    trainer.evaluate()
    trainer.save_model()
    assert "model-index" in metadata(tmp_path)


def test_the_card_tells_the_training_time_however_late_it_is_written(runs, tmp_path, monkeypatch):
    now = time.monotonic()
    monkeypatch.setattr(publishing.time, "monotonic", lambda: now + 3600)
    runs["ours first"].trainer.write_card(tmp_path)
    assert "Training time: 0 min" in (tmp_path / "README.md").read_text()


# -- everyday use ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["root", "peer"])
def test_the_plain_trainer_fine_tunes_a_student(tuned, name, strangers_view):
    one = tuned[name]
    changed = [key for key, value in one.model.state_dict().items() if not torch.equal(value, one.before[key])]
    assert any(key.endswith("0.branch.0.weight") for key in changed) and one.model.config.num_labels == 3
    wanted = expected(one.model, strangers_view.image)
    again = AutoModelForImageClassification.from_pretrained(one.folder)
    assert type(again) is type(one.model) and len(wanted["logits"]) == 3
    assert_same(expected(again, strangers_view.image), wanted)
    checkpoint = AutoModelForImageClassification.from_pretrained(one.folder / "checkpoint-4")
    assert_same(expected(checkpoint, strangers_view.image), wanted)
    assert_same(strangers_view.found[f"tuned {name}"], wanted)
