"""FFL on tiny nets: losses by hand, gradient masks, one trunk or several, maps of unequal size."""

import pytest
import torch
from online_peer_runs import tiny_trainer
from test_online_adversarial import one_batch, reaches, reaches_all, weights, wide_resnet
from tiny_runs import tiny_resnet
from torch.nn import functional as F

from hfkd.losses.online_adversarial import distillation_kl


@pytest.mark.parametrize("shared_trunk", [True, False])
def test_losses_by_hand_and_whom_they_reach(tmp_path, shared_trunk):
    students = [tiny_resnet(0), tiny_resnet(1)]
    trainer = tiny_trainer("ffl", tmp_path, students, shared_trunk=shared_trunk)
    batch, fusion = one_batch(trainer), trainer.model.training_only["fusion"]
    trainer.model.train()
    losses, parts = trainer.losses(trainer.training_features(batch), batch)

    maps = [student.base_model(batch["pixel_values"]).last_hidden_state for student in students]
    z = [student.classifier(one.mean((2, 3))) for student, one in zip(students, maps, strict=True)]
    depthwise, norm_1, _, pointwise, norm_2, _, _, _, linear = fusion.layers
    hidden = F.relu(norm_1(F.conv2d(torch.cat(maps, 1), depthwise.weight, padding=1, groups=16)))
    fused = linear(F.relu(norm_2(F.conv2d(hidden, pointwise.weight))).mean((2, 3)))
    w, y = trainer.kl_weight(), batch["labels"]
    expected = [F.cross_entropy(own, y) + w * distillation_kl(own, fused) for own in z]
    expected += [F.cross_entropy(fused, y), w * distillation_kl(fused, (z[0] + z[1]) / 2)]
    for loss, by_hand in zip(losses, expected, strict=True):
        torch.testing.assert_close(loss, by_hand, rtol=1e-4, atol=1e-6)

    for k in (0, 1):
        assert reaches_all(losses[k], list(students[k].parameters()))
        assert not reaches(losses[k], fusion) and not reaches(losses[k], students[1 - k].classifier)
    # The fused classifier learns from labels and from the mean logits, which are a target: no classifier is reached.
    for loss in (parts["teacher_ce"], parts["teacher_kl"]):
        assert reaches(loss, fusion) and all(reaches(loss, student.base_model) for student in students)
        assert not any(reaches(loss, student.classifier) for student in students)


def test_the_fused_classifier_is_measured(tmp_path):
    trainer = tiny_trainer("ffl", tmp_path, max_steps=6)
    trainer.train()
    metrics = trainer.evaluate()
    batch = trainer.eval_dataset.materialise({"key": torch.stack([torch.zeros(100), torch.arange(100)], 1).long()})
    trainer.model.eval()
    maps = [student.base_model(batch["pixel_values"]).last_hidden_state for student in trainer.model.students]
    right = (trainer.model.training_only["fusion"](maps).argmax(1) == batch["labels"]).float().mean().item()
    assert metrics["eval_fused_accuracy"] == pytest.approx(right)


def test_different_architectures_with_maps_of_unequal_size(tmp_path):
    students = [tiny_resnet(0), wide_resnet(1), tiny_resnet(2, depths=(1, 1, 1))]
    trainer = tiny_trainer("ffl", tmp_path, students, shared_trunk=False, max_steps=2)
    assert len({shape[1:] for shape in trainer.shapes}) > 1
    assert trainer.model.training_only["fusion"].size == (2, 2)
    before = weights(trainer.model)
    trainer.train()
    assert all(not torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())
