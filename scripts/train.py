"""`hfkd train METHOD`: from options to data, networks and trainer; then train, measure on test images, save, share."""

import json
import sys
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hfkd.errors import InputError
from hfkd.trainers.checkpointing import holds_students

from .job import Job
from .methods import METHODS, Method, find_method
from .options import RUN_FILE, build, read_options, read_yaml, resolved, write_run_file
from .present import describe_all, describe_metrics
from .results import write_atomically


RESULTS_FILE = "test_results.json"


def run(argv: list[str]) -> int:
    if not argv or argv[0].startswith("-"):
        print(_usage())
        if argv and argv[0] in ("-h", "--help"):
            return 0
        raise InputError(f"hfkd train needs a method first: {', '.join(m.name for m in METHODS.values())}.")
    method = find_method(argv[0])
    values = read_options(method.dataclasses(), argv[1:], f"hfkd train {method.name}", method.recipes)
    results = train(method, values)
    metrics, count = results["metrics"], results["n_test"]
    if metrics:
        print(describe_metrics(metrics, count) if method.data else describe_all(metrics, f"{count:,} fixed draws"))
    return 0


def _usage() -> str:
    width = max(len(method.name) for method in METHODS.values()) + 2
    methods = "\n".join(f"  {method.name:<{width}}{method.summary}" for method in METHODS.values())
    return f"usage: hfkd train METHOD [--config FILE.yaml] [--option value ...]\n\nmethods:\n{methods}"


def train(method: Method, values: dict[str, Any], show_logs: bool = True) -> dict[str, Any]:
    """One run from its options. Without `show_logs` there is a progress bar, and no line for each log.

    Returns what `test_results.json` in `output_dir` holds when all is saved: `metrics` (on the test images; empty
    where the data has none), `n_train`, `n_test`, and `wall_s`, the seconds of training, or None for a resumed run.
    """
    logging.disable_progress_bar()  # one for each weights file; that of the training stays
    kinds = method.dataclasses()
    setup, *data_arguments, config = build(kinds, values)
    job: Job = method.load("build")(config, *data_arguments, setup)
    trainer = job.trainer
    options = resolved(kinds, values)
    if not show_logs:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_BarWithoutLogs())
    resume = _resume_from(config.resume_from_checkpoint)
    trainer.may_replace_students = resume is None and repeats(Path(config.output_dir), options)
    trainer.add_callback(_WriteRunFile(method.name, options, replaces=trainer.may_replace_students))
    outcome = trainer.train(resume_from_checkpoint=resume)
    metrics = {}
    if job.test is not None:
        metrics = trainer.evaluate(job.test, metric_key_prefix="test")
    trainer.save_model(_internal_call=True)  # the push comes last, when nothing is left to lose
    results = {
        "metrics": _strip(metrics),
        "n_train": len(job.train) if job.train is not None else 0,
        "n_test": len(job.test) if job.test is not None else 0,
        "wall_s": None if resume else outcome.metrics["train_runtime"],
    }
    if trainer.is_world_process_zero():
        write_atomically(Path(config.output_dir) / RESULTS_FILE, json.dumps(results, indent=2) + "\n")
    if config.push_to_hub:
        trainer.push_to_hub()
    return results


def repeats(folder: Path, options: dict[str, Any]) -> bool:
    """Whether the students in `folder` are of a run with these very options, which would give them once more.

    So it is after a kill between the last save and the results, and when a demo is run again.
    """
    return holds_students(folder) and (folder / RUN_FILE).is_file() and read_yaml(folder / RUN_FILE) == options


class _WriteRunFile(TrainerCallback):
    """Writes `run.yaml` when training begins: not before, as a run that is refused must not touch the folder.

    Then, too, it says what the run `replaces`.
    """

    def __init__(self, method: str, options: dict[str, Any], replaces: bool) -> None:
        self.method, self.options, self.replaces = method, options, replaces

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            if self.replaces:
                print(f"hfkd: note: this run replaces its own earlier result in {args.output_dir}", file=sys.stderr)
            write_run_file(Path(args.output_dir), self.method, self.options)


class _BarWithoutLogs(ProgressCallback):
    def on_log(self, *_: Any, **__: Any) -> None: ...


def _resume_from(value: str | None) -> str | bool | None:
    """`--resume_from_checkpoint`: true (the newest valid checkpoint), false, or a checkpoint's path."""
    return {"true": True, "false": None}.get(value.lower(), value) if value is not None else None


def _strip(metrics: dict[str, float]) -> dict[str, float]:
    """Without the `test_` prefix and without what says how fast the evaluation was."""
    speed = ("runtime", "samples_per_second", "steps_per_second")
    names = {name: name.removeprefix("test_") for name in metrics if name.startswith("test_")}
    return {short: metrics[name] for name, short in names.items() if short not in speed}
