"""VICReg, SimSiam and encoding: a resumed run is the run that never stopped, and ranks add up."""

import json

import pytest
from processes import differences, in_a_process, with_older_state
from resume_run import STEPS
from test_distributed import assert_same, launch
from two_view_runs import rank_run, run, tiny_generator, tiny_trainer
from watched_runs import assert_stops_at_nan

from hfkd.errors import InputError


METHODS = ["vicreg", "simsiam", "latent_encoding"]
MIXED = {"synthetic_share": 0.5}


@pytest.fixture(scope="module", params=METHODS)
def method(request):
    return request.param


@pytest.fixture(scope="module")
def straight(method, tmp_path_factory):
    return in_a_process(tmp_path_factory.mktemp(method), target=run, method=method, **MIXED)


def resume_from(folder, step, tmp_path, method, **arguments):
    """Go on with nothing but the checkpoint; saves only the last step."""
    checkpoint = str(folder / f"checkpoint-{step}")
    resumed = tmp_path / "resumed"
    settings = {"method": method, "resume": checkpoint, "save_steps": STEPS, **MIXED, **arguments}
    return in_a_process(resumed, target=run, **settings)


def unequal(straight, resumed):
    """The fingerprints of the generator are a file of their own."""
    return differences(straight / f"checkpoint-{STEPS}", resumed / f"checkpoint-{STEPS}", 1, 7)


@pytest.mark.parametrize(("step", "workers"), [(3, 0), (6, 2)])
def test_resume_is_exact(straight, method, tmp_path, step, workers):
    """In the middle of an epoch of four steps, with and without workers."""
    resumed = resume_from(straight, step, tmp_path, method, workers=workers)
    assert unequal(straight, resumed) == []
    seen, again = (json.loads((folder / "batches.json").read_text()) for folder in (straight, resumed))
    assert again == {number: batch for number, batch in seen.items() if int(number) > step}


def test_no_state_can_be_lost_unnoticed(straight, method, tmp_path):
    """What the tests above compare does depend on each part of a checkpoint."""
    for name in ("training_state/networks", "training_state/optimizers", "model"):
        place = with_older_state(straight, name, tmp_path / name.replace("/", "-"))
        assert unequal(straight, resume_from(place, 6, place, method)) != [], name


def test_another_generator_is_refused(straight, method, tmp_path):
    trainer = tiny_trainer(method, tmp_path, generator=tiny_generator(seed=1), **MIXED)
    with pytest.raises(InputError, match="is not the one that"):
        trainer.train(resume_from_checkpoint=str(straight / "checkpoint-6"))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("vicreg", {}),
        ("vicreg", MIXED | {"max_grad_norm": 0.1}),
        ("simsiam", MIXED),
        ("latent_encoding", MIXED),
    ],
    ids=["vicreg of real images", "vicreg of both", "simsiam", "encoding"],
)
def test_two_processes_equal_one(kind, settings, tmp_path):
    """In float64 and without norms, whose statistics are each process's own."""
    settings = {"target": rank_run, "method": kind, **settings}
    (one,) = launch(1, tmp_path / "a", tmp_path / "one", per_device_train_batch_size=40, **settings)
    two = launch(2, tmp_path / "b", tmp_path / "two", per_device_train_batch_size=20, **settings)
    assert_same(two[0]["weights"], two[1]["weights"])
    assert_same(one["weights"], two[0]["weights"], atol=1e-10)
    logs = [[entry for entry in found["logs"] if "loss" in entry] for found in (one, two[0])]
    for alone, together in zip(*logs, strict=True):
        assert alone["loss"] == pytest.approx(together["loss"], rel=1e-5)


def test_without_gathering_vicregs_processes_have_statistics_of_their_own(tmp_path):
    settings = {"target": rank_run, "method": "vicreg", "gather_statistics": False}
    (one,) = launch(1, tmp_path / "a", tmp_path / "one", per_device_train_batch_size=40, **settings)
    two = launch(2, tmp_path / "b", tmp_path / "two", per_device_train_batch_size=20, **settings)
    assert_same(two[0]["weights"], two[1]["weights"])
    with pytest.raises(AssertionError):
        assert_same(one["weights"], two[0]["weights"], atol=1e-4)


def test_nan_stops_the_run_and_is_not_saved(method, tmp_path):
    assert_stops_at_nan(tiny_trainer(method, tmp_path, save_strategy="steps", save_steps=2, **MIXED))
