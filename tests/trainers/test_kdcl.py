"""KDCL on tiny nets: who learns from what, views of their own, and weights that are measured before each epoch."""

import pytest
import torch
from online_peer_runs import recorded, tiny_trainer
from test_online_adversarial import assert_equal, one_batch, reaches, reaches_all, weights
from tiny_runs import digit_sources, tiny_resnet
from torch.nn import functional as F

from hfkd.errors import InputError
from hfkd.losses.kdcl import ensemble_teacher, error_covariance, general_weights
from hfkd.losses.online_adversarial import distillation_kl
from hfkd.trainers.supervised import SupervisedConfig, SupervisedTrainer


def losses_of(trainer):
    batch = one_batch(trainer)
    trainer.model.train()
    features = trainer.training_features(batch)
    return batch, torch.stack([one.logits for one in features]), *trainer.losses(features, batch)


@pytest.mark.parametrize("variant", ["naive", "linear", "minlogit", "general", "mean"])
def test_each_student_learns_from_the_labels_and_the_teacher(tmp_path, variant):
    students = [tiny_resnet(0), tiny_resnet(1, width=6), tiny_resnet(2)]
    trainer = tiny_trainer("kdcl", tmp_path, students, variant=variant, kl_weight=0.5)
    batch, logits, losses, parts = losses_of(trainer)
    teacher = ensemble_teacher(logits, batch["labels"], variant, torch.full((3,), 1 / 3))
    for k, loss in enumerate(losses):
        expected = F.cross_entropy(logits[k], batch["labels"]) + 0.5 * distillation_kl(logits[k], teacher, 2.0)
        torch.testing.assert_close(loss, expected)
        assert reaches_all(loss, list(students[k].parameters()))
        assert not any(reaches(loss, students[j]) for j in range(3) if j != k)
    torch.testing.assert_close(parts["teacher_ce"], F.cross_entropy(teacher, batch["labels"]))


def test_each_student_sees_a_view_of_its_own(tmp_path):
    trainer = tiny_trainer("kdcl", tmp_path)
    batch, logits, *_ = losses_of(trainer)
    assert not torch.equal(batch["pixel_values"], batch["pixel_values_2"])
    views = trainer.views_of(batch)
    assert views[0] is batch["pixel_values"] and views[1] is batch["pixel_values_2"]
    for student, seen, own in zip(trainer.model.students, views, logits, strict=True):
        torch.testing.assert_close(student(seen).logits, own)
    shared = one_batch(tiny_trainer("kdcl", tmp_path / "shared", independent_views=False))
    assert "pixel_values_2" not in shared
    assert torch.equal(shared["pixel_values"], batch["pixel_values"])  # view 0 is what a single view is
    assert trainer.eval_dataset.views == 1


def test_without_kl_it_is_supervised_training(tmp_path):
    ours = tiny_trainer("kdcl", tmp_path / "a", kl_weight=0.0, independent_views=False, max_steps=4)
    args = {"per_device_train_batch_size": 50, "learning_rate": 0.05, "save_strategy": "no", "use_cpu": True}
    config = SupervisedConfig(str(tmp_path / "b"), max_steps=4, disable_tqdm=True, **args)
    theirs = SupervisedTrainer([tiny_resnet(0), tiny_resnet(1)], config, train_dataset=digit_sources().train)
    ours.train()
    theirs.train()
    assert_equal(weights(ours.model.students), weights(theirs.model.students), atol=1e-6)


def test_general_weights_are_measured_before_each_epoch(tmp_path):
    trainer = tiny_trainer("kdcl", tmp_path, variant="general", max_steps=10)
    ensemble, seen, test = trainer.model.training_only["ensemble"], [], digit_sources().test
    measure, step = trainer._measure_weights, trainer.method_step

    def measured(epoch):
        measure(epoch)
        keys = torch.stack([torch.zeros(100), torch.arange(100)], dim=1).long()
        images = test.materialise({"key": keys})
        trainer.model.eval()
        with torch.no_grad():
            logits = torch.stack([student(images["pixel_values"]).logits for student in trainer.model.students])
        expected = general_weights(error_covariance(logits, images["labels"])).float()
        torch.testing.assert_close(ensemble.weights, expected, rtol=0, atol=1e-4)
        seen.append((epoch, ensemble.weights.clone()))

    def stepped(batch, share, last):
        assert torch.equal(ensemble.weights, seen[-1][1]) and ensemble.epoch == seen[-1][0]
        assert all(module.training for module in trainer.model.students.modules())
        return step(batch, share, last)

    trainer._measure_weights, trainer.method_step = measured, stepped
    trainer.train()
    assert [epoch for epoch, _ in seen] == [0, 1, 2]
    assert len({tuple(found.tolist()) for _, found in seen}) == 3
    assert all(found.sum().item() == pytest.approx(1, abs=1e-5) for _, found in seen)


def test_a_second_training_measures_anew(tmp_path):
    """Its first epoch has the number of one that has been."""
    trainer = tiny_trainer("kdcl", tmp_path, variant="general", max_steps=4)
    measured, measure = [], trainer._measure_weights
    trainer._measure_weights = lambda epoch: (measured.append(epoch), measure(epoch))
    trainer.train()
    trainer.train()
    assert measured == [0, 0]


def test_measuring_draws_nothing(tmp_path):
    trainer = tiny_trainer("kdcl", tmp_path, variant="general")
    before = torch.random.get_rng_state()
    trainer._measure_weights(0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_batch_of_the_run_has_the_views_of_its_students(tmp_path):
    trainer = tiny_trainer("kdcl", tmp_path, count=3, max_steps=1)
    batches = recorded(trainer)
    trainer.train()
    assert {"pixel_values", "pixel_values_2", "pixel_values_3"} < batches[0].keys()


@pytest.mark.parametrize("data", [None, {"a": None}], ids=["none", "several"])
def test_general_needs_one_set_of_held_out_images(tmp_path, data):
    data = data and {"a": digit_sources().test}
    with pytest.raises(InputError, match="variant=general.*pass one eval_dataset") as caught:
        tiny_trainer("kdcl", tmp_path, variant="general", eval_dataset=data)
    assert "\n" not in str(caught.value)
