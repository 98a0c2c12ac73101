"""Tiny runs on the digits of the methods whose students learn together, here or in processes of their own."""

from functools import partial
from pathlib import Path

import torch
from distributed_run import become_rank
from resume_run import STEPS, run_and_save
from tiny_runs import digit_sources, tiny_resnet

from hfkd.trainers.mutual_learning import MutualLearningConfig, MutualLearningTrainer
from hfkd.trainers.supervised import SupervisedConfig, SupervisedTrainer


# stem: trainer, config, and what the tests of all methods run it with.
METHODS = {
    "supervised": (SupervisedTrainer, SupervisedConfig, {}),
    "mutual_learning": (MutualLearningTrainer, MutualLearningConfig, {"temperature": 3.0}),
}
# Those whose loss is no mean over samples of equal weight, or whose students step within a mini-batch: name, settings.
IN_TURNS = ("mutual_learning", {"update": "sequential"})
SETTINGS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 50,
    "learning_rate": 0.05,
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "use_cpu": True,
}


def pair(norm="batch", dtype=torch.float32, seed=0):
    """Two students of one architecture, so that every method takes them."""
    return [tiny_resnet(seed + k, norm=norm, dtype=dtype) for k in (0, 1)]


def tiny_trainer(method, output_dir, students=None, callbacks=None, train=None, **config):
    """A trainer of the method; `norm`, `seed_of_networks` and `dtype` go to the networks."""
    norm, seed, dtype = (
        config.pop(name, default)
        for name, default in (("norm", "batch"), ("seed_of_networks", 0), ("dtype", torch.float32))
    )
    parts = {name: config.pop(name) for name in ("augmentation", "teachers") if name in config}
    trainer, kind, small = METHODS[method]
    sources = digit_sources()
    return trainer(
        students or pair(norm, dtype, seed),
        kind(str(output_dir), **(SETTINGS | small | config)),
        train_dataset=sources.train if train is None else train,
        eval_dataset=sources.test,
        callbacks=callbacks,
        **parts,
    )


def run(output_dir, method, **settings):
    """Train to step 12, see `run_and_save`."""
    run_and_save(partial(tiny_trainer, method), output_dir, **settings)


def rank_run(rank, world, port, output_dir, results, settings):
    """One rank of six updates in float64, without norms; writes its weights and logs to `results`/<rank>.pt."""
    become_rank(rank, world, port)
    config = {"max_steps": 6, **settings}
    method = config.pop("method")
    trainer = tiny_trainer(method, output_dir, dtype=torch.float64, norm="none", seed_of_networks=rank, **config)
    trainer.train()
    found = {"weights": dict(trainer.model.state_dict()), "logs": trainer.state.log_history}
    torch.save(found | {"metrics": trainer.evaluate()}, Path(results) / f"{rank}.pt")
