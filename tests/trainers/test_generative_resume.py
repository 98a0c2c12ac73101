"""BiGAN, GAN and VAE: a resumed run is the run that never stopped, ranks and micro-batches add up, NaN stops."""

import json

import pytest
import torch
from generative_runs import SEPARABLE, rank_run, run, tiny_trainer
from processes import differences, in_a_process, with_older_state
from resume_run import STEPS
from test_distributed import assert_same, launch
from watched_runs import assert_stops_at_nan

from hfkd.errors import InputError


# A target that is always exceeded, within few images.
ADA = {"discriminator_augmentation": "ada", "ada_target": -1.0, "ada_images": 0.5, "ada_interval": 3}
STUDENTS = {"bigan": 2, "gan": 2, "vae": 1}


@pytest.fixture(scope="module", params=["bigan", "gan", "vae"])
def method(request):
    return request.param


@pytest.fixture(scope="module")
def straight(method, tmp_path_factory):
    return in_a_process(tmp_path_factory.mktemp(method), target=run, method=method)


def resume_from(folder, step, tmp_path, method, **arguments):
    """Go on with nothing but the checkpoint; saves only the last step."""
    checkpoint = str(folder / f"checkpoint-{step}")
    resumed = tmp_path / "resumed"
    return in_a_process(resumed, target=run, method=method, resume=checkpoint, save_steps=STEPS, **arguments)


def unequal(straight, resumed, method):
    return differences(straight / f"checkpoint-{STEPS}", resumed / f"checkpoint-{STEPS}", STUDENTS[method])


@pytest.mark.parametrize(("step", "workers"), [(3, 0), (4, 0), (6, 2), (11, 0)])
def test_resume_is_exact(straight, method, tmp_path, step, workers):
    """In the middle and at the end of an epoch of four steps."""
    resumed = resume_from(straight, step, tmp_path, method, workers=workers)
    assert unequal(straight, resumed, method) == []
    seen, again = (json.loads((folder / "batches.json").read_text()) for folder in (straight, resumed))
    assert again == {number: batch for number, batch in seen.items() if int(number) > step}


def test_resume_is_exact_where_only_every_third_update_moves_all(tmp_path):
    settings = {"gan_loss": "wasserstein", "discriminator_steps": 3, "discriminator_activation": "leaky_relu"}
    settings |= {"per_device_train_batch_size": 25, "gradient_accumulation_steps": 2, "max_grad_norm": 0.01}
    whole = in_a_process(tmp_path / "whole", target=run, **settings)
    resumed = resume_from(whole, 5, tmp_path, "bigan", **settings)
    assert unequal(whole, resumed, "bigan") == []


def test_resume_is_exact_with_a_penalty_now_and_then_and_an_augmentation_that_adapts(tmp_path):
    settings = ADA | {"r1_interval": 3, "ema_half_life": 0.1, "per_device_train_batch_size": 25}
    settings |= {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    whole = in_a_process(tmp_path / "whole", target=run, method="gan", **settings)
    for step in (4, 5):  # ADA moves in every third update: what it has seen since is part of a checkpoint
        resumed = resume_from(whole, step, tmp_path / str(step), "gan", **settings)
        assert unequal(whole, resumed, "gan") == []


# Each as it was after the first step. A VAE draws nothing from the global generators, and neither does a GAN.
MUTATIONS = {
    "bigan": ("training_state/networks", "training_state/optimizers", "training_state/rng", "generator/model"),
    "gan": ("training_state/networks", "training_state/optimizers", "model", "discriminator/model"),
    "vae": ("training_state/networks", "training_state/optimizers", "model"),
}


def test_no_state_can_be_lost_unnoticed(straight, method, tmp_path):
    """What the tests above compare does depend on each part of a checkpoint."""
    for name in MUTATIONS[method]:
        place = with_older_state(straight, name, tmp_path / name.replace("/", "-"))
        assert unequal(straight, resume_from(place, 6, place, method), method) != [], name


def test_another_methods_checkpoint_is_refused(straight, method, tmp_path):
    other = tiny_trainer("vae" if method == "bigan" else "bigan", tmp_path / "other")
    with pytest.raises(InputError, match="holds") as caught:
        other.train(resume_from_checkpoint=str(straight / "checkpoint-6"))
    assert "\n" not in str(caught.value)


# -- ranks and micro-batches -----------------------------------------------------------------------


WASSERSTEIN = {"gan_loss": "wasserstein", "discriminator_steps": 2}
GAN = ADA | {"r1_interval": 2, "r1_weight": 10.0}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("bigan", {}), ("bigan", WASSERSTEIN | {"max_grad_norm": 0.01}), ("gan", GAN), ("vae", {})],
    ids=["ali", "wasserstein with clipping", "gan", "vae"],
)
def test_two_processes_equal_one(kind, settings, tmp_path):
    settings = {"target": rank_run, "method": kind, **settings}
    (one,) = launch(1, tmp_path / "a", tmp_path / "one", per_device_train_batch_size=50, **settings)
    two = launch(2, tmp_path / "b", tmp_path / "two", per_device_train_batch_size=25, **settings)
    assert_same(two[0]["weights"], two[1]["weights"])
    assert_same(one["weights"], two[0]["weights"], atol=1e-11)
    for name, value in one["metrics"].items():
        if name.endswith(("_error", "_loss", "elbo", "kl")):
            assert two[1]["metrics"][name] == pytest.approx(value, rel=1e-6), name
    logs = [[entry for entry in found["logs"] if "loss" in entry] for found in (one, two[0])]
    for alone, together in zip(*logs, strict=True):
        assert alone["loss"] == pytest.approx(together["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("bigan", {}), ("bigan", WASSERSTEIN), ("gan", GAN), ("vae", {})],
    ids=["ali", "wasserstein", "gan", "vae"],
)
def test_accumulation_is_the_whole_batch(tmp_path, kind, settings):
    """8 x 4 = 32 x 1 in float64, for nothing here ties the images of a batch together."""
    common = SEPARABLE[kind] | settings | {"dtype": torch.float64, "max_steps": 8}
    whole = tiny_trainer(kind, tmp_path / "whole", **common, per_device_train_batch_size=32)
    parts = tiny_trainer(
        kind, tmp_path / "parts", **common, per_device_train_batch_size=8, gradient_accumulation_steps=4
    )
    for trainer in (whole, parts):
        trainer.train()
    assert_same(dict(whole.model.state_dict()), dict(parts.model.state_dict()), atol=1e-11)
    for one, other in zip(whole.state.log_history[:-1], parts.state.log_history[:-1], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)


# -- failures --------------------------------------------------------------------------------------


def test_nan_stops_the_run_and_is_not_saved(method, tmp_path):
    assert_stops_at_nan(tiny_trainer(method, tmp_path, save_strategy="steps", save_steps=2))
