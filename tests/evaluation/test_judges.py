import pytest
import torch
from tiny_runs import tiny_resnet

from hfkd.data import Preprocessing
from hfkd.errors import InputError
from hfkd.evaluation.judges import ClassifierJudge, NearestNeighbourJudge
from hfkd.models import ClassifierAdapter, HfkdResNetConfig, HfkdResNetForImageClassification


def noise(n, channels=1, side=8):
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_neighbours_vote_by_distance_of_pixels():
    """Six images at 0, .1, ... .5 of one pixel: the five nearest of .5 leave out that at 0."""
    known = torch.arange(6.0).view(6, 1, 1, 1) / 10
    judge = NearestNeighbourJudge(known, torch.tensor([3, 0, 0, 3, 3, 3]), num_classes=5)
    verdict = judge(torch.tensor([0.5, 0.0]).view(2, 1, 1, 1))
    assert verdict.probabilities.tolist() == [[0.4, 0, 0, pytest.approx(0.6), 0], [0.4, 0, 0, pytest.approx(0.6), 0]]
    assert verdict.features is None


def test_neighbours_that_are_fewer_than_five_all_vote():
    judge = NearestNeighbourJudge(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), num_classes=2)
    assert judge(noise(3)).probabilities.tolist() == [[0.5, 0.5]] * 3


def test_neighbours_of_another_shape():
    judge = NearestNeighbourJudge(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), num_classes=2)
    with pytest.raises(InputError, match=r"\(1, 4, 16\) before .* \(1, 8, 8\)"):
        judge(torch.zeros(1, 1, 4, 16))


def test_a_classifier_sees_images_as_in_training():
    """Pixels of 0 to 255, normalised as its data was; in batches, in evaluation mode, and without a trace."""
    model = tiny_resnet(0).train()
    preprocessing = Preprocessing(8, 1, (0.3,), (0.4,))
    pixels = torch.randint(0, 256, (7, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    verdict = ClassifierJudge(model, preprocessing, batch_size=3)(pixels / 127.5 - 1)
    assert model.training and not model.classifier._forward_pre_hooks
    with torch.no_grad():
        found = ClassifierAdapter(model.eval())(preprocessing.normalize(pixels))
    assert torch.allclose(verdict.probabilities, found.logits.softmax(1), atol=1e-5)
    assert torch.allclose(verdict.features, found.pooled, atol=1e-5)


def test_grey_images_before_a_classifier_of_three_channels():
    config = HfkdResNetConfig(depths=[1], hidden_sizes=[4], num_channels=3, image_size=8, num_labels=10)
    judge = ClassifierJudge(HfkdResNetForImageClassification(config), Preprocessing(8, 3, (0.1, 0.2, 0.3), (0.4,) * 3))
    grey = noise(2)
    assert torch.equal(judge(grey).probabilities, judge(grey.expand(2, 3, 8, 8)).probabilities)


@pytest.mark.parametrize(("channels", "side"), [(3, 8), (1, 16)])
def test_images_that_a_classifier_was_not_made_for(channels, side):
    judge = ClassifierJudge(tiny_resnet(0), Preprocessing(8, 1))
    with pytest.raises(InputError, match=f"{side}x{side} pixels with {channels} channels .* takes 8x8 with 1"):
        judge(noise(2, channels, side))
