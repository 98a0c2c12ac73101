"""What KDCL, ONE, PCL and FFL have in common: they learn, add up over micro-batches, save whole students, refuse."""

import re

import pytest
import torch
import yaml
from online_peer_runs import METHODS, tiny_trainer
from safetensors.torch import load_file
from test_online_adversarial import assert_equal, weights
from tiny_runs import NO_AUGMENTATION, tiny_resnet
from transformers import AutoModelForImageClassification

from hfkd.errors import InputError
from hfkd.trainers.branches import BranchConfig
from hfkd.trainers.kdcl import KdclConfig
from hfkd.trainers.pcl import PclConfig


BRANCHES = ("one", "pcl", "ffl")
TEACHER = {"one": "gated_ensemble", "pcl": "peer_ensemble", "ffl": "fused"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("own_networks", [False, True])
def test_it_learns(tmp_path, method, own_networks):
    config = {"shared_trunk": False} if own_networks and method in BRANCHES else {}
    students = [tiny_resnet(0, width=8), tiny_resnet(1, width=8)]
    trainer = tiny_trainer(
        method, tmp_path, students, max_steps=40, lr_milestones=[], augmentation=NO_AUGMENTATION, **config
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_mean_accuracy"] > max(0.4, before["eval_mean_accuracy"])
    assert after["eval_loss"] < before["eval_loss"]
    history = [entry for entry in trainer.state.log_history if "student_1_ce" in entry]
    assert history[-1]["student_1_ce"] < 0.7 * history[0]["student_1_ce"]
    if method in BRANCHES:
        assert after[f"eval_{TEACHER[method]}_accuracy"] > 0.3


@pytest.mark.parametrize(
    ("method", "config"),
    [("kdcl", {}), ("kdcl", {"variant": "general"}), ("pcl", {}), ("pcl", {"independent_views": False})],
    ids=["kdcl", "kdcl general", "pcl", "pcl of one view"],
)
def test_accumulated_micro_batches_equal_one_batch(tmp_path, method, config):
    """40x1 = 20x2 = 10x4 in float64; ONE and FFL have batch norm beside the students, which ties a batch together."""
    runs = []
    for size, steps in ((40, 1), (20, 2), (10, 4)):
        trainer = tiny_trainer(
            method,
            tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=7,
            norm="group",
            dtype=torch.float64,
            **config,
        )
        trainer.train()
        runs.append((weights(trainer.model), [entry for entry in trainer.state.log_history if "loss" in entry]))
    for parts, log in runs[1:]:
        assert_equal(runs[0][0], parts, atol=1e-10)
        for whole, part in zip(runs[0][1], log, strict=True):
            assert part["loss"] == pytest.approx(whole["loss"], rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_saved_students_are_ordinary_classifiers(tmp_path, method):
    trainer = tiny_trainer(method, tmp_path / "run", max_steps=2, count=3)
    trainer.train()
    trainer.save_model()
    trainer.model.eval()
    pixels = torch.randn(3, 1, 8, 8)
    for k, student in enumerate(trainer.model.students):
        folder = tmp_path / "run" / (f"student_{k}" if k else "")
        again = AutoModelForImageClassification.from_pretrained(folder).eval()
        torch.testing.assert_close(again(pixels).logits, student(pixels).logits)
        assert load_file(folder / "model.safetensors").keys() == tiny_resnet(0).state_dict().keys()


@pytest.mark.parametrize("method", METHODS)
def test_the_card_tells_the_method_and_what_was_measured(tmp_path, method):
    trainer = tiny_trainer(method, tmp_path / "run", max_steps=2, temperature=5.0)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    text = (tmp_path / "run/README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    values = {m["name"]: m["value"] for r in front["model-index"][0]["results"] for m in r["metrics"]}
    assert values["Accuracy, Student 1"] == metrics["eval_student_1_accuracy"]
    if method in BRANCHES:
        subject = {"one": "Ensemble by the gate", "pcl": "Peer ensemble", "ffl": "Fused classifier"}[method]
        assert values[f"Accuracy, {subject}"] == metrics[f"eval_{TEACHER[method]}_accuracy"]
    arxiv = {"kdcl": [], "one": ["1806.04606"], "pcl": ["2006.04147"], "ffl": ["1904.09058"]}[method]
    assert [tag for tag in front["tags"] if tag.startswith("arxiv")] == [f"arxiv:{paper}" for paper in arxiv]
    assert trainer._paper.get("url", f"https://arxiv.org/abs/{trainer._paper['id']}") in text
    for heading in ("## Method", "## Results", "## Limits", "## Citation"):
        assert heading in text
    assert trainer._paper["citation"].splitlines()[1] in text and "`temperature` | `5.0`" in text
    assert not re.search(r"\{[{%]|\n\n\n\n", text)


@pytest.mark.parametrize(
    ("config", "settings", "named"),
    [
        (BranchConfig, {"temperature": 0.0}, "temperature=0.0"),
        (BranchConfig, {"kl_rampup_epochs": -1.0}, "kl_rampup_epochs=-1.0"),
        (PclConfig, {"mean_teacher_decay": 1.0}, "mean_teacher_decay=1.0"),
        (KdclConfig, {"temperature": 0.0}, "temperature=0.0"),
        (KdclConfig, {"kl_weight": -1.0}, "kl_weight=-1.0"),
        (KdclConfig, {"variant": "best"}, "variant='best' is unknown"),
        (KdclConfig, {"kl_weight": 0.0, "variant": "linear"}, "variant=linear has no effect with kl_weight=0"),
        (KdclConfig, {"kl_weight": 0.0, "temperature": 4.0}, "temperature=4.0 has no effect with kl_weight=0"),
    ],
)
def test_bad_settings(config, settings, named):
    with pytest.raises(InputError, match=re.escape(named)) as caught:
        config("unused", use_cpu=True, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_bad_cohorts(tmp_path, method):
    with pytest.raises(InputError, match="two or more"):
        tiny_trainer(method, tmp_path, [tiny_resnet(0)])
    with pytest.raises(InputError, match="single model: pass a list"):
        tiny_trainer(method, tmp_path, tiny_resnet(0))
    with pytest.raises(InputError, match="classes"):
        tiny_trainer(method, tmp_path, [tiny_resnet(0), tiny_resnet(1, num_labels=7)])
