"""Tiny runs of Squeeze-and-Span on the digits and a small generator, here or in processes of their own."""

from pathlib import Path

import torch
from distributed_run import become_rank
from resume_run import STEPS, run_and_save
from tiny_runs import digit_sources, tiny_resnet
from torch import nn

from hfkd.data import ViewAugmentation
from hfkd.models import HfkdBiganGeneratorConfig, HfkdBiganGeneratorModel
from hfkd.trainers.squeeze_and_span import SqueezeAndSpanConfig, SqueezeAndSpanTrainer


SETTINGS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 50,
    "learning_rate": 0.02,
    "representation_size": 16,
    "squeeze_hidden_size": 12,
    "projector_layers": 2,
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "use_cpu": True,
}
VIEWS = ViewAugmentation(horizontal_flip=False)


def tiny_generator(seed=0, dtype=torch.float32, norm="batch", **config):
    """Two blocks of 8 and 4 channels that make images like the digits' in size."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settings = {
            "latent_size": 5,
            "num_channels": 1,
            "hidden_sizes": [8, 4],
            "kernel_sizes": [4, 2],
            "strides": [1, 2],
        }
        made = HfkdBiganGeneratorConfig(**(settings | {"initializer_range": 0.3, "norm": norm} | config))
        return HfkdBiganGeneratorModel(made).to(dtype)


def tiny_trainer(output_dir, student=None, generator="tiny", sources=None, callbacks=None, kind=None, **config):
    """A trainer; `seed_of_networks`, `norm` and `dtype` go to the networks."""
    seed, norm, dtype = (
        config.pop(name, default)
        for name, default in (("seed_of_networks", 0), ("norm", "batch"), ("dtype", torch.float32))
    )
    sources = sources or digit_sources()
    # The generator is the same in all runs: it is no part of a checkpoint.
    made = tiny_generator(dtype=dtype) if generator == "tiny" else generator
    trainer = SqueezeAndSpanTrainer(
        student or tiny_resnet(seed, norm=norm, dtype=dtype),
        made,
        SqueezeAndSpanConfig(str(output_dir), **(SETTINGS | config)),
        train_dataset=sources.train,
        eval_dataset=sources.test,
        augmentation=VIEWS,
        callbacks=callbacks,
    )
    if norm == "none":
        without_batch_norm(trainer.model.training_only)
    return trainer


def without_batch_norm(module):
    """Batch norm replaced by nothing: what is left ties neither a batch's images together, nor ranks apart."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d):
            setattr(module, name, nn.Identity())
        else:
            without_batch_norm(child)


def run(output_dir, **settings):
    """Train to step 12, see `run_and_save`."""
    run_and_save(tiny_trainer, output_dir, **settings)


def rank_run(rank, world, port, output_dir, results, settings):
    """One rank of six updates in float64 without norms; writes its weights, logs and metrics to `results`."""
    become_rank(rank, world, port)
    # Ranks need no common seed: all have what rank 0 has.
    config = {"max_steps": 6, "norm": "none", "dtype": torch.float64, "seed_of_networks": rank, **settings}
    trainer = tiny_trainer(output_dir, **config)
    trainer.train()
    found = {"weights": dict(trainer.model.state_dict()), "logs": trainer.state.log_history}
    torch.save(found | {"metrics": trainer.evaluate()}, Path(results) / f"{rank}.pt")
