"""Tiny runs of gradient features on the digits, here or in processes of their own."""

import hashlib
import json
from functools import cache
from pathlib import Path

import datasets
import torch
from distributed_run import become_rank
from tiny_runs import NO_AUGMENTATION, digit_sources, tiny_resnet

from hfkd.data import DataArguments, find_columns, load_image_datasets, make_source
from hfkd.models import build_gradient_features
from hfkd.trainers.gradient_features import GradientFeaturesConfig, GradientFeaturesTrainer


STEPS = 12
DIGITS = [str(digit) for digit in range(10)]
SETTINGS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 50,
    "omega_weight_decay": 1e-2,  # 200 images are separable: at the paper's 1e-6 omega would be huge
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "use_cpu": True,
}


def tiny_model(mode="full", dtype=torch.float32, class_names=DIGITS, theta2=1, seed=0, norm="batch", **settings):
    """Of a base with fresh weights, whose batch norm is folded."""
    base = tiny_resnet(seed, width=6, norm=norm, dtype=dtype)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # of the classifier that it starts with
        return build_gradient_features(base, theta2, class_names=class_names, mode=mode, **settings)


def tiny_trainer(output_dir, model=None, sources=None, augmentation=NO_AUGMENTATION, callbacks=None, **config):
    sources = sources or digit_sources()
    train = sources.train if augmentation is None else sources.train.variant(augmentation=augmentation)
    if config.get("omega") == "given":
        config = {"omega_weight_decay": GradientFeaturesConfig.omega_weight_decay} | config
    return GradientFeaturesTrainer(
        model or tiny_model(),
        GradientFeaturesConfig(str(output_dir), **(SETTINGS | config)),
        train_dataset=train,
        eval_dataset=sources.test,
        callbacks=callbacks,
    )


SEVERAL = ["even", "prime", "round", "none has it"]


@cache
def several_label_digits():
    """80 digits, each with the labels that hold of it: `even`, `prime`, `round`."""
    arguments = DataArguments(train_split="train[:100]", validation_size=0)
    digits = load_image_datasets(arguments).train
    labels = [[digit % 2 == 0, digit in (2, 3, 5, 7), digit in (0, 6, 8, 9)] for digit in digits["label"]]
    features = datasets.Features(
        {"image": datasets.Image(), "labels": datasets.Sequence(datasets.ClassLabel(names=SEVERAL))}
    )
    rows = {"image": digits["image"], "labels": [[i for i, holds in enumerate(row) if holds] for row in labels]}
    return datasets.Dataset.from_dict(rows, features=features)


def several_label_source(**settings):
    dataset = several_label_digits()
    return make_source(dataset, find_columns(dataset.features), digit_sources().preprocessing, **settings)


# -- in processes of their own ---------------------------------------------------------------------


def run(output_dir, resume=None, workers=0, mode="full", whiten=False, **config):
    """Train to step 12, augmented, with a checkpoint after each step; writes the hash of each step's batch."""
    torch.set_num_threads(1)
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None, "logging_strategy": "no"}
    loading = {"dataloader_num_workers": workers, "dataloader_multiprocessing_context": "fork" if workers else None}
    # A resumed run must not build on what its model came with.
    model = tiny_model(mode, seed=1 if resume else 0, whiten=whiten)
    trainer = tiny_trainer(output_dir, model, augmentation=None, **(saving | loading | config))
    seen = {}
    step = trainer.method_step

    def watched(batch, share, last):
        content = batch["pixel_values"].numpy().tobytes() + batch["index"].numpy().tobytes()
        seen.setdefault(trainer.state.global_step + 1, []).append(hashlib.sha256(content).hexdigest())
        return step(batch, share, last)

    trainer.method_step = watched
    trainer.train(resume_from_checkpoint=resume)
    (Path(output_dir) / "batches.json").write_text(json.dumps(seen))


def rank_run(rank, world, port, output_dir, results, settings):
    """One rank of six updates in float64; writes its weights, logs and metrics to `results`/<rank>.pt."""
    become_rank(rank, world, port)
    config = {"max_steps": 6, "dataloader_drop_last": True, **settings}
    # Ranks need no common seed: all have what rank 0 has.
    trainer = tiny_trainer(output_dir, tiny_model(dtype=torch.float64, seed=rank), augmentation=None, **config)
    trainer.train()
    found = {"weights": dict(trainer.model.state_dict()), "logs": trainer.state.log_history}
    torch.save(found | {"metrics": trainer.evaluate()}, Path(results) / f"{rank}.pt")
