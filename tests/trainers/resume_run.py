"""One run of twelve updates in three epochs, to be started in processes of its own."""

import hashlib
import json
import os
import signal
from pathlib import Path

import torch
from tiny_runs import digit_sources, tiny_resnet
from torch import nn

from hfkd.trainers import checkpointing
from hfkd.trainers.online_adversarial import OnlineAdversarialConfig, OnlineAdversarialTrainer


STEPS = 12


def drop_pixels(module, args, kwargs):
    """Input dropout: a student that draws from the global generator, as stock models do."""
    args, kwargs = list(args), dict(kwargs)
    pixels = kwargs.pop("pixel_values") if "pixel_values" in kwargs else args.pop(0)
    return (nn.functional.dropout(pixels, 0.1, module.training), *args), kwargs


def record_batches(trainer):
    """The hashes of each step's batches, filled while the trainer trains."""
    seen = {}
    step = trainer.method_step

    def watched(batch, share, last):
        content = batch["pixel_values"].contiguous().numpy().tobytes() + batch["index"].numpy().tobytes()
        seen.setdefault(trainer.state.global_step + 1, []).append(hashlib.sha256(content).hexdigest())
        return step(batch, share, last)

    trainer.method_step = watched
    return seen


def run_and_save(make, output_dir, resume=None, workers=0, **config):
    """Train what `make(output_dir, **config)` gives, with a checkpoint after each step; writes each batch's hash.

    The networks of a resumed run start from another seed: it must not build on what they came with.
    """
    torch.set_num_threads(1)
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None, "logging_strategy": "no"}
    loading = {"dataloader_num_workers": workers, "dataloader_multiprocessing_context": "fork" if workers else None}
    trainer = make(output_dir, seed_of_networks=1 if resume else 0, **(saving | loading | config))
    seen = record_batches(trainer)
    trainer.train(resume_from_checkpoint=resume)
    (Path(output_dir) / "batches.json").write_text(json.dumps(seen))


def run(output_dir, resume=None, workers=0, kill_in_save_of_step=None, **config):
    """Train to step 12 with a checkpoint after each step; writes the hash of each step's batch beside them."""
    torch.set_num_threads(1)
    pair = [tiny_resnet(0), tiny_resnet(1, width=6)]
    pair[0].base_model.register_forward_pre_hook(drop_pixels, with_kwargs=True)
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 50,
        "learning_rate": 0.05,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": None,
        "eval_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_strategy": "no",
        "dataloader_num_workers": workers,
        # Workers of a forkserver's child would otherwise each import everything again.
        "dataloader_multiprocessing_context": "fork" if workers else None,
        "feature_learning_rate": 1e-3,
    }
    sources = digit_sources()
    trainer = OnlineAdversarialTrainer(
        pair,
        OnlineAdversarialConfig(str(output_dir), **(settings | config)),
        train_dataset=sources.train,
        eval_dataset=sources.test,
    )
    seen = record_batches(trainer)
    if kill_in_save_of_step is not None:
        write = checkpointing.write_state

        def killing(folder, name, state):
            write(folder, name, state)
            if name == "optimizers" and trainer.state.global_step == kill_in_save_of_step:
                os.kill(os.getpid(), signal.SIGKILL)

        checkpointing.write_state = killing
    trainer.train(resume_from_checkpoint=resume)
    (Path(output_dir) / "batches.json").write_text(json.dumps(seen))
