"""GBC: a resumed run is the run that never stopped, and a run that cannot go on is stopped."""

import json
import math

import pytest
import torch
from classifier_runs import processor, run, tiny_generator, tiny_mlp, tiny_trainer
from processes import differences, in_a_process, with_older_state
from resume_run import STEPS

from hfkd.errors import InputError, RunError


# Learned multipliers, several classifiers one at a time, and the gradient clipped: everything that has a state.
SETTINGS = {"multipliers": "network", "several": True, "classifiers_per_step": "one", "max_grad_norm": 0.5}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return in_a_process(tmp_path_factory.mktemp("straight"), target=run, **SETTINGS)


def resume_from(folder, step, tmp_path, **settings):
    checkpoint, resumed = str(folder / f"checkpoint-{step}"), tmp_path / "resumed"
    return in_a_process(resumed, target=run, resume=checkpoint, save_steps=STEPS, **(SETTINGS | settings))


def unequal(straight, resumed):
    return differences(straight / f"checkpoint-{STEPS}", resumed / f"checkpoint-{STEPS}", students=1, others=7)


@pytest.mark.parametrize(("step", "workers"), [(1, 0), (5, 2), (11, 0)])
def test_resume_is_exact(straight, tmp_path, step, workers):
    """In the warm-up of two updates, and after it."""
    resumed = resume_from(straight, step, tmp_path, workers=workers)
    assert unequal(straight, resumed) == []
    seen, again = (json.loads((folder / "batches.json").read_text()) for folder in (straight, resumed))
    assert again == {number: batch for number, batch in seen.items() if int(number) > step}


def test_no_state_can_be_lost_unnoticed(straight, tmp_path):
    for name in ("training_state/networks", "training_state/optimizers", "model"):
        place = with_older_state(straight, name, tmp_path / name.replace("/", "-"))
        assert unequal(straight, resume_from(place, 6, place)) != [], name


def test_no_classifier_is_saved(straight):
    saved = {str(path.relative_to(straight)) for path in (straight / "checkpoint-12").rglob("*.safetensors")}
    assert {name.rpartition("/")[2] for name in saved} == {
        "model.safetensors",
        "networks.safetensors",
        "optimizers.safetensors",
        "rng.safetensors",
    }
    kept = json.loads((straight / "checkpoint-12/training_state/networks.json").read_text())
    assert all(name.startswith("multipliers.") for name, _ in kept["__dict__"])


def test_another_generators_checkpoint_is_refused(straight, tmp_path):
    trainer = tiny_trainer(tmp_path, generator=tiny_generator(latent_size=6))
    with pytest.raises(InputError, match="was saved with class_counts=") as caught:
        trainer.train(resume_from_checkpoint=str(straight / "checkpoint-6"))
    assert "\n" not in str(caught.value)


def changed(classifier, processor_changes=None):
    """The run's two classifiers, one of them otherwise than in the run."""
    processors = [processor(), processor()]
    for name, value in (processor_changes or {}).items():
        setattr(processors[1], name, value)
    return {"classifiers": [tiny_mlp(), classifier], "processing_classes": processors}


@pytest.mark.parametrize(
    "networks",
    [
        lambda: changed(tiny_mlp(2, num_labels=3, norm="batch")),
        lambda: changed(tiny_mlp(1, num_labels=3, norm="batch"), {"image_mean": [0.2] * 3}),
    ],
    ids=["weights", "normaliser"],
)
def test_another_classifier_is_refused(straight, tmp_path, networks):
    """It would go on, towards other images."""
    several = {name: value for name, value in SETTINGS.items() if name != "several"}
    trainer = tiny_trainer(tmp_path, **networks(), **several)
    with pytest.raises(
        InputError, match="classifier 1 is not the one that .*checkpoint-6 was trained on .*: resume with that one"
    ) as caught:
        trainer.train(resume_from_checkpoint=str(straight / "checkpoint-6"))
    assert "\n" not in str(caught.value)


def test_nan_stops_the_run_and_is_not_saved(tmp_path):
    trainer = tiny_trainer(tmp_path, [tiny_mlp()], save_strategy="steps", save_steps=2)
    draw = trainer._draw

    def poisoned(k, batch):
        latents, labels = draw(k, batch)
        return (latents * math.nan if trainer.state.global_step == 2 else latents), labels

    trainer._draw = poisoned
    with pytest.raises(RunError, match="not finite by step 3") as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert all(torch.isfinite(p).all() for p in trainer.conditions[0].classifier.parameters())
