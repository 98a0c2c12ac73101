"""ONE on tiny nets: one network written by hand, gradient masks, the tie, and networks of their own."""

import copy

import pytest
import torch
from online_peer_runs import recorded, tiny_trainer
from test_online_adversarial import assert_equal, one_batch, reaches, reaches_all, weights, wide_resnet
from tiny_runs import tiny_resnet
from torch.nn import functional as F
from transformers import AutoModelForImageClassification

from hfkd.errors import InputError
from hfkd.losses.online_adversarial import kl_rampup
from hfkd.models import build_student


def test_it_is_the_network_with_branches_written_by_hand(tmp_path):
    trainer = tiny_trainer("one", tmp_path, dtype=torch.float64, max_steps=3, count=3, lr_milestones=[])
    # A copy of the tied students and the gate before the first step.
    tied = copy.deepcopy(torch.nn.ModuleList([*trainer.model.students, trainer.model.training_only["gate"]]))
    *students, gate = tied
    batches = recorded(trainer)
    trainer.train()

    trunk = torch.nn.Sequential(students[0].base_model.stem, students[0].base_model.stages[0])
    parameters = list(tied.parameters())
    assert len(parameters) < 3 * len(list(students[0].parameters()))
    sgd = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-4)
    tied.train()
    for step, batch in enumerate(batches):
        x, y = batch["pixel_values"], batch["labels"]
        shared = trunk(x)
        z = [s.classifier(s.base_model.stages[1](shared).mean((2, 3))) for s in students]
        scores = F.relu(gate.layers[1](gate.layers[0](shared.mean((2, 3)))))
        g = scores.exp() / scores.exp().sum(1, keepdim=True)
        ensemble = g[:, 0:1] * z[0] + g[:, 1:2] * z[1] + g[:, 2:3] * z[2]
        w = kl_rampup(step / 4, 2.0)
        loss = F.cross_entropy(ensemble, y)
        for own in z:
            target = (ensemble.detach() / 3).softmax(1)
            kl = (target * (target.log() - (own / 3).log_softmax(1))).sum(1).mean()
            loss = loss + F.cross_entropy(own, y) + w * 9 * kl
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    for student, by_hand in zip(trainer.model.students, students, strict=True):
        assert_equal(weights(student), weights(by_hand), atol=1e-11)
    assert_equal(weights(trainer.model.training_only["gate"]), weights(gate), atol=1e-11)
    # The trunk's running statistics have seen each image once.
    assert trainer.model.students[2].base_model.stem[1].num_batches_tracked == 3


@pytest.mark.parametrize("shared_trunk", [True, False])
def test_the_gate_learns_from_the_labels_alone(tmp_path, shared_trunk):
    trainer = tiny_trainer("one", tmp_path, shared_trunk=shared_trunk)
    batch = one_batch(trainer)
    trainer.model.train()
    losses, parts = trainer.losses(trainer.training_features(batch), batch)
    students, gate = trainer.model.students, trainer.model.training_only["gate"]
    assert len(losses) == 3
    for k in (0, 1):
        assert reaches_all(parts[f"student_{k}_kl"], list(students[k].parameters()))
        assert not reaches(parts[f"student_{k}_kl"], gate) and not reaches(losses[k], gate)
        assert not reaches(losses[k], students[1 - k].base_model.stages[-1])
        assert not reaches(losses[k], students[1 - k].classifier)
        assert reaches(losses[k], students[1 - k].base_model.stem) is shared_trunk
    assert reaches(parts["teacher_ce"], gate) and all(reaches(parts["teacher_ce"], student) for student in students)


def test_the_weight_of_kl_rises_with_the_epoch(tmp_path):
    trainer = tiny_trainer("one", tmp_path, kl_rampup_epochs=80.0)
    found = []
    for epoch in (0, 40, 80, 200):
        trainer.state.epoch = epoch
        found.append(trainer.kl_weight())
    assert found == pytest.approx([0.0067379470, 0.2865047969, 1.0, 1.0])


def test_by_default_the_weight_of_kl_rises_over_80_300ths_of_a_run(tmp_path):
    """A short run, too, comes to distil."""
    trainer = tiny_trainer("one", tmp_path, kl_rampup_epochs=None)
    trainer.state.max_steps = 3000
    found = []
    for step in (0, 400, 800, 2000):
        trainer.state.global_step = step
        found.append(trainer.kl_weight())
    assert found == pytest.approx([0.0067379470, 0.2865047969, 1.0, 1.0])


def test_saved_are_whole_networks_with_one_trunk(tmp_path):
    trainer = tiny_trainer("one", tmp_path / "run", max_steps=3)
    trainer.train()
    trainer.save_model()
    loaded = [
        AutoModelForImageClassification.from_pretrained(tmp_path / "run", **where).eval()
        for where in ({}, {"subfolder": "student_1"})
    ]
    trainer.model.eval()
    pixels = one_batch(trainer)["pixel_values"]
    for model, student, features in zip(loaded, trainer.model.students, trainer.features(pixels), strict=True):
        torch.testing.assert_close(model(pixels).logits, student(pixels).logits)
        torch.testing.assert_close(model(pixels).logits, features.logits, rtol=0, atol=1e-5)
    assert_equal(weights(loaded[0].base_model.stem), weights(loaded[1].base_model.stem))
    assert not torch.equal(loaded[0].classifier.weight, loaded[1].classifier.weight)


def test_the_gated_ensemble_is_measured(tmp_path):
    trainer = tiny_trainer("one", tmp_path, max_steps=8)
    trainer.train()
    metrics = trainer.evaluate()
    source = trainer.eval_dataset
    trainer.model.eval()
    batch = source.materialise({"key": torch.stack([torch.zeros(100), torch.arange(100)], dim=1).long()})
    with torch.no_grad():
        maps = trainer.model.students[0].base_model.stages[0](
            trainer.model.students[0].base_model.stem(batch["pixel_values"])
        )
        gates = trainer.model.training_only["gate"](maps.mean((2, 3)))
        logits = [student(batch["pixel_values"]).logits for student in trainer.model.students]
        right = ((gates[:, :1] * logits[0] + gates[:, 1:] * logits[1]).argmax(1) == batch["labels"]).float().mean()
    assert metrics["eval_gated_ensemble_accuracy"] == pytest.approx(right.item())
    assert {"eval_student_1_accuracy", "eval_ensemble_accuracy"} <= metrics.keys()


def test_different_architectures_keep_whole_networks(tmp_path):
    students = [tiny_resnet(0), wide_resnet(1)]
    with pytest.raises(InputError, match="not of one architecture.*choose shared_trunk=False") as caught:
        tiny_trainer("one", tmp_path, students)
    assert "\n" not in str(caught.value)
    trainer = tiny_trainer("one", tmp_path, students, shared_trunk=False, max_steps=2)
    assert trainer.model.training_only["gate"].layers[0].in_features == sum(shape[0] for shape in trainer.shapes)
    before = weights(trainer.model)
    trainer.train()
    # All but what a norm's running statistics count.
    assert all(not torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())


@pytest.mark.parametrize("name", ["mlp_bn", "vae_encoder_8px"])
def test_other_families_with_stages(tmp_path, name):
    """The layers of an MLP are stages, too, of maps that have no positions."""
    classes = [str(digit) for digit in range(10)]
    students = [build_student(name, class_names=classes, image_size=8, num_channels=1, seed=s) for s in (0, 1)]
    trainer = tiny_trainer("one", tmp_path, students, max_steps=1)
    before = weights(trainer.model.training_only)
    trainer.train()
    assert not torch.equal(trainer.model.training_only["gate"].layers[0].weight, before["gate.layers.0.weight"])
    assert "eval_gated_ensemble_accuracy" in trainer.evaluate()


def test_students_of_an_earlier_trainer_are_refused_by_name(tmp_path):
    students = [tiny_resnet(0), tiny_resnet(1)]
    tiny_trainer("one", tmp_path, students)
    with pytest.raises(InputError, match="student 0 and student 1 share weights.*copy.deepcopy"):
        tiny_trainer("one", tmp_path, students)
