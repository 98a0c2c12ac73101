"""Tiny offline distillations on the digits, here or in processes of their own."""

from functools import cache, partial
from pathlib import Path

import torch
from distributed_run import become_rank
from resume_run import STEPS, run_and_save
from squeeze_runs import without_batch_norm
from tiny_runs import NO_AUGMENTATION, digit_sources, tiny_resnet
from torch import nn

from hfkd.trainers.distillation import OfflineDistillationConfig, OfflineDistillationTrainer


SETTINGS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 50,
    "learning_rate": 0.05,
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "use_cpu": True,
}
SMALL = {"crd": {"crd_negatives": 20, "crd_embedding_size": 16}}


@cache
def _taught(dtype, norm):
    """A wider network that has learnt the digits a little."""
    images = digit_sources().train.variant(augmentation=NO_AUGMENTATION)
    teacher = tiny_resnet(5, width=6, dtype=dtype, norm=norm).train()
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.05, momentum=0.9)
    for step in range(80):
        rows = torch.arange(50) + 50 * (step % 4)
        batch = images.materialise({"key": torch.stack([torch.zeros_like(rows), rows], dim=1)}, dtype=dtype)
        optimizer.zero_grad()
        nn.functional.cross_entropy(teacher(batch["pixel_values"]).logits, batch["labels"]).backward()
        optimizer.step()
    return teacher.eval()


def taught(dtype=torch.float32, norm="batch"):
    """A copy of the teacher."""
    copied = tiny_resnet(5, width=6, dtype=dtype, norm=norm)
    copied.load_state_dict(_taught(dtype, norm).state_dict())
    return copied


def tiny_trainer(
    output_dir, loss=("kd",), student=None, teachers=None, sources=None, callbacks=None, augmentation=None, **config
):
    """A trainer of these losses; `seed_of_networks`, `norm` and `dtype` go to the networks."""
    seed, norm, dtype = (
        config.pop(name, default)
        for name, default in (("seed_of_networks", 0), ("norm", "batch"), ("dtype", torch.float32))
    )
    parts = {name: config.pop(name) for name in ("teacher_processing_classes", "dataset_name") if name in config}
    sources = sources or digit_sources()
    small = {key: value for name in loss for key, value in SMALL.get(name, {}).items()}
    trainer = OfflineDistillationTrainer(
        student or tiny_resnet(seed, norm=norm, dtype=dtype),
        [taught(dtype, norm)] if teachers is None else teachers,
        OfflineDistillationConfig(str(output_dir), loss=list(loss), **(SETTINGS | small | config)),
        train_dataset=sources.train,
        eval_dataset=sources.test,
        augmentation=sources.train.augmentation if augmentation is None else augmentation,
        callbacks=callbacks,
        **parts,
    )
    if norm == "none":
        without_batch_norm(trainer.model.training_only)
    return trainer


def run(output_dir, loss=("kd",), **settings):
    """Train to step 12, see `run_and_save`."""
    run_and_save(partial(tiny_trainer, loss=loss), output_dir, **settings)


def rank_run(rank, world, port, output_dir, results, settings):
    """One rank of six updates in float64, without norms; writes its weights and logs to `results`/<rank>.pt."""
    become_rank(rank, world, port)
    trainer = tiny_trainer(
        output_dir, dtype=torch.float64, norm="none", seed_of_networks=rank, **({"max_steps": 6} | settings)
    )
    trainer.train()
    found = {"weights": dict(trainer.model.state_dict()), "logs": trainer.state.log_history}
    torch.save(found | {"metrics": trainer.evaluate()}, Path(results) / f"{rank}.pt")
