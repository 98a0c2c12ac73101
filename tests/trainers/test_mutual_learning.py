"""DML and supervised training on tiny nets: identities with AFD's logit loss, turns, and what each loss reaches."""

import copy

import pytest
import torch
from test_online_adversarial import assert_equal, one_batch, reaches, reaches_all, weights
from tiny_runs import NO_AUGMENTATION, digit_sources, tiny_resnet
from torch.nn import functional as F

from hfkd.errors import InputError
from hfkd.trainers.mutual_learning import MutualLearningConfig, MutualLearningTrainer
from hfkd.trainers.supervised import SupervisedConfig, SupervisedTrainer


SETTINGS = {
    "max_steps": 3,
    "per_device_train_batch_size": 50,
    "learning_rate": 0.05,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}


@pytest.fixture
def make(tmp_path):
    """make(trainer class, config class, students, **config) -> trainer on the digits."""

    def build(trainer, config, students, **settings):
        folder = tmp_path / settings.pop("folder", trainer.__name__)
        args = config(str(folder), **(SETTINGS | settings))
        sources = digit_sources()
        return trainer(students, args, train_dataset=sources.train, eval_dataset=sources.test)

    return build


def pair(dtype=torch.float32):
    return [tiny_resnet(0, dtype=dtype), tiny_resnet(1, width=6, dtype=dtype)]


def dml(make, students, **settings):
    return make(MutualLearningTrainer, MutualLearningConfig, students, **settings)


def test_at_afds_temperature_it_is_afd_without_maps(make, make_trainer):  # T12
    ours = dml(make, pair(torch.float64), temperature=3.0)
    ours.train()
    theirs = make_trainer(pair(torch.float64), feature_loss="none", max_steps=3)
    theirs.train()
    assert_equal(weights(ours.model.students), weights(theirs.model.students), atol=1e-12)


def test_each_loss_reaches_its_own_student_alone(make):
    trainer = dml(make, [*pair(), tiny_resnet(2)])
    batch = one_batch(trainer)
    trainer.model.train()
    losses, parts = trainer.losses(trainer.features(batch["pixel_values"]), batch)
    for k, loss in enumerate(losses):
        assert reaches_all(loss, list(trainer.model.students[k].parameters()))
        assert not any(reaches(loss, trainer.model.students[j]) for j in range(3) if j != k)
    assert set(parts) == {f"student_{k}_{part}" for k in range(3) for part in ("ce", "kl")}


def test_in_turns_the_second_learns_from_what_the_first_has_learnt(make):
    students = [student.double() for student in pair()]
    by_hand = copy.deepcopy(students)
    trainer = dml(make, students, update="sequential", max_steps=1, weight_decay=0.0)
    batches = []
    step = trainer.method_step
    trainer.method_step = lambda batch, share, last: (batches.append(batch), step(batch, share, last))[1]
    trainer.train()
    (batch,) = batches

    optimizers = [torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9) for student in by_hand]
    for k in (0, 1):
        own = by_hand[k].train()(batch["pixel_values"]).logits
        with torch.no_grad():
            peer = copy.deepcopy(by_hand[1 - k]).train()(batch["pixel_values"]).logits
        kl = F.kl_div(own.log_softmax(1), peer.softmax(1), reduction="batchmean")
        (F.cross_entropy(own, batch["labels"]) + kl).backward()
        optimizers[k].step()
    # Running statistics too: predicting again does not count as having seen the images twice.
    assert_equal(weights(trainer.model.students[0]), weights(by_hand[0]), atol=1e-12)
    assert_equal(weights(trainer.model.students[1]), weights(by_hand[1]), atol=1e-12)


def test_turns_are_resumed_exactly(make):
    settings = {"update": "sequential", "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 4}
    whole = dml(make, pair(), **settings, save_total_limit=None)
    whole.train()
    expected = weights(whole.model.students)
    assert [log["learning_rate_student_1"] for log in whole.state.log_history if "learning_rate" in log]
    again = dml(make, [tiny_resnet(7), tiny_resnet(8, width=6)], **settings, folder="again")
    again.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert_equal(weights(again.model.students), expected)


def test_alone_a_student_learns_as_beside_others(make):
    together = make(SupervisedTrainer, SupervisedConfig, pair())
    together.train()
    for k in (0, 1):
        alone = make(SupervisedTrainer, SupervisedConfig, [pair()[k]])
        alone.train()
        assert_equal(weights(alone.model.students[0]), weights(together.model.students[k]))


def test_supervised_is_dml_without_its_kl(make):
    supervised, mutual = make(SupervisedTrainer, SupervisedConfig, pair()), dml(make, pair(), kl_weight=0.0)
    supervised.train()
    mutual.train()
    assert_equal(weights(supervised.model.students), weights(mutual.model.students), atol=1e-6)


def test_one_student_is_measured_without_ensembles(make):
    metrics = make(SupervisedTrainer, SupervisedConfig, [tiny_resnet(0)]).evaluate()
    assert {"eval_loss", "eval_student_0_accuracy", "eval_mean_accuracy"} <= metrics.keys()
    assert not any("ensemble" in name for name in metrics)


def test_it_learns(make):
    trainer = dml(make, pair(), max_steps=120, learning_rate=0.1, lr_milestones=[])
    trainer.train_dataset = trainer.train_dataset.variant(augmentation=NO_AUGMENTATION)
    trainer.train()
    assert trainer.evaluate()["eval_mean_accuracy"] > 0.6


@pytest.mark.parametrize(
    ("students", "settings", "message"),
    [
        (1, {}, r"1 student\(s\): students that learn from each other are two or more"),
        (2, {"temperature": 0.0}, "temperature=0.0 is out of range"),
        (2, {"kl_weight": -1.0}, "kl_weight=-1.0 is out of range"),
        (2, {"kl_weight": 0.0, "temperature": 3.0}, "temperature=3.0 has no effect with kl_weight=0"),
        (2, {"update": "sequential", "gradient_accumulation_steps": 2}, "choose update=simultaneous"),
        (2, {"update": "random"}, "update='random' is unknown"),
    ],
)
def test_bad_input(make, students, settings, message):
    with pytest.raises(InputError, match=message):
        dml(make, pair()[:students], **settings)
