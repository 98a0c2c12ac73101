"""The section of a card that compares students with their teachers."""

import dataclasses
import json
from pathlib import Path

import pytest
from hub_metadata import check_card

from hfkd.evaluation.teacher_report import NetworkReport, TeacherReport
from hfkd.hub.publish import stage
from hfkd.model_cards import CardData, Method, Student, render_card, write_card


TEACHER = NetworkReport(0.95, 0.02, 853_018, 251_000_000, 0.0125, 800.0)
STUDENT = NetworkReport(0.912, 0.04, 272_474, 82_000_000, 0.005, 2000.0)


class Trainer:
    _name = "Deep mutual learning"
    _paper = {"title": "T", "id": "2002.01775", "citation": "@inproceedings{a}"}
    _tag_names = ["hfkd"]
    _template_file = "online_adversarial.md"


@pytest.fixture
def data() -> CardData:
    report = TeacherReport("test", 1000, (STUDENT,), (TEACHER,), ((0.93,),))
    return CardData(Method.of(Trainer), "run", (Student("resnet20", 272_474, True),), teacher_report=report)


def test_one_teacher_and_one_student_with_ratios(data: CardData) -> None:
    text = str(render_card(data))
    assert text.index("## Results") < text.index("Students and teachers on the test split (1,000 images)")
    for row in (
        "|  | Teacher | Student | Student / teacher |",
        "| Accuracy | 0.9500 | 0.9120 | 0.96 |",
        "| Expected calibration error (15 bins) | 0.0200 | 0.0400 | 2 |",
        "| Parameters | 853,018 | 272,474 | 0.319 |",
        "| Million floating-point operations per image | 251.00 | 82.00 | 0.327 |",
        "| Latency of one image (ms) | 12.50 | 5.00 | 0.4 |",
        "| Images per second, in batches of 64 | 800 | 2,000 | 2.5 |",
        "| Same first choice as teacher |  | 0.9300 |  |",
    ):
        assert row in text, row
    assert check_card(text) == ([], [])


def test_several_of_each_without_ratios(data: CardData) -> None:
    report = TeacherReport("test", 10, (STUDENT, STUDENT), (TEACHER, TEACHER), ((0.9, 0.8), (0.7, 0.6)))
    text = str(render_card(dataclasses.replace(data, teacher_report=report)))
    for row in (
        "|  | Teacher 0 | Teacher 1 | Student 0 | Student 1 |",
        "| Accuracy | 0.9500 | 0.9500 | 0.9120 | 0.9120 |",
        "| Same first choice as teacher 0 |  |  | 0.9000 | 0.7000 |",
        "| Same first choice as teacher 1 |  |  | 0.8000 | 0.6000 |",
    ):
        assert row in text, row


def test_a_teacher_that_is_never_right_has_no_ratio(data: CardData) -> None:
    report = TeacherReport("test", 1, (STUDENT,), (dataclasses.replace(TEACHER, accuracy=0.0),), ((0.0,),))
    assert "| Accuracy | 0.0000 | 0.9120 |  |" in str(render_card(dataclasses.replace(data, teacher_report=report)))


def test_without_teachers_there_is_no_section(data: CardData, tmp_path: Path) -> None:
    write_card(dataclasses.replace(data, teacher_report=None), tmp_path)
    assert "teachers on the" not in (tmp_path / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_the_report_lies_beside_the_card_and_is_pushed(data: CardData, tmp_path: Path) -> None:
    write_card(data, tmp_path)
    assert json.loads((tmp_path / "teacher_report.json").read_text()) == json.loads(
        json.dumps(dataclasses.asdict(data.teacher_report))
    )
    (tmp_path / "config.json").write_text("{}")
    assert "teacher_report.json" in {path.name for path in stage(tmp_path).iterdir()}
