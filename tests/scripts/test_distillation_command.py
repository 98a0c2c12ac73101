"""`hfkd train distillation`: from options to a trained student, with teachers of other runs."""

import json

import pytest
import torch
from hub_metadata import check_card
from transformers import AutoModelForImageClassification

from hfkd.data import DataArguments
from hfkd.errors import InputError
from hfkd.models import build_image_processor, build_student
from hfkd.scripts.distillation import OfflineDistillationArguments, build
from hfkd.trainers.distillation import OfflineDistillationConfig


DIGITS = [str(digit) for digit in range(10)]


def save_teacher(folder, names=DIGITS, image_size=8):
    teacher = build_student("resnet14", class_names=names, image_size=image_size, num_channels=1, seed=7)
    teacher.save_pretrained(folder)
    return teacher.eval()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parents") / "wise-teacher"
    save_teacher(folder)
    return folder


def job(folder, *teachers, student="resnet8", **config):
    settings = {"max_steps": 2, "per_device_train_batch_size": 40, "save_strategy": "no", "use_cpu": True}
    return build(
        OfflineDistillationConfig(str(folder), **(settings | config)),
        DataArguments(max_train_samples=150, validation_size=0),
        OfflineDistillationArguments(student=student, teachers=[str(name) for name in teachers]),
    )


def test_a_job_trains_is_measured_and_leaves_a_card(teacher, tmp_path):
    made = job(tmp_path / "run", teacher, loss=["kd", "attention"])
    made.trainer.train()
    metrics = made.trainer.evaluate(made.test)
    assert 0 <= metrics["eval_student_0_accuracy"] <= 1
    made.trainer.save_model()
    card = (tmp_path / "run/README.md").read_text()
    assert check_card(card) == ([], [])
    assert "Teacher: `wise-teacher` (local; model.safetensors sha256" in card and str(teacher) not in card
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    assert again.config.depths == [1, 1, 1]


def test_a_teachers_classes_are_the_datas_by_name(tmp_path):
    """In another order and with one more; softmax over the data's classes."""
    names = ["cat", *reversed(DIGITS)]
    own = save_teacher(tmp_path / "teacher", names)
    matched = job(tmp_path / "run", tmp_path / "teacher").trainer.model.frozen()[0].model
    pixels = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        wanted = own(pixels).logits[:, [names.index(digit) for digit in DIGITS]]
        torch.testing.assert_close(matched(pixels).logits, wanted)


def test_a_teachers_processor_is_its_own(tmp_path):
    save_teacher(tmp_path / "teacher")
    build_image_processor(8, 1, mean=[0.2], std=[0.7]).save_pretrained(tmp_path / "teacher")
    trainer = job(tmp_path / "run", tmp_path / "teacher").trainer
    # A pixel of the data's mean.
    seen = trainer.model.frozen()[0].renormalize(torch.zeros(1, 1, 1, 1)).item()
    assert seen == pytest.approx((trainer.preprocessing.mean[0] - 0.2) / 0.7, abs=1e-6)


def test_a_processor_of_foreign_code_is_refused(tmp_path):
    """Not left out in silence: the teacher would see pixels in other statistics."""
    save_teacher(tmp_path / "teacher")
    foreign = {"image_processor_type": "Foreign", "auto_map": {"AutoImageProcessor": "foreign.Foreign"}}
    (tmp_path / "teacher/preprocessor_config.json").write_text(json.dumps(foreign))
    with pytest.raises(InputError, match="image processor of teacher .* cannot be loaded: .*custom code") as caught:
        job(tmp_path / "run", tmp_path / "teacher")
    assert "\n" not in str(caught.value)


def test_the_student_starts_as_without_a_teacher(teacher, tmp_path):
    one, two = job(tmp_path / "a", teacher), job(tmp_path / "b", teacher, teacher, loss=["review"])
    for a, b in zip(one.trainer.model.students.parameters(), two.trainer.model.students.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(two.trainer.model.frozen()) == 2


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        ([], "no teacher: give --teachers"),
        (["resnet20"], "teacher 'resnet20' is a preset with fresh weights"),
        (["missing/folder/here"], "teacher 'missing/folder/here' cannot be loaded"),
    ],
)
def test_bad_input(tmp_path, teachers, message):
    with pytest.raises(InputError, match=message) as caught:
        job(tmp_path / "run", *teachers)
    assert "\n" not in str(caught.value)


def test_a_teacher_of_other_classes_is_refused(tmp_path):
    save_teacher(tmp_path / "teacher", ["cat", "dog"])
    with pytest.raises(InputError, match="does not know '0', '1', '2' and 7 more"):
        job(tmp_path / "run", tmp_path / "teacher")


def test_an_encoder_without_head_is_no_teacher(tmp_path):
    save_teacher(tmp_path / "whole").base_model.save_pretrained(tmp_path / "teacher")
    with pytest.raises(InputError, match="teacher") as caught:
        job(tmp_path / "run", tmp_path / "teacher")
    assert "\n" not in str(caught.value)
