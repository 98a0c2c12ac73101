"""Offline distillation on tiny nets: what each loss is made of and reaches, teachers of every kind, bad input."""

import math

import pytest
import torch
from distillation_runs import taught, tiny_trainer
from mixed_cohorts import our_resnet, stock_resnet, stock_vit
from test_online_adversarial import assert_equal, one_batch, reaches_all, weights
from tiny_runs import NO_AUGMENTATION, digit_sources, tiny_resnet
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from hfkd.errors import InputError, RunError
from hfkd.losses.logit_distillation import distillation_kl, joint_logits
from hfkd.models.class_names import match_teacher
from hfkd.trainers.distillation import OfflineDistillationConfig
from hfkd.trainers.distillation_papers import PAPERS
from hfkd.trainers.distillation_terms import LOSSES


ON_FEATURES = [name for name, kind in LOSSES.items() if kind.features]
ON_LOGITS = [name for name, kind in LOSSES.items() if kind.logits]


@pytest.fixture
def make(tmp_path):
    """make(losses, **settings) -> trainer."""
    return lambda *losses, **settings: tiny_trainer(tmp_path / "run", losses or ("kd",), **settings)


def loss_of(trainer, count=16):
    """The loss of a batch in training mode, with its parts and what it was made of."""
    batch = one_batch(trainer, count)
    trainer.model.train()
    features = trainer.training_features(batch)
    (loss,), parts = trainer.losses(features, batch)
    return loss, parts, features, batch


# -- the loss --------------------------------------------------------------------------------------


def test_sum_and_convex_form_by_hand(make):
    """Hinton's KD both ways: with a = 1/2, the one is half the other."""
    loss, parts, (student, teacher), batch = loss_of(make(dtype=torch.float64, temperature=3.0))
    cross_entropy = F.cross_entropy(student.logits, batch["labels"])
    log_p, log_q = ((z / 3).log_softmax(1) for z in (student.logits, teacher.logits))
    kl = 9 * (log_q.exp() * (log_q - log_p)).sum(1).mean()
    assert loss.item() == pytest.approx((cross_entropy + kl).item(), abs=1e-12)
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(
        {"student_0_ce": cross_entropy.item(), "student_0_kd": kl.item()}, abs=1e-12
    )
    for alpha in (0.5, 0.9, 1.0):
        convex, *_ = loss_of(make(dtype=torch.float64, temperature=3.0, kd_alpha=alpha))
        assert convex.item() == pytest.approx(((1 - alpha) * cross_entropy + alpha * kl).item(), abs=1e-12)


def test_losses_are_added_with_their_weights(make):
    alone = {name: loss_of(make(name, dtype=torch.float64))[1][f"student_0_{name}"] for name in LOSSES}
    for names, given in ((["kd", "attention"], [0.5, 7.0]), (["fitnets", "rkd", "crd"], [])):
        loss, parts, *_ = loss_of(make(*names, dtype=torch.float64, loss_weights=given, ce_weight=0.25))
        weights_ = given or [LOSSES[name].weight for name in names]
        # What is drawn for one is the same beside others, but for fresh layers, which are drawn one after the other.
        for name in set(names) - {"crd"}:
            assert parts[f"student_0_{name}"].item() == pytest.approx(alone[name].item(), abs=1e-12)
        expected = 0.25 * parts["student_0_ce"]
        expected += sum(w * parts[f"student_0_{name}"] for w, name in zip(weights_, names, strict=True))
        assert loss.item() == pytest.approx(expected.item(), abs=1e-10)


def test_warm_up_is_linear_in_the_epoch(make):
    trainer = make("kd", distillation_warmup_epochs=2.0, ce_weight=0.0, augmentation=NO_AUGMENTATION)
    found = []
    for epoch in (0.0, 0.5, 2.0, 7.0):
        trainer.state.epoch = epoch
        loss, parts, *_ = loss_of(trainer)
        found.append((loss / parts["student_0_kd"]).item())
    assert found == pytest.approx([0, 0.25, 1, 1])


def test_several_teachers_teach_by_the_mean_of_their_probabilities(make):
    both = [taught(torch.float64), tiny_resnet(8, width=5, dtype=torch.float64)]
    _, parts, (student, *teachers), _ = loss_of(make("kd", dtype=torch.float64, teachers=both, temperature=2.0))
    mean = torch.stack([(one.logits / 2).softmax(1) for one in teachers]).mean(0)
    expected = 4 * (mean * (mean.log() - (student.logits / 2).log_softmax(1))).sum(1).mean()
    assert parts["student_0_kd"].item() == pytest.approx(expected.item(), abs=1e-12)
    assert parts["student_0_kd"].item() == pytest.approx(
        distillation_kl(student.logits, joint_logits([one.logits for one in teachers], 2.0), 2.0).item(), abs=1e-12
    )


@pytest.mark.parametrize("name", ["attention", "rkd"])
def test_losses_on_features_are_averaged_over_teachers(make, name):
    one, other = (lambda: taught(torch.float64)), (lambda: tiny_resnet(8, width=5, dtype=torch.float64))
    found = [
        loss_of(make(name, dtype=torch.float64, teachers=[make_one() for make_one in makers]))[1][f"student_0_{name}"]
        for makers in ([one], [other], [one, other])
    ]
    assert found[2].item() == pytest.approx((found[0] + found[1]).item() / 2, abs=1e-12)
    trainer = make("fitnets", teachers=[one().float(), other().float()])
    assert len(trainer.model.training_only["fitnets"]) == 2


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_trains_the_student_and_its_own_layers_alone(make, name):
    trainer = make(name, ce_weight=0.0)
    loss, *_ = loss_of(trainer)
    backbone = [p for n, p in trainer.model.students[0].named_parameters() if "classifier" not in n]
    first = [p for n, p in trainer.model.students[0].named_parameters() if ".stem." in n or ".stages.0." in n]
    assert reaches_all(loss, first if name == "fitnets" else backbone)
    own = list(trainer.model.training_only.parameters())
    assert bool(own) == (name in ("fitnets", "crd", "review"))
    assert not own or reaches_all(loss, own)
    optimized = {p for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {*trainer.model.students.parameters(), *own}
    assert not any(p.requires_grad for p in trainer.model.teachers.parameters())


@pytest.mark.parametrize("losses", [[name] for name in LOSSES] + [["kd", "attention", "crd"]], ids="+".join)
def test_ten_epochs_bring_each_loss_down_and_leave_the_teacher(make, losses):
    trainer = make(*losses, max_steps=40, augmentation=NO_AUGMENTATION, learning_rate=0.02)
    before = weights(trainer.model.teachers)
    trainer.train()
    logs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(logs[-4:]) < 0.9 * sum(logs[:4])
    assert_equal(weights(trainer.model.teachers), before)


def test_a_student_that_sees_no_label_learns_from_its_teacher(make):
    trainer = make("kd", max_steps=120, ce_weight=0.0, learning_rate=0.1, augmentation=NO_AUGMENTATION)
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_student_0_accuracy"] > 0.5
    assert not any("ensemble" in name for name in found)


# -- layers ----------------------------------------------------------------------------------------


def test_which_layers_are_compared(make):
    first, second = "backbone.stages.0.0", "backbone.stages.1.0"
    pairs = {name: make(name).model.training_only[name][0].pairs for name in ("fitnets", "attention", "review")}
    assert pairs["fitnets"] == [(first, first)]
    assert pairs["attention"] == [(first, first), (second, second)]
    assert pairs["review"] == [*pairs["attention"], ("pooled", "pooled")]
    named = make("attention", student_layers=[1, "backbone.stem"], teacher_layers=["-1", "1"])
    assert named.model.training_only["attention"][0].pairs == [(first, second), ("backbone.stem", first)]


def test_unequal_maps_are_compared_at_the_smaller_size(make):
    """The student's first stage has 8x8 positions, the teacher's last 4x4."""
    trainer = make("attention", student_layers=["1"], teacher_layers=["-1"], dtype=torch.float64)
    _, parts, (student, teacher), _ = loss_of(trainer)
    own, other = student.layers["backbone.stages.0.0"], teacher.layers["backbone.stages.1.0"]
    own = F.avg_pool2d(own, 2)
    maps = [F.normalize(f.square().sum(1).flatten(1)) for f in (own, other)]
    assert parts["student_0_attention"].item() == pytest.approx(F.mse_loss(*maps).item(), abs=1e-12)


def vit(side=8, patch=4, layers=2):
    sizes = {"hidden_size": 8, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 8}
    labels = {"id2label": {k: str(k) for k in range(10)}, "label2id": {str(k): k for k in range(10)}}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return ViTForImageClassification(ViTConfig(image_size=side, patch_size=patch, **sizes, **labels))


PAIRS = {
    "transformer teaches": (our_resnet, vit),
    "transformer learns": (stock_vit, our_resnet),
    "stock learns": (stock_resnet, vit),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("losses", [["kd", *ON_FEATURES]], ids="+".join)
def test_transformers_teach_convolutions_and_learn_from_them(make, tmp_path, pair, losses):
    student, teacher = (one() for one in PAIRS[pair])
    trainer = make(*losses, student=student, teachers=teacher, sources=digit_sources(3), max_steps=2)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    assert type(again) is type(student)
    assert_equal(weights(again), weights(trainer.model.students[0]))
    assert all(math.isfinite(value) for value in trainer.evaluate().values())


# -- what a teacher sees ---------------------------------------------------------------------------


def seen_by(teacher):
    seen = []
    teacher.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("pixel_values", args[0] if args else None)),
        with_kwargs=True,
    )
    return seen


def test_a_teacher_sees_the_images_in_its_own_statistics_and_size(make):
    teacher = vit(side=16)
    processor = ViTImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.25] * 3, size={"height": 16, "width": 16})
    trainer = make("attention", student=our_resnet(), teachers=teacher, sources=digit_sources(3),
                   teacher_processing_classes=[processor], teacher_image_size=16)  # fmt: skip
    seen = seen_by(teacher)
    *_, batch = loss_of(trainer)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (trainer.preprocessing.mean, trainer.preprocessing.std))
    own = ((batch["pixel_values"] * std + mean) - 0.5) / 0.25
    torch.testing.assert_close(seen[-1], F.interpolate(own, (16, 16), mode="bilinear"))


@pytest.mark.parametrize("by", ["configuration", "height and width", "processor"])
def test_a_teacher_of_another_size_is_resized_for_only_when_asked(make, by):
    """A convolutional one could take them as they are, which then has to be said."""
    if by != "processor":
        side = 16 if by == "configuration" else [16, 16]
        given = {"teachers": vit(side=side), "student": our_resnet(), "sources": digit_sources(3)}
    else:
        processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
        given = {"teachers": taught(), "teacher_processing_classes": [processor]}
    with pytest.raises(
        InputError, match="images of 16 pixels and the data has 8: set teacher_image_size=16"
    ) as caught:
        make("kd", **given)
    assert "\n" not in str(caught.value)
    if by == "processor":
        seen = seen_by(given["teachers"])
        loss_of(make("kd", **given, teacher_image_size=8))
        assert seen[-1].shape[2:] == (8, 8)


# -- cached teachers -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ON_LOGITS)
def test_cached_and_live_teachers_train_the_same_student(make, tmp_path, name):
    """Two of them, and the last batch of an epoch is not full."""
    settings = {"dtype": torch.float64, "augmentation": NO_AUGMENTATION, "max_steps": 8}
    settings["per_device_train_batch_size"] = 60
    trainers = [
        make(name, teachers=[taught(torch.float64), tiny_resnet(8, dtype=torch.float64)], **settings, **cached)
        for cached in ({}, {"teacher_cache_dir": str(tmp_path / "cache")})
    ]
    for trainer in trainers:
        trainer.train()
    live, cached = (weights(trainer.model.students) for trainer in trainers)
    assert_equal(live, cached, atol=1e-9)


def test_one_teachers_cache_serves_every_temperature_and_several_teachers_only_theirs(make, tmp_path):
    cache = {"teacher_cache_dir": str(tmp_path / "cache"), "augmentation": NO_AUGMENTATION, "max_steps": 1}
    for temperature in (4.0, 2.0):
        make("kd", temperature=temperature, **cache).train()
    several = cache | {"teacher_cache_dir": str(tmp_path / "several"), "teachers": [taught(), tiny_resnet(8)]}
    make("kd", **several).train()
    with pytest.raises(InputError, match="combination of teachers"):
        make("kd", temperature=2.0, **several).train()


def test_a_teacher_has_the_students_classes_in_their_order(make):
    student, teacher = tiny_resnet(0), taught()
    student.config.id2label = {k: str(k) for k in range(10)}
    teacher.config.id2label = {k: str(9 - k) for k in range(10)}
    with pytest.raises(InputError, match="classes in another order: bring it to theirs by .*match_teacher"):
        make("kd", student=student, teachers=teacher)
    match_teacher(teacher, [student.config.id2label[k] for k in range(10)])
    make("kd", student=student, teachers=teacher)
    other = taught()
    other.config.id2label = {k: f"animal {k}" for k in range(10)}
    with pytest.raises(InputError, match="does not know '0', '1', '2' and 7 more"):
        make("kd", student=student, teachers=[teacher, other])


# -- contrast --------------------------------------------------------------------------------------


def test_contrasts_are_drawn_for_an_image_and_an_update(make):
    trainer = make("crd", augmentation=NO_AUGMENTATION)
    (term,), drawn = trainer.model.training_only["crd"], []
    negatives = term.memory.negatives

    def watched(draws, labels):
        drawn.append(negatives(draws, labels))
        return drawn[-1]

    term.memory.negatives = watched
    loss_of(trainer, 16)
    loss_of(trainer, 8)
    trainer.state.global_step = 1
    loss_of(trainer, 8)
    assert torch.equal(drawn[0][:8], drawn[1]) and not torch.equal(drawn[1], drawn[2])
    labels = trainer.train_dataset.labels
    assert (labels[drawn[0]] != labels[:16, None]).all()


# -- what is said of it, and what is refused ---------------------------------------------------------


def test_the_card_tells_loss_layers_and_paper(make, tmp_path):
    trainer = make("attention", "kd", loss_weights=[500.0, 2.0], kd_alpha=0.75, dataset_name="digits")
    trainer.save_model(tmp_path / "saved")
    card = (tmp_path / "saved/README.md").read_text()
    assert "| `loss` | `0.25 CE + 0.75 (500 attention + 2 kd)` |" in card
    layers = "backbone.stages.0.0 - backbone.stages.0.0, backbone.stages.1.0 - backbone.stages.1.0"
    assert f"| `layers of attention, student - teacher` | `{layers}` |" in card
    assert f"arxiv:{PAPERS['attention']['id']}" in card and PAPERS["attention"]["citation"] in card
    assert "`loss_weights`" not in card


def test_every_loss_has_its_paper_and_its_line_in_the_card(make, tmp_path):
    trainer = make("kd")
    trainer.save_model(tmp_path / "saved")
    card = (tmp_path / "saved/README.md").read_text()
    assert PAPERS.keys() == LOSSES.keys()
    for name, paper in PAPERS.items():
        assert f"| `{name}` |" in card and f"](https://arxiv.org/abs/{paper['id']})" in card


def test_a_callback_that_moves_the_teacher_is_found_out(make):
    trainer = make("kd", max_steps=1)
    with torch.no_grad():
        step = trainer.method_step
        bias = trainer.model.frozen()[0].model.classifier.bias
        trainer.method_step = lambda *given: (bias.add_(1), step(*given))[1]
    with pytest.raises(RunError, match="a teacher's weights"):
        trainer.train()


@pytest.mark.parametrize(
    ("losses", "settings", "message"),
    [
        (["kd"], {"teachers": []}, "give one trained classifier or more"),
        (["kd"], {"teachers": ["resnet20"]}, "the teacher is a str: pass a model"),
        (["kd"], {"teachers": [tiny_resnet(3, num_labels=7)]}, r"the networks have \[10, 7\] classes"),
        (["kd"], {"teacher_processing_classes": [None, None]}, "2 image processors for 1 teacher"),
        (["kd"], {"teacher_processing_classes": ViTImageProcessorPil()}, "=ViTImageProcessorPil: pass a list"),
        (["attention"], {"student_layers": ["pooled"], "teacher_layers": ["pooled"]},
         "pooled - pooled have a single position: name layers"),
        (["hints"], {}, r"loss 'hints' is unknown \(nearest: fitnets\)"),
        ([], {}, r"loss=\[\]: name one loss"),
        (["kd", "kd"], {}, "several different ones"),
        (["kd"], {"loss_weights": [1.0, 2.0]}, "give 1 above 0, for kd"),
        (["kd"], {"loss_weights": [0.0]}, "give 1 above 0"),
        (["kd"], {"temperature": 0.0}, "temperature=0.0 is out of range"),
        (["kd"], {"kd_alpha": 1.5}, "kd_alpha=1.5 is out of range"),
        (["kd"], {"kd_alpha": 0.5, "ce_weight": 0.5}, "ce_weight=0.5 has no effect with kd_alpha=0.5"),
        (["kd"], {"ce_weight": -1.0}, "ce_weight=-1.0 is out of range"),
        (["kd"], {"crd_negatives": 5}, "crd_negatives=5 has no effect with loss=kd"),
        (["kd"], {"student_layers": [1], "teacher_layers": [1]}, "student_layers=.* has no effect with loss=kd"),
        (["attention"], {"temperature": 2.0}, "temperature=2.0 has no effect with loss=attention"),
        (["attention"], {"student_layers": [1]}, "name as many of each"),
        (["attention"], {"student_layers": ["backbone.stages.0"], "teacher_layers": ["backbone.stage.0"]},
         "layer 'backbone.stage.0' is no module .*nearest: 'backbone.stages.0'"),
        (["fitnets"], {"student_layers": ["3"], "teacher_layers": ["1"]}, "layer 3: .* has 2 stages: use 1 to 2"),
        (["rkd"], {"gradient_accumulation_steps": 2}, "compares the images of a whole batch"),
        (["kd", "crd"], {"teacher_cache_dir": "cache", "augmentation": NO_AUGMENTATION},
         "loss=crd needs the teachers' features"),
        (["kd"], {"teacher_cache_dir": "cache"}, "choose augmentation=none"),
        (["dkd"], {"teacher_cache_dir": "cache", "teacher_cache_top_k": 3}, "leave it out, or choose kd"),
        (["crd"], {"crd_momentum": 1.0}, "crd_momentum=1.0 is out of range"),
        (["crd"], {"crd_temperature": 0.0}, "crd_temperature=0.0 is out of range"),
        (["kd"], {"teacher_image_size": 0}, "teacher_image_size=0 is out of range"),
    ],
)  # fmt: skip
def test_bad_input(make, tmp_path, losses, settings, message):
    with pytest.raises(InputError, match=message) as caught:
        tiny_trainer(tmp_path / "run", losses, **settings)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run").glob("*"))


def test_contrast_needs_training_images_of_several_classes(make):
    one_class = digit_sources().train.variant()
    one_class.labels = torch.zeros_like(one_class.labels)
    sources = type(digit_sources())(one_class, None, digit_sources().test, one_class.preprocessing)
    with pytest.raises(InputError, match="all 200 images are of one class"):
        make("crd", sources=sources)


def test_defaults_are_the_papers():
    config = OfflineDistillationConfig("unused", use_cpu=True)
    assert (config.loss, config.weights, config.ce_weight, config.temperature) == (["kd"], {"kd": 1.0}, 1.0, 4.0)
    assert (config.dkd_target_weight, config.dkd_nontarget_weight) == (1.0, 8.0)
    assert (config.rkd_distance_weight, config.rkd_angle_weight) == (25.0, 50.0)
    assert (config.crd_negatives, config.crd_temperature, config.crd_momentum) == (16384, 0.07, 0.5)
