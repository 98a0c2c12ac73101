"""KDCL, ONE, PCL and FFL: a resumed run is the run that never stopped, ranks add up, and NaN stops."""

import json

import pytest
from online_peer_runs import METHODS, rank_run, run, tiny_trainer
from processes import differences, in_a_process, with_older_state
from resume_run import STEPS
from test_distributed import assert_same, launch
from watched_runs import assert_stops_at_nan


# Beside the students KDCL's teacher `general` alone has a state.
SETTINGS = {"kdcl": {"variant": "general"}, "one": {}, "pcl": {}, "ffl": {}}


@pytest.fixture(scope="module", params=METHODS)
def method(request):
    return request.param


@pytest.fixture(scope="module")
def straight(method, tmp_path_factory):
    return in_a_process(tmp_path_factory.mktemp(method), target=run, method=method, **SETTINGS[method])


def resume_from(folder, step, tmp_path, method, **arguments):
    """Go on with nothing but the checkpoint; saves only the last step."""
    checkpoint = str(folder / f"checkpoint-{step}")
    settings = {"method": method, "resume": checkpoint, "save_steps": STEPS, **SETTINGS[method], **arguments}
    return in_a_process(tmp_path / "resumed", target=run, **settings)


def unequal(straight, resumed):
    return differences(straight / f"checkpoint-{STEPS}", resumed / f"checkpoint-{STEPS}")


@pytest.mark.parametrize(("step", "workers"), [(3, 0), (4, 0), (6, 2)])
def test_resume_is_exact(straight, method, tmp_path, step, workers):
    """In the middle of an epoch of four steps and at its end, with and without workers."""
    resumed = resume_from(straight, step, tmp_path, method, workers=workers)
    assert unequal(straight, resumed) == []
    seen, again = (json.loads((folder / "batches.json").read_text()) for folder in (straight, resumed))
    assert again == {number: batch for number, batch in seen.items() if int(number) > step}


@pytest.mark.parametrize("name", ["training_state/networks", "training_state/optimizers", "model"])
def test_no_state_can_be_lost_unnoticed(straight, method, tmp_path, name):
    """What the test above compares does depend on each part of a checkpoint."""
    place = with_older_state(straight, name, tmp_path)
    assert unequal(straight, resume_from(place, 6, place, method)) != []


@pytest.mark.parametrize(("kind", "settings"), [("kdcl", {"variant": "general"}), ("pcl", {"max_grad_norm": 0.1})])
def test_two_processes_equal_one(kind, settings, tmp_path):
    """In float64, and without statistics of a batch, which would be each process's own."""
    settings = {"target": rank_run, "method": kind, **settings}
    (one,) = launch(1, tmp_path / "a", tmp_path / "one", per_device_train_batch_size=40, **settings)
    two = launch(2, tmp_path / "b", tmp_path / "two", per_device_train_batch_size=20, **settings)
    assert_same(two[0]["weights"], two[1]["weights"])
    assert_same(one["weights"], two[0]["weights"], atol=1e-10)
    logs = [[entry for entry in found["logs"] if "loss" in entry] for found in (one, two[0])]
    for alone, together in zip(*logs, strict=True):
        assert alone["loss"] == pytest.approx(together["loss"], rel=1e-5)
    for name, value in one["metrics"].items():
        if name.endswith("accuracy"):
            assert two[1]["metrics"][name] == pytest.approx(value), name


@pytest.mark.parametrize("kind", METHODS)
def test_nan_stops_the_run_and_is_not_saved(kind, tmp_path):
    assert_stops_at_nan(tiny_trainer(kind, tmp_path, save_strategy="steps", save_steps=2))
