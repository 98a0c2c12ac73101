"""Tiny runs of BiGAN, the GAN and the VAE on the digits, here or in processes of their own."""

from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import torch
from distributed_run import become_rank
from resume_run import STEPS, run_and_save
from tiny_runs import digit_sources

from hfkd.models import (
    HfkdBiganEncoderConfig,
    HfkdBiganEncoderModel,
    HfkdBiganGeneratorConfig,
    HfkdBiganGeneratorModel,
    HfkdDcganDiscriminatorConfig,
    HfkdDcganDiscriminatorModel,
    HfkdDcganGeneratorConfig,
    HfkdDcganGeneratorModel,
    HfkdVaeEncoderConfig,
    HfkdVaeEncoderModel,
)
from hfkd.trainers.bigan import BiGanConfig, BiGanTrainer
from hfkd.trainers.gan import GanConfig, GanTrainer
from hfkd.trainers.vae import VaeConfig, VaeTrainer


SETTINGS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 50,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "use_cpu": True,
}
# Without what draws or ties a batch's images together, a batch is the sum of its parts.
SEPARABLE = {
    "bigan": {"norm": "group", "discriminator_dropout": 0.0, "discriminator_input_dropout": 0.0},
    "gan": {"norm": "none"},
    "vae": {"norm": "none"},
}
KINDS = {"bigan": (BiGanTrainer, BiGanConfig), "gan": (GanTrainer, GanConfig), "vae": (VaeTrainer, VaeConfig)}


@cache
def symmetric_digits(num_channels=1):
    """200 digits to train on, augmented by crops, and 100 to test on, in [-1, 1]."""
    sources = digit_sources(num_channels)
    half = (0.5,) * num_channels
    made = replace(sources.train.preprocessing, mean=half, std=half)
    return SimpleNamespace(
        train=sources.train.variant(preprocessing=made), test=sources.test.variant(preprocessing=made)
    )


def tiny_networks(method, norm=None, seed=0, dtype=torch.float32):
    """Encoder, and for BiGAN generator; of a GAN generator and discriminator."""
    norm = {} if norm is None else {"norm": norm}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if method == "gan":
            made = {"image_size": 8, "num_channels": 1, "width": 4, "initializer_range": 0.2, **norm}
            generator = HfkdDcganGeneratorModel(HfkdDcganGeneratorConfig(latent_size=4, **made))
            return [generator.to(dtype), HfkdDcganDiscriminatorModel(HfkdDcganDiscriminatorConfig(**made)).to(dtype)]
        if method == "vae":
            config = HfkdVaeEncoderConfig(depth=4, scales=1, num_channels=1, image_size=8, **norm)
            return [HfkdVaeEncoderModel(config).to(dtype)]
        layers = {"hidden_sizes": [4, 8, 16], "kernel_sizes": [3, 4, 2], "strides": [1, 2, 1]}
        # Larger than ALI's 0.01, with which a dozen steps move little.
        config = HfkdBiganEncoderConfig(num_channels=1, image_size=8, initializer_range=0.2, **layers, **norm)
        generator = HfkdBiganGeneratorModel(HfkdBiganGeneratorConfig.mirror(config, latent_size=4))
        return [HfkdBiganEncoderModel(config).to(dtype), generator.to(dtype)]


def tiny_trainer(method, output_dir, networks=None, sources=None, callbacks=None, parts=None, **config):
    """A trainer of `bigan`, `gan` or `vae`; `norm`, `seed_of_networks` and `dtype` go to the networks.

    `parts` are further arguments of the trainer itself.
    """
    norm, seed, dtype = (
        config.pop(name, default)
        for name, default in (("norm", None), ("seed_of_networks", 0), ("dtype", torch.float32))
    )
    networks = networks or tiny_networks(method, norm, seed, dtype)
    sources = sources or symmetric_digits()
    if method == "vae":
        config = {"latent_channels": 2} | config
    kind, settings = KINDS[method]
    return kind(
        *networks,
        args=settings(str(output_dir), **(SETTINGS | config)),
        train_dataset=sources.train,
        eval_dataset=sources.test,
        callbacks=callbacks,
        **(parts or {}),
    )


def run(output_dir, method="bigan", **settings):
    """Train to step 12, see `run_and_save`."""
    run_and_save(partial(tiny_trainer, method), output_dir, **settings)


def rank_run(rank, world, port, output_dir, results, settings):
    """One rank of six updates in float64; writes its weights, logs and metrics to `results`/<rank>.pt."""
    become_rank(rank, world, port)
    method = settings["method"]
    config = {"max_steps": 6, "dataloader_drop_last": True, **SEPARABLE[method], **settings}
    del config["method"]
    # Ranks need no common seed: all have what rank 0 has.
    trainer = tiny_trainer(method, output_dir, dtype=torch.float64, seed_of_networks=rank, **config)
    trainer.train()
    found = {"weights": dict(trainer.model.state_dict()), "logs": trainer.state.log_history}
    torch.save(found | {"metrics": trainer.evaluate()}, Path(results) / f"{rank}.pt")
