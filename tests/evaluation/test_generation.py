"""What is measured of a generator's images, judged on digits."""

from dataclasses import fields

import pytest
import torch
from sklearn.datasets import load_digits
from tiny_runs import tiny_resnet

from hfkd.data import Preprocessing
from hfkd.errors import InputError
from hfkd.evaluation.generation import RealImages, generation_metrics, judge_statistics, uniform_noise
from hfkd.evaluation.judges import ClassifierJudge, NearestNeighbourJudge, Verdict


@pytest.fixture(scope="module")
def real():
    """100 training digits, ten of each class; the others are held out."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target)
    rank = torch.stack([(labels[:row] == labels[row]).sum() for row in range(len(labels))])
    training = rank < 10
    return RealImages.split(images[training], labels[training], images[~training], labels[~training])


@pytest.fixture(scope="module")
def judge(real):
    return NearestNeighbourJudge(real.reference, real.reference_labels, 10)


def test_held_out_images_are_halved_within_each_class():
    labels = torch.tensor([2, 0, 0, 2, 0, 5, 5, 0, 2])
    images = torch.arange(9.0).view(9, 1, 1, 1)
    real = RealImages.split(images[:3], labels[:3], images, labels)
    assert real.reference.flatten().tolist() == [1, 0, 5, 4, 8]  # of each class the first, and then the third
    assert real.held_out.flatten().tolist() == [2, 3, 6, 7]
    assert torch.equal(real.reference_labels, labels[real.reference.flatten().long()])
    assert real.held_out_labels.tolist() == [0, 2, 5, 0]
    assert torch.equal(real.training, images[:3]) and torch.equal(real.training_labels, labels[:3])
    with pytest.raises(InputError, match="class 5 has one held-out image"):
        RealImages.split(images[:3], labels[:3], images[:6], labels[:6])


def test_real_digits_score_high_and_noise_low(real, judge):
    """Measured, held-out and noise: judge .976 .108, nearest .840 .092, per sample .838 .005, diversity 1.00 1.75.

    Close to the prototype's of other 100 digits: .993 .095, .858 .112, .849 .012, .90 1.74.
    """
    held_out = generation_metrics(real.held_out, real.held_out_labels, real, judge)
    noise = generation_metrics(uniform_noise(real.held_out), real.held_out_labels, real, judge)
    assert held_out["judge_accuracy"] > 0.96 and noise["judge_accuracy"] < 0.2
    assert held_out["nearest_correlation"] == pytest.approx(0.85, abs=0.03)
    assert noise["nearest_correlation"] == pytest.approx(0.1, abs=0.04)
    assert held_out["per_sample_correlation"] == pytest.approx(0.84, abs=0.02)
    assert noise["per_sample_correlation"] == pytest.approx(0, abs=0.02)
    assert held_out["class_mean_correlation"] > 0.98 and abs(noise["class_mean_correlation"]) < 0.15
    assert held_out["diversity"] == pytest.approx(1, abs=0.03)
    assert noise["diversity"] == pytest.approx(1.75, abs=0.05)
    assert held_out["nearest_ssim"] > noise["nearest_ssim"] + 0.3
    assert held_out["coverage"] > 0.85 and noise["coverage"] < 0.4
    assert "frechet_distance" not in held_out and "self_accuracy" not in held_out


def test_copies_of_the_training_images_are_seen_as_such(real, judge):
    metrics = generation_metrics(real.training, real.training_labels, real, judge)
    assert metrics["nearest_correlation"] == pytest.approx(1) == metrics["nearest_ssim"]
    assert metrics["coverage"] == pytest.approx(1)


def test_one_image_for_each_class_has_no_diversity(real, judge):
    labels = torch.arange(200) % 10
    first = torch.stack([real.training[real.training_labels == number][0] for number in range(10)])
    metrics = generation_metrics(first[labels], labels, real, judge)
    assert metrics["diversity"] == pytest.approx(0, abs=1e-6) and metrics["nearest_correlation"] == pytest.approx(1)
    assert metrics["coverage"] < 0.95


def test_accuracies_are_the_shares_of_right_verdicts(real):
    """The parent takes every image for a 3, the judge is right about every second one."""
    labels = torch.arange(20) % 10

    def parent(images):
        return Verdict(torch.eye(10)[torch.full_like(labels, 3)])

    def judge(images):
        return Verdict(torch.eye(10)[torch.where(torch.arange(20) % 2 == 0, labels, (labels + 1) % 10)])

    metrics = generation_metrics(real.training[:20], labels, real, judge, classifier=parent)
    assert metrics["self_accuracy"] == pytest.approx(0.1)
    assert metrics["judge_accuracy"] == pytest.approx(0.5)


def test_without_labels_the_judge_names_the_classes(real, judge):
    metrics = generation_metrics(real.training, None, real, judge, classifier=judge)
    labelled = generation_metrics(real.training, judge(real.training).probabilities.argmax(1), real, judge)
    assert "judge_accuracy" not in metrics and "self_accuracy" not in metrics
    assert metrics["diversity"] == labelled["diversity"]
    assert 0.8 < metrics["judge_confidence"] <= 1


def test_judge_statistics_of_three_images():
    found = judge_statistics(torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.2, 0.7], [0.0, 0.0, 1.0]]))
    assert found["judge_confidence"] == pytest.approx(2.2 / 3)
    assert [found[f"judge_share_{number}"] for number in range(3)] == pytest.approx([1 / 3, 0, 2 / 3])


def test_frechet_distance_in_the_features_of_a_network(real):
    judge = ClassifierJudge(tiny_resnet(0, norm="none"), Preprocessing(8, 1))
    held_out = generation_metrics(real.held_out, real.held_out_labels, real, judge)
    noise = generation_metrics(uniform_noise(real.held_out), real.held_out_labels, real, judge)
    assert 0 <= held_out["frechet_distance"] < 0.05 * noise["frechet_distance"]


def test_what_depends_on_the_number_of_images_is_of_as_many_as_are_held_out(real):
    judge = ClassifierJudge(tiny_resnet(0, norm="none"), Preprocessing(8, 1))
    many = torch.cat([real.held_out, uniform_noise(real.held_out)])
    labels = torch.cat([real.held_out_labels] * 2)
    metrics = generation_metrics(many, labels, real, judge)
    held_out = generation_metrics(real.held_out, real.held_out_labels, real, judge)
    for name in ("coverage", "frechet_distance"):
        assert metrics[name] == pytest.approx(held_out[name], rel=1e-4)
    assert metrics["diversity"] > 1.2


def test_stationarity_is_measured_where_a_function_is_given(real, judge):
    seen = []

    def sqrt_stationarity(images, labels):
        seen.append((len(images), labels.tolist()))
        return 0.25

    metrics = generation_metrics(real.training, real.training_labels, real, judge, sqrt_stationarity=sqrt_stationarity)
    assert metrics["sqrt_stationarity"] == 0.25 and seen == [(100, real.training_labels.tolist())]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none")
def test_a_gpu_measures_the_same(real):
    def measure(device):
        moved = RealImages(*(getattr(real, item.name).to(device) for item in fields(RealImages)))
        judge = ClassifierJudge(tiny_resnet(0, norm="none").to(device), Preprocessing(8, 1))
        return generation_metrics(moved.held_out, moved.held_out_labels, moved, judge, classifier=judge)

    assert measure("cuda") == pytest.approx(measure("cpu"), abs=1e-3)


def test_images_of_another_shape(real, judge):
    with pytest.raises(InputError, match=r"\(3, 8, 8\) against real ones of \(1, 8, 8\)"):
        generation_metrics(torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long), real, judge)


def test_noise_is_uniform_and_follows_from_its_seed():
    noise = uniform_noise(torch.zeros(100, 1, 8, 8, dtype=torch.float64), seed=3)
    assert noise.dtype == torch.float64 and noise.min() >= -1 and noise.max() <= 1
    assert noise.mean().item() == pytest.approx(0, abs=0.03)
    assert noise.std().item() == pytest.approx(3**-0.5, abs=0.02)
    assert torch.equal(noise, uniform_noise(noise, seed=3)) and not torch.equal(noise, uniform_noise(noise, seed=4))
