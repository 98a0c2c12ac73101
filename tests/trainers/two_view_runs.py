"""Tiny runs of VICReg, SimSiam and encoding on the digits, here or in processes of their own."""

from functools import cache, partial
from pathlib import Path

import torch
from distributed_run import become_rank
from generative_runs import symmetric_digits
from resume_run import STEPS, run_and_save
from squeeze_runs import without_batch_norm
from tiny_runs import digit_sources, tiny_resnet

from hfkd.data import ViewAugmentation
from hfkd.models import (
    HfkdDcganGeneratorConfig,
    HfkdDcganGeneratorModel,
    HfkdStyleGan2GeneratorConfig,
    HfkdStyleGan2GeneratorModel,
)
from hfkd.trainers.latent_encoding import LatentEncodingConfig, LatentEncodingTrainer
from hfkd.trainers.simsiam import SimSiamConfig, SimSiamTrainer
from hfkd.trainers.vicreg import VicregConfig, VicregTrainer


CONFIGS = {"vicreg": VicregConfig, "simsiam": SimSiamConfig, "latent_encoding": LatentEncodingConfig}
SETTINGS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 50,
    "learning_rate": 0.02,
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "use_cpu": True,
}
SMALL = {
    "vicreg": {"representation_size": 12, "projector_layers": 2},
    "simsiam": {"representation_size": 12, "predictor_hidden_size": 5},
    "latent_encoding": {"synthetic_share": 0.5},
}


@cache
def view_digits():
    """200 digits to train on in random views, and 100 to test on."""
    sources = digit_sources()
    return sources.train.variant(augmentation=ViewAugmentation(horizontal_flip=False)), sources.test


def sources_of(method):
    """The training and test images of a method; encoding's lie in [-1, 1]."""
    if method != "latent_encoding":
        return view_digits()
    sources = symmetric_digits()
    return sources.train, sources.test


def tiny_generator(kind="stylegan2", seed=0, dtype=torch.float32, **settings):
    """Makes grey images of 8x8 pixels: `stylegan2`, with a mapping network and layer noise, or `dcgan`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = {"image_size": 8, "num_channels": 1, "latent_size": 6, **settings}
        if kind == "dcgan":
            return HfkdDcganGeneratorModel(HfkdDcganGeneratorConfig(width=4, initializer_range=0.3, **sizes)).to(dtype)
        sizes = {"w_dim": 6, "channel_base": 32, "mapping_layers": 1, **sizes}
        model = HfkdStyleGan2GeneratorModel(HfkdStyleGan2GeneratorConfig(**sizes))
        for layer in model.synthesis.layers():
            layer.noise_strength.data.fill_(0.3)
        return model.to(dtype)


def tiny_trainer(method, output_dir, student=None, generator=None, callbacks=None, train=None, **config):
    """A trainer of the method; `norm`, `seed_of_networks` and `dtype` go to the networks."""
    norm, seed, dtype = (
        config.pop(name, default)
        for name, default in (("norm", "batch"), ("seed_of_networks", 0), ("dtype", torch.float32))
    )
    parts = {name: config.pop(name) for name in ("perceptual_network", "augmentation") if name in config}
    images, test = sources_of(method)
    args = CONFIGS[method](str(output_dir), **(SETTINGS | SMALL[method] | config))
    student = student or tiny_resnet(seed, norm=norm, dtype=dtype)
    parts |= {"train_dataset": images if train is None else train, "eval_dataset": test, "callbacks": callbacks}
    if args.synthetic_share and generator is None:
        generator = tiny_generator(dtype=dtype)
    if method == "latent_encoding":
        return LatentEncodingTrainer(student, generator, args, **parts)
    kind = VicregTrainer if method == "vicreg" else SimSiamTrainer
    return kind(student, args, generator, **parts)


def run(output_dir, method="vicreg", **settings):
    """Train to step 12, see `run_and_save`."""
    run_and_save(partial(tiny_trainer, method), output_dir, **settings)


def rank_run(rank, world, port, output_dir, results, settings):
    """One rank of six updates in float64, without norms; writes its weights and logs to `results`/<rank>.pt."""
    become_rank(rank, world, port)
    config = {"max_steps": 6, **settings}
    method = config.pop("method")
    trainer = tiny_trainer(method, output_dir, dtype=torch.float64, norm="none", seed_of_networks=rank, **config)
    without_batch_norm(trainer.model.training_only)
    trainer.train()
    found = {"weights": dict(trainer.model.state_dict()), "logs": trainer.state.log_history}
    torch.save(found | {"metrics": trainer.evaluate()}, Path(results) / f"{rank}.pt")
