"""A resumed full-batch run is the run that never stopped, to the bit of the double-precision weights."""

import json

import pytest
from max_margin_runs import run
from processes import contents, in_a_process, with_older_state
from resume_run import STEPS


# Scaled from the first step on, and where the batch norms' weights alone decay.
SETTINGS = {
    "scaled": {"loss_scaling_below": 5.0},
    "decayed": {"decayed": "scale_sensitive", "weight_decay": 0.1, "lr_scheduler_type": "cosine"},
}


@pytest.fixture(scope="module", params=SETTINGS)
def settings(request):
    return SETTINGS[request.param]


@pytest.fixture(scope="module")
def straight(settings, tmp_path_factory):
    return in_a_process(tmp_path_factory.mktemp("straight"), target=run, **settings)


def resume_from(folder, step, tmp_path, **arguments):
    """Go on with nothing but the checkpoint; saves only the last step."""
    checkpoint = str(folder / f"checkpoint-{step}")
    return in_a_process(tmp_path / "resumed", target=run, resume=checkpoint, save_steps=STEPS, **arguments)


def unequal(straight, resumed):
    left, right = (contents(folder / f"checkpoint-{STEPS}") for folder in (straight, resumed))
    assert left.keys() == right.keys()
    assert {"model.safetensors", "training_state/double_precision.safetensors"} < left.keys()
    return [name for name in left if left[name] != right[name]]


@pytest.mark.parametrize(("step", "workers"), [(1, 0), (6, 2), (11, 0)])
def test_resume_is_exact(straight, settings, tmp_path, step, workers):
    resumed = resume_from(straight, step, tmp_path, workers=workers, **settings)
    assert unequal(straight, resumed) == []
    seen, again = (json.loads((folder / "batches.json").read_text()) for folder in (straight, resumed))
    assert again == {number: batch for number, batch in seen.items() if int(number) > step}
    assert len({batch for batches in seen.values() for batch in batches}) == 1  # of all images, unaugmented


@pytest.mark.parametrize("name", ["training_state/double_precision", "training_state/optimizers"])
def test_no_state_can_be_lost_unnoticed(straight, settings, tmp_path, name):
    with_older_state(straight, name, tmp_path)
    assert unequal(straight, resume_from(tmp_path, 6, tmp_path, **settings)) != []


def test_single_precision_is_resumed_exactly_too(tmp_path):
    settings = {"double_precision": False}
    whole = in_a_process(tmp_path / "whole", target=run, **settings)
    resumed = resume_from(whole, 5, tmp_path, **settings)
    left, right = (contents(folder / f"checkpoint-{STEPS}") for folder in (whole, resumed))
    assert left == right and "training_state/double_precision.json" not in left
