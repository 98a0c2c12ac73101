"""Tiny runs of full-batch training on the digits, here or in processes of their own."""

import json
from functools import cache
from pathlib import Path

import torch
from resume_run import STEPS, record_batches
from tiny_runs import NO_AUGMENTATION, digit_sources

from hfkd.data import DataArguments, build_sources, collate, load_image_datasets
from hfkd.models import build_student
from hfkd.trainers.max_margin import MaxMarginConfig, MaxMarginTrainer


SETTINGS = {"max_steps": STEPS, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True}


@cache
def few_digits(per_class=5):
    """Some digits of each class to train on, and 359 to test on."""
    arguments = DataArguments(train_per_class=per_class, validation_size=0, augmentation="none")
    return build_sources(load_image_datasets(arguments), arguments)


@cache
def plain_digits():
    """200 digits, as they are."""
    return digit_sources().train.variant(augmentation=NO_AUGMENTATION)


def classifier(name="mlp", seed=0, hidden_sizes=(12, 10), **settings):
    return build_student(
        name,
        class_names=[str(digit) for digit in range(10)],
        image_size=8,
        num_channels=1,
        seed=seed,
        settings={"hidden_sizes": list(hidden_sizes), **settings} if hidden_sizes else settings,
    )


def tiny_trainer(output_dir, model=None, train=None, callbacks=None, **config):
    return MaxMarginTrainer(
        classifier() if model is None else model,
        MaxMarginConfig(str(output_dir), **(SETTINGS | config)),
        train_dataset=plain_digits() if train is None else train,
        eval_dataset=digit_sources().test,
        callbacks=callbacks,
    )


def whole(source, dtype=torch.float64):
    """All images of a source and their labels."""
    batch = source.materialise(collate(source.__getitems__([(0, row) for row in range(len(source))])), dtype=dtype)
    return batch["pixel_values"], batch["labels"]


def run(output_dir, resume=None, workers=0, model="mlp_bn", **config):
    """Train to step 12 with a checkpoint after each step; writes the hash of each step's batch."""
    torch.set_num_threads(1)
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None, "logging_strategy": "no"}
    loading = {"dataloader_num_workers": workers, "dataloader_multiprocessing_context": "fork" if workers else None}
    # A resumed run must not build on what its network came with.
    network = classifier(model, seed=1 if resume else 0)
    trainer = tiny_trainer(output_dir, network, **(saving | loading | config))
    seen = record_batches(trainer)
    trainer.train(resume_from_checkpoint=resume)
    (Path(output_dir) / "batches.json").write_text(json.dumps(seen))
