"""The benchmark of gradient features, on networks small enough for a test: what it compares is what it says."""

import csv
import gc

import pytest
import torch
from tiny_classifiers import FAMILIES

from hfkd.models import HfkdBiganEncoderConfig, HfkdBiganEncoderForImageClassification
from hfkd.scripts import benchmark_gradient_features
from hfkd.scripts.benchmark_gradient_features import CLASSES, Step
from hfkd.scripts.cli import main


def tiny_encoder():
    return HfkdBiganEncoderForImageClassification(
        HfkdBiganEncoderConfig(hidden_sizes=[4, 4, 6, 6, 8], num_labels=len(CLASSES))
    ).eval()


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.setattr(benchmark_gradient_features, "BATCH", 4)
    monkeypatch.setattr(benchmark_gradient_features, "encoder", tiny_encoder)
    monkeypatch.setattr(benchmark_gradient_features, "resnet", lambda preset: FAMILIES["hfkd_resnet"]().eval())
    monkeypatch.setattr(benchmark_gradient_features, "EPOCH", 2)
    monkeypatch.setattr(benchmark_gradient_features, "keep_freed_memory", lambda: None)
    # Garbage is collected between rounds; past all imports that takes longer than these rounds.
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_command_writes_a_row_for_each_comparison(tmp_path, capsys):
    assert main(["benchmark", "gradient-features", "--repeats", "1", "--output", str(tmp_path / "speed.csv")]) == 0
    with open(tmp_path / "speed.csv", newline="") as file:
        rows = list(csv.DictReader(file))

    assert len(rows) == len({row["what"] for row in rows}) == 18
    assert all(float(row["value"]) > 0 for row in rows)
    assert [row["to_reach"] for row in rows[:9]] == [
        *("<= 1.3", "<= 1.3", "", "<= 1.6", "", "<= 1.6", ""),
        *(">= 5", ""),
    ]
    assert "ResNet-18's last block" in capsys.readouterr().out


def trained(step):
    return [parameter.detach().clone() for parameter in step.model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("mode", ["full", "finetune"])
def test_a_step_on_activations_is_a_step_on_their_images(mode):
    """With SGD, whose steps are as long as the gradients: the first of Adam has their signs alone."""
    base = tiny_encoder()
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    whole, above = (Step(base, 2, mode, False) for _ in range(2))
    above.model.load_state_dict(whole.model.state_dict())
    before = trained(whole)
    for step in (whole, above):
        step.optimizer = torch.optim.SGD((p for p in step.model.parameters() if p.requires_grad), lr=1.0)
    whole.take(images, labels)
    above.take(above.below(images), labels, activations=True)

    for old, value, other in zip(before, trained(whole), trained(above), strict=True):
        moved = value - old
        assert moved.any()
        torch.testing.assert_close(other - old, moved, rtol=0, atol=1e-4 * float(moved.abs().max()) + 1e-7)


def test_both_steps_train_as_many_weights():
    base = tiny_encoder()
    own, tuned = (sum(map(torch.numel, trained(Step(base, 1, mode, False)))) for mode in ("full", "finetune"))
    assert own == tuned
