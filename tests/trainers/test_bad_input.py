"""What does not fit is one line before the run starts: nothing on disk, no error of torch's in the first step."""

import copy
import doctest
from functools import partial
from types import SimpleNamespace

import datasets
import pytest
import torch
from tiny_runs import digit_sources, tiny_resnet
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from hfkd.data import DataArguments, ImageColumns, Preprocessing, find_columns, load_image_datasets, make_source
from hfkd.errors import InputError
from hfkd.models import build_student
from hfkd.trainers import online_adversarial
from hfkd.trainers.online_adversarial import OnlineAdversarialConfig, OnlineAdversarialTrainer


@pytest.fixture
def refuse(make_trainer, tmp_path):
    """refuse(match, students, **what make_trainer takes): no trainer is made, and no file."""

    def check(match, students=None, **settings):
        with pytest.raises(InputError, match=match) as caught:
            make_trainer(students, **settings)
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.rglob("*"))

    return check


def images(count, side=8, num_labels=10, multi_label=False):
    """A `datasets.Dataset` of noise."""
    label = datasets.ClassLabel(names=[str(k) for k in range(num_labels)])
    features = datasets.Features({"image": datasets.Image(), "label": [label] if multi_label else label})
    pixels = torch.randint(0, 255, (count, side, side), dtype=torch.uint8).numpy()
    labels = [[k % num_labels] if multi_label else k % num_labels for k in range(count)]
    return datasets.Dataset.from_dict({"image": list(pixels), "label": labels}, features=features)


def sources(dataset, columns=None, side=8, channels=1):
    preprocessing = Preprocessing(side, channels, (0.5,) * channels, (0.5,) * channels)
    source = make_source(dataset, columns or find_columns(dataset.features), preprocessing)
    return SimpleNamespace(train=source, test=None)


def stock_resnet(num_channels=3):
    config = ResNetConfig(
        num_channels=num_channels,
        embedding_size=4,
        hidden_sizes=[4, 8],
        depths=[1, 1],
        layer_type="basic",
        num_labels=10,
    )
    return ResNetForImageClassification(config)


# -- networks --------------------------------------------------------------------------------------


def test_students_that_are_no_list_of_models(refuse):
    refuse("students=HfkdResNetForImageClassification.*pass a list", tiny_resnet(0))
    refuse("student 1 is a str", [tiny_resnet(0), "resnet8"])
    refuse("the teacher is a Linear", [tiny_resnet(0)], teacher=nn.Linear(2, 2))


def test_one_model_in_two_roles(refuse):
    student = tiny_resnet(0)
    refuse("student 0 and student 2 share weights", [student, tiny_resnet(1), student])
    refuse("student 1 and the teacher share weights", [tiny_resnet(1), student], teacher=student)
    tied = copy.deepcopy(student)
    tied.classifier.weight = student.classifier.weight
    refuse("student 0 and student 1 share weights", [student, tied])


def test_classes_of_networks_and_data(refuse):
    refuse(r"\[10, 10, 7\] classes", [tiny_resnet(0), tiny_resnet(1)], teacher=tiny_resnet(2, num_labels=7))
    for count in (7, 12):
        pair = [tiny_resnet(seed, num_labels=count) for seed in (0, 1)]
        refuse(f"train_dataset has 10 classes and the networks have {count}", pair)


def test_a_teacher_of_images_of_another_size(refuse):
    teacher = tiny_resnet(2)
    teacher.config.image_size = 16
    refuse("made for images of 16 pixels and the data has 8: give a teacher", [tiny_resnet(0)], teacher=teacher)


@pytest.mark.parametrize("loss", ["adversarial", "none"])
@pytest.mark.parametrize("dtypes", [("float32", "float64"), ("bfloat16", "bfloat16"), ("float16", "float16")])
def test_precisions(refuse, dtypes, loss):
    pair = [tiny_resnet(seed, dtype=getattr(torch, dtype)) for seed, dtype in enumerate(dtypes)]
    refuse(f"weights are .*{dtypes[0]}.*float32.*bf16=True", pair, feature_loss=loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_everything_is_made_in_the_students_precision(make_trainer, dtype):
    """Teachers of any precision too, and layers beside the students."""
    teacher = tiny_resnet(9, width=6, dtype=torch.bfloat16)
    students = [tiny_resnet(0, dtype=dtype)]
    trainer = make_trainer(
        students, teacher=teacher, transfer_always=True, discriminator_spectral_norm=True, max_steps=2
    )
    trainer.train()
    assert {tensor.dtype for tensor in trainer.model.parameters()} == {dtype}
    assert len(list(trainer.model.training_only.parameters())) > 0


# -- images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["adversarial", "none"])
def test_channels(refuse, make_trainer, loss):
    refuse("student 1 has num_channels=3 and the images have 1", [tiny_resnet(0), stock_resnet()], feature_loss=loss)
    refuse("the teacher has num_channels=3", [tiny_resnet(0)], teacher=stock_resnet(), feature_loss=loss)
    colour = digit_sources(3)
    refuse("ResNetForImageClassification cannot take images of 8x8 pixels with 3 channels",
           [stock_resnet(), stock_resnet(1)], sources=colour, feature_loss=loss)  # fmt: skip
    make_trainer(sources=colour, max_steps=1).train()  # grey networks of ours average three channels


@pytest.mark.parametrize("loss", ["adversarial", "none"])
def test_image_size(refuse, loss):
    deep = [tiny_resnet(seed, depths=(1, 1, 1, 1, 1)) for seed in (0, 1)]
    refuse("cannot take images of 4x4 pixels", deep, sources=sources(images(20, 4), side=4), feature_loss=loss)


def test_instance_norm_of_a_single_position(refuse, make_trainer):
    pair = [tiny_resnet(seed, depths=(1, 1, 1)) for seed in (0, 1)]
    one = {"discriminator_norm": "instance", "discriminator_layers": 3}
    refuse("discriminator_norm=instance cannot take maps of 2x2.*discriminator_layers=3", pair, **one)
    make_trainer(max_steps=1, discriminator_norm="instance").train()


# -- labels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoded", [True, False])
def test_several_labels(refuse, decoded):
    several = images(20, multi_label=True)
    made = sources(several) if decoded else SimpleNamespace(train=several, test=None)
    refuse("train_dataset has several labels for each image", sources=made)


def test_unlabelled(refuse):
    dataset = images(20)
    refuse("train_dataset has no labels", sources=sources(dataset, ImageColumns("image")))
    refuse("no label column", sources=SimpleNamespace(train=dataset.remove_columns("label"), test=None))
    good, bad = sources(dataset), sources(dataset, ImageColumns("image"))
    made = SimpleNamespace(train=good.train, test={"a": good.train, "b": bad.train})
    refuse(r"eval_dataset\['b'\] has no labels", sources=made)


def test_what_is_no_dataset(refuse):
    refuse("train_dataset is a list", sources=SimpleNamespace(train=[1, 2], test=None))


# -- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "settings", "match"),
    [
        (41, {"per_device_train_batch_size": 20}, "batch_size=20 gives a batch of one image of the 41.*drop_last"),
        (20, {"per_device_train_batch_size": 1}, "batch_size=1 gives a batch of one image of the 20.*2 or more"),
        (1, {}, "a batch of one image"),
        (20, {"per_device_train_batch_size": 21, "dataloader_drop_last": True}, "has 20 images.*needs 21 or more"),
        (0, {}, "has 0 images"),
    ],
)
@pytest.mark.parametrize("loss", ["adversarial", "none"])
def test_batches(refuse, count, settings, match, loss):
    refuse(match, sources=sources(images(count)), feature_loss=loss, **settings)


def test_batches_of_one_image_where_nothing_compares_images(make_trainer):
    pair = [tiny_resnet(seed, norm="group") for seed in (0, 1)]
    one = {"sources": sources(images(3)), "per_device_train_batch_size": 1, "max_steps": 2}
    make_trainer(pair, discriminator_norm="none", **one).train()
    with pytest.raises(InputError, match="batch norm"):
        make_trainer(pair, **one)
    dropped = {"per_device_train_batch_size": 20, "dataloader_drop_last": True, "max_steps": 3}
    make_trainer(sources=sources(images(41)), **dropped).train()


# -- fields without effect -------------------------------------------------------------------------

UNUSED = {
    ("feature_loss", "none"): {
        "feature_learning_rate": 1e-3,
        "feature_loss_weight": 0.5,
        "feature_weight_decay": 0.2,
        "feature_lr_milestones": [0.1],
        "feature_normalize": True,
        "feature_optimizer": "adamw",
        "feature_start_epoch": 1.0,
        "gan_loss": "hinge",
        "update_mode": "recompute",
        "update_order": "generator_first",
        "discriminator_norm": "none",
        "discriminator_learning_rate": 1e-3,
        "discriminator_patch": True,
        "transfer_always": True,
        "transfer_channels": "max",
    },
    ("feature_loss", "l1"): {"gan_loss": "hinge", "discriminator_layers": 3, "update_order": "generator_first"},
    ("feature_loss", "l2"): {"gan_loss": "hinge", "discriminator_layers": 3, "update_order": "generator_first"},
    ("feature_loss", "adversarial"): {"feature_normalize": True},
    ("feature_loss_weight", 0.0): {"gan_loss": "hinge", "transfer_always": True, "update_mode": "recompute"},
    ("feature_optimizer", "main"): {
        "feature_learning_rate": 1e-3,
        "feature_weight_decay": 0.2,
        "feature_lr_milestones": [0.1],
        "update_mode": "recompute",
    },
    ("kl_weight", 0.0): {"temperature": 2.0, "kl_rampup_epochs": 3.0, "logit_source": "all"},
    ("discriminator_layers", 1): {"discriminator_channels": 8, "discriminator_norm": "instance"},
}
CASES = [(setting, chosen, name, value) for (setting, chosen), row in UNUSED.items() for name, value in row.items()]


@pytest.mark.parametrize(("setting", "chosen", "name", "value"), CASES)
def test_a_field_without_effect(setting, chosen, name, value):
    settings = {setting: chosen} | ({"feature_loss": "l1"} if chosen == "main" else {})
    default = getattr(OnlineAdversarialConfig("unused", use_cpu=True), name)
    with pytest.raises(InputError, match=f"^{name}=.* has no effect with {setting}={chosen}") as caught:
        OnlineAdversarialConfig("unused", use_cpu=True, **settings, **{name: value})
    assert "\n" not in str(caught.value)
    same = OnlineAdversarialConfig("unused", use_cpu=True, **settings, **{name: default})  # as recipes say defaults
    assert getattr(same, name) == default


# -- environment of accelerate's launcher ----------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_mixed_precision_from_the_launcher_is_refused(monkeypatch, precision):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    with pytest.raises(InputError, match=f"ACCELERATE_MIXED_PRECISION={precision}.*use bf16") as caught:
        OnlineAdversarialConfig("unused", use_cpu=True)
    assert "\n" not in str(caught.value)


def test_bf16_from_the_launcher_is_said_in_the_config(monkeypatch):
    assert not OnlineAdversarialConfig("unused", use_cpu=True).bf16
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert OnlineAdversarialConfig("unused", use_cpu=True).to_dict()["bf16"] is True


@pytest.mark.parametrize("launcher", ["DEEPSPEED", "FSDP"])
def test_sharding_launchers_are_refused(monkeypatch, launcher):
    monkeypatch.setenv(f"ACCELERATE_USE_{launcher}", "true")
    with pytest.raises(InputError, match=f"ACCELERATE_USE_{launcher}=true is not supported") as caught:
        OnlineAdversarialConfig("unused", use_cpu=True)
    assert "\n" not in str(caught.value)
    monkeypatch.setenv(f"ACCELERATE_USE_{launcher}", "false")
    OnlineAdversarialConfig("unused", use_cpu=True)


@pytest.mark.parametrize(("kind", "on_cpu"), [("mps", True), ("cuda", False)])
def test_accelerators_without_float64_are_not_used(monkeypatch, kind, on_cpu):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device(kind))
    assert OnlineAdversarialConfig("unused").use_cpu is on_cpu


# -- defaults --------------------------------------------------------------------------------------


def test_defaults():
    config = OnlineAdversarialConfig("unused", use_cpu=True)
    assert config.eval_strategy == "no" and config.restore_callback_states_from_checkpoint


def test_the_example_of_the_docstring_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = {"max_steps": 1, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    digits = load_image_datasets(DataArguments(train_split="train[:8]", validation_size=0)).train
    names = {
        "OnlineAdversarialConfig": partial(OnlineAdversarialConfig, **short),
        "OnlineAdversarialTrainer": OnlineAdversarialTrainer,
        "build_student": build_student,
        "names": [str(digit) for digit in range(10)],
        "train": sources(digits, side=32, channels=3).train,
    }
    for example in doctest.DocTestParser().get_examples(OnlineAdversarialTrainer.__doc__):
        exec(example.source, names)
    assert names["trainer"].state.global_step == 1


@pytest.mark.parametrize(
    ("settings", "drawn"), [({"feature_loss": "none"}, 0), ({"feature_start_epoch": 9.0}, 0), ({}, 4)]
)
def test_generators_are_kept_only_for_maps(make_trainer, monkeypatch, settings, drawn):
    """Each of two micro-batches keeps their state, and taking its maps again keeps it once more."""
    calls = []
    state = online_adversarial.rng_state
    monkeypatch.setattr(online_adversarial, "rng_state", lambda: calls.append(1) or state())
    make_trainer(max_steps=1, gradient_accumulation_steps=2, **settings).train()
    assert len(calls) == drawn


def test_a_run_is_not_resumed_with_another_teacher(make_trainer, tmp_path):
    def distil(teacher, folder):
        return make_trainer(
            teacher=teacher,
            output_dir=tmp_path / folder,
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
        )

    distil(tiny_resnet(8), "run").train()
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(InputError, match="teacher 0 is not the one that"):
        distil(tiny_resnet(9), "other").train(resume_from_checkpoint=checkpoint)
    with pytest.raises(InputError, match=r"trained on 1 teacher\(s\) and this run has 0"):
        make_trainer(output_dir=tmp_path / "none", max_steps=4).train(resume_from_checkpoint=checkpoint)
    distil(tiny_resnet(8), "same").train(resume_from_checkpoint=checkpoint)
