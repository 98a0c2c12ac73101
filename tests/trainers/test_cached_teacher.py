"""Training on kept logits of the teachers is training with the teachers, which no step then runs."""

import json

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import NO_AUGMENTATION, digit_sources, tiny_resnet

from hfkd.errors import InputError
from hfkd.losses.online_adversarial import distillation_kl
from hfkd.models import build_image_processor
from hfkd.trainers import publishing
from hfkd.trainers.cached_teacher import CachedTeacher, CachedTeacherConfig


class KdTrainer(CachedTeacher):
    """Hinton's distillation, the least that asks for teachers' logits."""

    _name = "KD"
    _paper = {"title": "Distilling the Knowledge in a Neural Network", "id": "1503.02531", "citation": "@misc{kd}"}
    _tag_names = ["hfkd"]
    _template_file = "online_adversarial.md"
    least_students = 1

    def losses(self, features, batch):
        students = self.logits_of(features[: len(self.model.students)])
        target = self.teacher_logits(batch)
        if target is None:
            target = self.combine_teachers(self.logits_of(features[len(students) :]))
        losses = [F.cross_entropy(z, batch["labels"]) + distillation_kl(z, target, 4.0) for z in students]
        return losses, {f"student_{k}_loss": loss for k, loss in enumerate(losses)}


def teachers(dtype=torch.float32, seeds=(7, 8)):
    return [tiny_resnet(seed, width=6, dtype=dtype) for seed in seeds]


def kd_trainer(folder, cache=None, dtype=torch.float32, given=None, augmentation=NO_AUGMENTATION, **config):
    sources = digit_sources()
    processors = config.pop("processors", ())
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 50,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "teacher_cache_dir": None if cache is None else str(cache),
    }
    return KdTrainer(
        [tiny_resnet(0, dtype=dtype)],
        CachedTeacherConfig(str(folder), **(settings | config)),
        train_dataset=sources.train.variant(augmentation=augmentation),
        eval_dataset=sources.test,
        teachers=teachers(dtype) if given is None else given,
        teacher_processing_classes=processors,
    )


def weights(trainer):
    return trainer.model.students.state_dict()


def images_seen(trainer):
    """Images that the first teacher sees from now on."""
    seen = []
    teacher = trainer.model.frozen()[0].model
    teacher.register_forward_hook(lambda module, args, output: seen.append(len(output.logits)))
    return seen


def test_cached_and_live_teachers_train_the_same_student(tmp_path):
    plain, cached = (kd_trainer(tmp_path / "run", place, torch.float64) for place in (None, tmp_path / "cache"))
    for trainer in (plain, cached):
        trainer.train()
    for name, value in weights(cached).items():
        torch.testing.assert_close(value, weights(plain)[name], rtol=1e-9, atol=1e-9)
    fresh = tiny_resnet(0, dtype=torch.float64).parameters()
    assert not any(torch.equal(a, b) for a, b in zip(fresh, cached.model.students[0].parameters(), strict=True))


def test_in_single_precision_to_rounding(tmp_path):
    trainer = kd_trainer(tmp_path / "run", tmp_path / "cache")
    trainer.get_train_dataloader()
    batch = trainer._materialise(trainer.train_dataset, {"key": torch.tensor([[0, 3], [0, 199], [0, 3]])})
    with torch.no_grad():
        live = trainer.combine_teachers([teacher(batch["pixel_values"]).logits for teacher in trainer.model.frozen()])
    torch.testing.assert_close(trainer.teacher_logits(batch), live, rtol=1e-5, atol=1e-5)
    assert kd_trainer(tmp_path / "other").teacher_logits(batch) is None


def test_no_step_runs_a_teacher(tmp_path):
    first = kd_trainer(tmp_path / "run", tmp_path / "cache")
    seen = images_seen(first)
    first.train()
    assert seen == [200]  # what fills the cache
    again = kd_trainer(tmp_path / "again", tmp_path / "cache")
    seen = images_seen(again)
    again.train()
    assert seen == []
    for name, value in weights(first).items():
        assert torch.equal(value, weights(again)[name])


def test_top_k_trains_too(tmp_path):
    trainer = kd_trainer(tmp_path / "run", tmp_path / "cache", teacher_cache_top_k=3)
    before = trainer.train().metrics["train_loss"]
    size = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
    assert size < 200 * (4 * 3 + 4) + 4096
    assert before > 0 and trainer.teacher_logits({"index": torch.arange(4)}).shape == (4, 10)


def test_resume_is_exact(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": None}
    whole = kd_trainer(tmp_path / "run", tmp_path / "cache", **saving)
    whole.train()
    resumed = kd_trainer(tmp_path / "resumed", tmp_path / "cache", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name])


CHANGES = {
    "teacher weights": {"given": teachers(seeds=(7, 9))},
    "precision": {"bf16": True},
    "renormalisation": {"processors": [build_image_processor(8, 1, [0.4], [0.6])]},
    "top_k": {"teacher_cache_top_k": 2},
}


@pytest.fixture(scope="module")
def filled_cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    kd_trainer(folder / "run", folder / "cache").get_train_dataloader()
    return folder / "cache"


@pytest.mark.parametrize("part", CHANGES)
def test_a_cache_of_something_else_is_refused(tmp_path, filled_cache, part):
    trainer = kd_trainer(tmp_path / "run", filled_cache, **CHANGES[part])
    with pytest.raises(InputError, match=f"teacher_cache_dir=.* was made with other {part}: delete the folder"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_equal_weights_of_another_configuration_are_refused(tmp_path, filled_cache):
    others = teachers()
    others[0].config.initializer_range = 0.5
    trainer = kd_trainer(tmp_path / "run", filled_cache, given=others)
    with pytest.raises(InputError, match="made with other teacher configuration"):
        trainer.train()


def test_refused_before_the_first_step(tmp_path):
    augmentation = digit_sources().train.augmentation
    with pytest.raises(InputError, match="teacher_cache_dir needs images .*: choose augmentation=none"):
        kd_trainer(tmp_path, "cache", augmentation=augmentation)
    with pytest.raises(InputError, match="teacher_cache_dir=cache needs a teacher"):
        kd_trainer(tmp_path, "cache", given=[])
    with pytest.raises(InputError, match="teacher_cache_top_k=2 has no effect with teacher_cache_dir=None"):
        CachedTeacherConfig(str(tmp_path), teacher_cache_top_k=2, use_cpu=True)
    with pytest.raises(InputError, match="teacher_cache_top_k=0 is out of range"):
        CachedTeacherConfig(str(tmp_path), teacher_cache_dir="cache", teacher_cache_top_k=0, use_cpu=True)


# -- the teacher report ----------------------------------------------------------------------------------------------


def test_the_card_compares_student_and_teachers(tmp_path, monkeypatch):
    measured = []
    compare = publishing.teacher_report

    def watched(*given, **named):
        measured.append(compare(*given, rounds=1, **named))
        return measured[-1]

    monkeypatch.setattr(publishing, "teacher_report", watched)
    trainer = kd_trainer(tmp_path / "run", given=teachers(seeds=[7]), max_steps=2)
    trainer.train()
    trainer.save_model()
    assert not measured  # nothing has been evaluated

    accuracy = trainer.evaluate(digit_sources().test, metric_key_prefix="test")["test_student_0_accuracy"]
    for _ in range(2):
        trainer.save_model()
    report = json.loads((tmp_path / "run/teacher_report.json").read_text())
    text = (tmp_path / "run/README.md").read_text()
    assert len(measured) == 1
    assert report["students"][0]["accuracy"] == pytest.approx(accuracy)
    assert f"| Same first choice as teacher |  | {report['agreement'][0][0]:.4f} |  |" in text
    assert "Students and teachers on the test split (100 images)" in text


def test_in_half_precision_both_cast_their_weights_in_each_pass(tmp_path, monkeypatch):
    """Autocast keeps the cast weights of what is trained, and of frozen networks none."""
    found = []

    def look(*given, **named):
        found.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))

    monkeypatch.setattr(publishing, "teacher_report", look)
    trainer = kd_trainer(tmp_path / "run", max_steps=1, bf16=True)
    trainer.evaluate()
    trainer.save_model()
    assert found == [(True, False)] and torch.is_autocast_cache_enabled()


def test_a_report_that_fails_is_left_out_with_a_warning(tmp_path, monkeypatch):
    def fail(*given, **named):
        raise RuntimeError("no clock")

    monkeypatch.setattr(publishing, "teacher_report", fail)
    trainer = kd_trainer(tmp_path / "run", max_steps=1)
    trainer.train()
    trainer.evaluate()
    said = []
    monkeypatch.setattr(publishing.logger, "warning", said.append)
    trainer.save_model()
    assert said == ["model card: the teacher report is left out (RuntimeError: no clock)"]
    assert "## Results" in (tmp_path / "run/README.md").read_text()
