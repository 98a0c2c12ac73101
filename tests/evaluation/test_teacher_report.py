"""What a report on students and teachers says is what is measured by other means."""

import json
import math

import pytest
import torch
from tiny_classifiers import FAMILIES
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from hfkd.data import DataArguments, Preprocessing, ResidentImages, build_sources, load_image_datasets
from hfkd.errors import InputError
from hfkd.evaluation.calibration import expected_calibration_error
from hfkd.evaluation.compute_cost import forward_flops, forward_seconds, parameter_count
from hfkd.evaluation.teacher_report import teacher_report


# -- calibration -----------------------------------------------------------------------------------------------------


def test_calibration_error_by_hand():
    """Ten sure of 0.8, of which six are right, and ten sure of 0.6, all right: (0.2 + 0.4) / 2."""
    logits = torch.log(torch.tensor([[0.8, 0.2]] * 10 + [[0.4, 0.6]] * 10, dtype=torch.float64))
    labels = torch.tensor([0] * 6 + [1] * 4 + [1] * 10)
    assert expected_calibration_error(logits, labels) == pytest.approx(0.3, abs=1e-6)
    # One bin: mean confidence 0.7 against an accuracy of 0.8.
    assert expected_calibration_error(logits, labels, bins=1) == pytest.approx(0.1, abs=1e-6)


def test_logits_that_look_like_probabilities_are_logits():
    logits = torch.tensor([[0.9, 0.1]] * 4)
    assert expected_calibration_error(logits, torch.zeros(4, dtype=torch.long)) == pytest.approx(
        1 - 1 / (1 + math.exp(-0.8)), abs=1e-6
    )


def test_calibration_refuses_what_it_cannot_measure():
    for shape, labels in (((0, 3), 0), ((4, 3), 5), ((4,), 4)):
        with pytest.raises(InputError, match="calibration of logits"):
            expected_calibration_error(torch.zeros(shape), torch.zeros(labels, dtype=torch.long))


# -- cost ------------------------------------------------------------------------------------------------------------


def test_flops_by_hand():
    """A convolution to 4 x 6 x 6 from 3 x 3 x 3 windows, then 144 x 10 weights: two for each multiply-add."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    assert forward_flops(network, torch.zeros(1, 3, 8, 8)) == 2 * (4 * 36 * 27 + 1440)
    assert forward_flops(network, torch.zeros(5, 3, 8, 8)) == 10 * (4 * 36 * 27 + 1440)
    assert parameter_count(network.requires_grad_(False)) == 4 * 27 + 4 + 1440 + 10


def test_flops_of_attention_are_counted():
    """17 tokens of width 16, two layers: projections and MLP, and 4 T^2 D of attention in each layer."""
    network = FAMILIES["vit"]()
    tokens, width, layers = 17, 16, 2
    patches = 2 * (tokens - 1) * width * 3 * 64
    each = 2 * tokens * (4 * width**2 + 2 * width * 32) + 4 * tokens**2 * width
    assert forward_flops(network, torch.zeros(1, 3, 32, 32)) == patches + layers * each + 2 * width * 5


def test_times_of_networks_that_take_turns():
    order = []
    seconds = forward_seconds({name: lambda x, name=name: order.append(name) for name in "ab"}, torch.zeros(1), 4)
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b", "b", "a"]
    assert seconds.keys() == {"a", "b"} and all(value >= 0 for value in seconds.values())


# -- the report ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source():
    arguments = DataArguments(test_split="train[1000:1100]", train_split="train[:200]", validation_size=0)
    return build_sources(load_image_datasets(arguments), arguments).test


class Oracle(nn.Module):
    """Knows the class of each image of `source` but the last `wrong`, of which it says the next class."""

    def __init__(self, source: ResidentImages, wrong: int, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)
        images = preprocessing.normalize(source.images)
        self.norm = nn.BatchNorm2d(images.shape[1])
        answers = source.labels.clone()
        answers[len(answers) - wrong :] += 1
        self.known, self.answers = images.flatten(1), answers % 10

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        assert not self.norm.training
        nearest = torch.cdist(pixel_values.flatten(1).float(), self.known).argmin(dim=1)
        return ImageClassifierOutput(logits=self.scale * nn.functional.one_hot(self.answers[nearest], 10))


def test_report(source, tmp_path):
    """Of 100 images, students miss 10 and 40, the teachers 0 and 20."""
    students = [Oracle(source, wrong, source.preprocessing).train() for wrong in (10, 40)]
    teachers = [Oracle(source, wrong, source.preprocessing).eval() for wrong in (0, 20)]
    report = teacher_report(students, teachers, source, batch_size=30, rounds=1)

    assert (report.split, report.images) == (source.name, 100)
    assert [one.accuracy for one in report.students] == [0.9, 0.6]
    assert [one.accuracy for one in report.teachers] == [1.0, 0.8]
    assert report.agreement == ((0.9, 0.9), (0.6, 0.8))
    sure = math.e / (math.e + 9)
    assert [one.calibration_error for one in report.teachers] == pytest.approx([1 - sure, 0.8 - sure])
    for one in (*report.students, *report.teachers):
        assert one.parameters == 1 + 2 * source.images.shape[1]
        assert one.latency_s > 0 and one.images_per_second > 0
    assert all(student.training for student in students)  # as they were

    report.save(tmp_path / "report.json")
    read = json.loads((tmp_path / "report.json").read_text())
    assert read["students"][1]["accuracy"] == 0.6 and read["agreement"] == [[0.9, 0.9], [0.6, 0.8]]


def test_networks_in_double_precision(source):
    student, teacher = (Oracle(source, wrong, source.preprocessing).double() for wrong in (0, 0))
    assert teacher_report([student], [teacher], source, rounds=1).agreement == ((1.0,),)


def test_refuses_what_cannot_be_compared(source):
    network = Oracle(source, 0, source.preprocessing)
    with pytest.raises(InputError, match=r"1 student.s. and 0 teacher.s.: pass one or more of each"):
        teacher_report([network], [], source)
    unlabelled = source.variant()
    unlabelled.labels = None
    with pytest.raises(InputError, match="have no labels: choose images with one label each"):
        teacher_report([network], [network], unlabelled)
