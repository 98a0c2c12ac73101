"""PCL on tiny nets: mean teachers that are means, gradient masks, and views of their own on one trunk."""

import pytest
import torch
from online_peer_runs import tiny_trainer
from test_online_adversarial import assert_equal, one_batch, reaches, reaches_all, weights, wide_resnet
from tiny_runs import tiny_resnet
from torch.nn import functional as F
from transformers import TrainerCallback

from hfkd.losses.online_adversarial import distillation_kl


class Recorder(TrainerCallback):
    """The peers' weights after each update."""

    def on_optimizer_step(self, args, state, control, model, **_):
        self.seen.append({name: p.detach().clone() for name, p in model.students.named_parameters()})


def recorded(tmp_path, **config):
    recorder = Recorder()
    recorder.seen = []
    trainer = tiny_trainer("pcl", tmp_path, callbacks=[recorder], **config)
    start = {name: p.detach().clone() for name, p in trainer.model.students.named_parameters()}
    trainer.train()
    means = dict(trainer.model.training_only["mean_teachers"].named_parameters())
    assert len(recorder.seen) == trainer.state.global_step
    return start, recorder.seen, means


@pytest.mark.parametrize("accumulation", [1, 2])
def test_mean_teachers_are_the_means_of_the_peers_so_far(tmp_path, accumulation):
    settings = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 50 // accumulation}
    _, seen, means = recorded(tmp_path, max_steps=5, dtype=torch.float64, **settings)
    assert means.keys() == seen[0].keys()
    for name, mean in means.items():
        expected = torch.stack([one[name] for one in seen]).mean(dim=0)
        torch.testing.assert_close(mean, expected, rtol=0, atol=1e-12)


def test_their_memory_has_a_limit(tmp_path):
    _, seen, means = recorded(tmp_path, max_steps=4, dtype=torch.float64, mean_teacher_decay=0.5)
    for name, mean in means.items():
        one, two, three, four = (step[name] for step in seen)  # of the first update nothing older is kept
        expected = (((one + two) / 2 + three) / 2 + four) / 2
        torch.testing.assert_close(mean, expected, rtol=0, atol=1e-12)


def test_mean_teachers_have_one_trunk_and_no_gradient(tmp_path):
    trainer = tiny_trainer("pcl", tmp_path)
    means = trainer.model.training_only["mean_teachers"]
    assert means[0].base_model.stem is means[1].base_model.stem is not trainer.model.students[0].base_model.stem
    assert_equal(weights(means), weights(trainer.model.students))
    assert not any(parameter.requires_grad for parameter in means.parameters())
    held = {id(parameter) for group in trainer.create_optimizer().param_groups for parameter in group["params"]}
    ensemble = trainer.model.training_only["ensemble"]
    trained = [*trainer.model.students.parameters(), *ensemble.parameters()]
    assert held == {id(parameter) for parameter in trained}


@pytest.mark.parametrize("independent_views", [True, False])
def test_losses_by_hand_and_whom_they_reach(tmp_path, independent_views):
    students = [tiny_resnet(k) for k in range(3)]
    trainer = tiny_trainer("pcl", tmp_path, students, independent_views=independent_views)
    with torch.no_grad():
        for parameter in trainer.model.training_only["mean_teachers"].parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    batch, ensemble = one_batch(trainer), trainer.model.training_only["ensemble"]
    trainer.model.train()
    losses, parts = trainer.losses(trainer.training_features(batch), batch)
    names = ["pixel_values", "pixel_values_2", "pixel_values_3"] if independent_views else ["pixel_values"] * 3
    maps = [s.base_model(batch[name]).last_hidden_state for s, name in zip(students, names, strict=True)]
    pooled = [one.mean((2, 3)) for one in maps]
    z = [student.classifier(p) for student, p in zip(students, pooled, strict=True)]
    means = trainer.model.training_only["mean_teachers"]
    m = [mean(batch[name]).logits for mean, name in zip(means, names, strict=True)]
    e = torch.cat(pooled, dim=1) @ ensemble.weight.T + ensemble.bias
    w = trainer.kl_weight()
    for k in range(3):
        others = sum(distillation_kl(z[k], m[j]) for j in range(3) if j != k) / 2
        expected = F.cross_entropy(z[k], batch["labels"]) + w * distillation_kl(z[k], e) + w * others
        torch.testing.assert_close(losses[k], expected, rtol=1e-5, atol=1e-6)
        assert reaches_all(losses[k], list(students[k].parameters()))
        assert not reaches(losses[k], ensemble)
        assert not any(reaches(losses[k], students[j].classifier) for j in range(3) if j != k)
    torch.testing.assert_close(losses[3], F.cross_entropy(e, batch["labels"]))
    assert reaches_all(losses[3], list(ensemble.parameters()))
    assert all(reaches(losses[3], student.base_model) for student in students)
    assert not any(reaches(losses[3], student.classifier) for student in students)
    assert len(losses) == 4 and {f"student_{k}_mean_teacher_kl" for k in range(3)} <= parts.keys()


def test_the_trunk_sees_each_view_once(tmp_path):
    trainer = tiny_trainer("pcl", tmp_path, max_steps=2)
    trainer.train()
    for networks in (trainer.model.students, trainer.model.training_only["mean_teachers"]):
        assert networks[0].base_model.stem[1].num_batches_tracked == 2 * 2
        assert networks[0].base_model.stages[-1][0].branch[1].num_batches_tracked == 2


def test_what_is_measured(tmp_path):
    trainer = tiny_trainer("pcl", tmp_path, max_steps=12, lr_milestones=[])
    trainer.train()
    metrics = trainer.evaluate()
    found = {f"eval_{name}_accuracy" for name in ("peer_ensemble", "mean_teacher_0", "mean_teacher_1", "student_0")}
    assert found <= metrics.keys()
    batch = trainer.eval_dataset.materialise({"key": torch.stack([torch.zeros(100), torch.arange(100)], 1).long()})
    trainer.model.eval()
    for k, mean in enumerate(trainer.model.training_only["mean_teachers"]):
        right = (mean(batch["pixel_values"]).logits.argmax(1) == batch["labels"]).float().mean().item()
        assert metrics[f"eval_mean_teacher_{k}_accuracy"] == pytest.approx(right)


def test_whole_networks_of_different_architecture(tmp_path):
    students = [tiny_resnet(0), wide_resnet(1)]
    trainer = tiny_trainer("pcl", tmp_path, students, shared_trunk=False, max_steps=2)
    before = weights(trainer.model)
    trainer.train()
    assert all(not torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())
