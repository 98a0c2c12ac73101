"""Tiny runs of KDCL, ONE, PCL and FFL on the digits, here or in processes of their own."""

from functools import partial
from pathlib import Path

import torch
from distributed_run import become_rank
from resume_run import STEPS, run_and_save
from tiny_runs import digit_sources, tiny_resnet

from hfkd.trainers.ffl import FflConfig, FflTrainer
from hfkd.trainers.kdcl import KdclConfig, KdclTrainer
from hfkd.trainers.one import OneConfig, OneTrainer
from hfkd.trainers.pcl import PclConfig, PclTrainer


KINDS = {
    "kdcl": (KdclTrainer, KdclConfig),
    "one": (OneTrainer, OneConfig),
    "pcl": (PclTrainer, PclConfig),
    "ffl": (FflTrainer, FflConfig),
}
METHODS = tuple(KINDS)
SETTINGS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 50,
    "learning_rate": 0.05,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}
# A weight of the KL terms that counts from the first update on.
PROMPT = {
    "kdcl": {},
    "one": {"kl_rampup_epochs": 2.0},
    "pcl": {"kl_rampup_epochs": 2.0},
    "ffl": {"kl_rampup_epochs": 2.0},
}


def tiny_trainer(method, output_dir, students=None, callbacks=None, **config):
    """A trainer of the method; `count`, `norm`, `seed_of_networks` and `dtype` go to the students.

    `eval_dataset` and `augmentation` go to the trainer.
    """
    count, norm, seed, dtype = (
        config.pop(name, default)
        for name, default in (("count", 2), ("norm", "batch"), ("seed_of_networks", 0), ("dtype", torch.float32))
    )
    students = students or [tiny_resnet(10 * seed + k, norm=norm, dtype=dtype) for k in range(count)]
    sources = digit_sources()
    parts = {"eval_dataset": sources.test} | {
        n: config.pop(n) for n in ("eval_dataset", "augmentation") if n in config
    }
    trainer, settings = KINDS[method]
    args = settings(str(output_dir), **(SETTINGS | PROMPT[method] | config))
    return trainer(students, args, train_dataset=sources.train, callbacks=callbacks, dataset_name="digits", **parts)


def recorded(trainer):
    """The batches that a trainer trains on, filled while it does."""
    seen, step = [], trainer.method_step

    def watched(batch, share, last):
        seen.append(batch)
        return step(batch, share, last)

    trainer.method_step = watched
    return seen


def run(output_dir, method="kdcl", **settings):
    """Train to step 12, see `run_and_save`."""
    run_and_save(partial(tiny_trainer, method), output_dir, **settings)


def rank_run(rank, world, port, output_dir, results, settings):
    """One rank of six updates in float64, whose students have no statistics of a batch; writes `results`/<rank>.pt."""
    become_rank(rank, world, port)
    config = {"max_steps": 6, "dataloader_drop_last": True, **settings}
    method = config.pop("method")
    trainer = tiny_trainer(method, output_dir, dtype=torch.float64, norm="group", seed_of_networks=rank, **config)
    trainer.train()
    found = {"weights": dict(trainer.model.state_dict()), "logs": trainer.state.log_history}
    torch.save(found | {"metrics": trainer.evaluate()}, Path(results) / f"{rank}.pt")
