"""Training on kept activations is training on their images."""

import re
from pathlib import Path

import pytest
import torch
from distributed_run import become_rank
from gradient_feature_runs import SETTINGS, tiny_model, tiny_trainer
from processes import differences, in_a_process
from test_distributed import launch
from tiny_runs import digit_sources
from torch import nn

from hfkd.errors import InputError, RunError


def calls_below(model):
    """Counts the images that the first convolution of the base sees from now on."""
    seen = []
    first = next(module for module in model.backbone.base.modules() if isinstance(module, nn.Conv2d))
    first.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    return seen


def train(folder, cache=None, mode="full", **config):
    """A trainer that has trained for one epoch and a half in float64."""
    model = tiny_model(mode, dtype=torch.float64)
    trainer = tiny_trainer(folder, model, max_steps=6, activation_cache_dir=cache, **config)
    trainer.train()
    return trainer


@pytest.mark.parametrize("mode", ["full", "gradient", "activation", "finetune"])
def test_weights_and_metrics_are_those_without_a_cache(tmp_path, mode):
    plain = train(tmp_path / "plain", mode=mode)
    cached = train(tmp_path / "cached", str(tmp_path / "cache"), mode)

    expected = plain.model.state_dict()
    for name, value in cached.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9)
    assert cached.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-9)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["activations.npy", "key.json"]


@pytest.mark.parametrize("omega", ["given", "fitted"])
def test_neither_a_step_nor_the_fit_runs_the_layers_below(tmp_path, omega):
    model = tiny_model()
    seen = calls_below(model)
    trainer = tiny_trainer(
        tmp_path, model, omega=omega, activation_cache_dir=str(tmp_path / "cache"), per_device_eval_batch_size=200
    )
    seen.clear()
    trainer.train()
    assert seen == [200]  # what fills the cache, and then none

    again = tiny_model()
    seen = calls_below(again)
    trainer = tiny_trainer(tmp_path / "again", again, omega=omega, activation_cache_dir=str(tmp_path / "cache"))
    seen.clear()
    trainer.train()
    assert seen == []


def test_omega_can_be_fitted_before_training(tmp_path):
    plain = tiny_trainer(tmp_path, tiny_model(dtype=torch.float64))
    cached = tiny_trainer(tmp_path, tiny_model(dtype=torch.float64), activation_cache_dir=str(tmp_path / "cache"))
    for trainer in (plain, cached):
        trainer.fit_omega()
    torch.testing.assert_close(cached.model.students[0].omega, plain.model.students[0].omega, rtol=1e-9, atol=1e-9)


def test_precision_and_layout_of_the_run_are_kept(tmp_path):
    settings = {"bf16": True, "channels_last": True}
    model = tiny_model()
    trainer = tiny_trainer(tmp_path / "run", model, activation_cache_dir=str(tmp_path / "cache"), **settings)
    trainer.train()
    batch = trainer._materialise(trainer.train_dataset, next(iter(trainer.get_train_dataloader())))
    assert batch["pixel_values"].dtype == torch.bfloat16
    assert batch["pixel_values"].is_contiguous(memory_format=torch.channels_last)

    other = tiny_trainer(tmp_path / "other", tiny_model(), activation_cache_dir=str(tmp_path / "cache"))
    with pytest.raises(InputError, match="made with other precision"):
        other.train()


def test_a_cache_of_another_base_is_refused(tmp_path):
    train(tmp_path / "first", str(tmp_path / "cache"))
    other = tiny_model(dtype=torch.float64, seed=1)
    trainer = tiny_trainer(tmp_path / "second", other, activation_cache_dir=str(tmp_path / "cache"))
    with pytest.raises(InputError, match="made with other weights below theta2: delete the folder or name another"):
        trainer.train()


def test_augmented_images_are_refused(tmp_path):
    with pytest.raises(InputError, match="augmentation=none"):
        tiny_trainer(tmp_path, augmentation=digit_sources().train.augmentation, activation_cache_dir="cache")


def run(output_dir, cache, resume=None, **config):
    """To be run in a process of its own; a resumed run has a model of another base until it loads the checkpoint."""
    torch.set_num_threads(1)
    saving = {"save_strategy": "steps", "save_total_limit": None}
    trainer = tiny_trainer(
        output_dir, tiny_model(seed=1 if resume else 0), activation_cache_dir=cache, **saving, **config
    )
    trainer.train(resume_from_checkpoint=resume)


def test_resume_is_exact(tmp_path):
    cache, last = str(tmp_path / "cache"), f"checkpoint-{SETTINGS['max_steps']}"
    whole = in_a_process(tmp_path / "whole", target=run, cache=cache, save_steps=3)
    resumed = in_a_process(
        tmp_path / "resumed", target=run, cache=cache, resume=str(whole / "checkpoint-3"), save_steps=12
    )
    assert differences(whole / last, resumed / last, students=1) == []


def rank_run(rank, world, port, output_dir, results, settings):
    """One rank, which writes its weights, or the error that it ends with, to `results`/<rank>.pt."""
    become_rank(rank, world, port)
    where = f"{output_dir}-{rank}" if settings.pop("apart", False) else output_dir
    trainer = tiny_trainer(output_dir, tiny_model(seed=rank), max_steps=2, activation_cache_dir=f"{where}-cache")
    if rank == 0 and settings.pop("fails", False):
        trainer.train_dataset.source.materialise = None
    try:
        trainer.train()
    except (InputError, RunError) as error:
        torch.save({"error": f"{type(error).__name__}: {error}"}, Path(results) / f"{rank}.pt")
    else:
        torch.save({"weights": trainer.model.state_dict()}, Path(results) / f"{rank}.pt")


def test_two_ranks_share_a_cache(tmp_path):
    one, two = launch(2, tmp_path / "run", tmp_path / "results", target=rank_run)
    for name, value in one["weights"].items():
        assert torch.equal(value, two["weights"][name])
    assert sorted(path.name for path in (tmp_path / "run-cache").iterdir()) == ["activations.npy", "key.json"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"apart": True}, "InputError: activation_cache_dir=.*run-1-cache is damaged"),  # no common file system
        ({"fails": True}, "RunError: filling activation_cache_dir: TypeError: 'NoneType'"),
    ],
)
def test_what_fails_on_one_rank_stops_both(tmp_path, settings, message):
    found = launch(2, tmp_path / "run", tmp_path / "results", target=rank_run, **settings)
    assert found[0] == found[1]
    assert re.match(message, found[0]["error"])
