"""One rank of a run, to be started in processes of its own; the ranks talk by gloo."""

import os
import signal
from pathlib import Path

import torch
from tiny_runs import digit_sources, tiny_resnet
from transformers import TrainerCallback

from hfkd.trainers.online_adversarial import OnlineAdversarialConfig, OnlineAdversarialTrainer


class SignalOneRank(TrainerCallback):
    """As a node's scheduler would: one process alone is told to stop, in the middle of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def become_rank(rank, world, port):
    """Say in the environment, as torchrun does, which of `world` ranks this process is."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    if world == 1:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            del os.environ[name]
    torch.set_num_threads(1)


def rank_run(rank, world, port, output_dir, results, settings):
    """Trains; rank r writes its final parameters and its last log to `results`/r.pt."""
    settings = dict(settings)
    options = {
        name: settings.pop(name, None) for name in ("norm", "dtype", "resume", "spoil", "unseeded", "signal_at")
    }
    become_rank(rank, world, port)
    dtype = getattr(torch, options["dtype"] or "float32")
    first = 10 * rank if options["unseeded"] else 0
    students = [tiny_resnet(first + s, norm=options["norm"] or "batch", dtype=dtype) for s in range(2)]
    config = {
        "max_steps": 6,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_drop_last": True,
        "feature_learning_rate": 1e-3,
    }
    if options["spoil"]:
        config["learning_rate"] += 0.01 * rank  # as a mistake in one node's configuration would
    sources = digit_sources()
    trainer = OnlineAdversarialTrainer(
        students,
        OnlineAdversarialConfig(str(output_dir), **(config | settings)),
        train_dataset=sources.train,
        eval_dataset=sources.test,
        callbacks=[SignalOneRank(options["signal_at"])] if options["signal_at"] is not None and rank == 1 else [],
    )
    trainer.model.training_only.to(dtype)
    try:
        trainer.train(resume_from_checkpoint=options["resume"])
    except RuntimeError as error:
        torch.save({"error": str(error)}, Path(results) / f"{rank}.pt")
        return
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    metrics = trainer.evaluate()
    trainer.save_model()
    again = trainer.evaluate()["eval_loss"]
    saved = {"weights": dict(trainer.model.state_dict()), "logs": logs, "metrics": metrics, "again": again}
    torch.save(saved, Path(results) / f"{rank}.pt")
