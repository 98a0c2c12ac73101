"""`hfkd chain FILE.yaml`: steps that build on each other, such as teacher, student and probe, each `hfkd train` or
`hfkd evaluate`.

A step leaves its folder NAME, its options NAME.yaml and, of an evaluation, the result NAME.json. A chain that was
stopped goes on when it is run again: finished steps are skipped, and an interrupted training has checkpoints.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers.trainer_utils import sort_checkpoints

from hfkd.errors import InputError, RunError
from hfkd.trainers.checkpointing import check_output_dir

from . import evaluate, train
from .chain_file import CHAINS, Step, find_chain, read_chain
from .parser import Parser
from .present import accuracy_rows
from .results import exclusive, write_atomically
from .train import RESULTS_FILE


def run(argv: list[str]) -> int:
    shipped = ", ".join(chain.stem for chain in sorted(CHAINS.glob("*.yaml")))
    parser = Parser("chain", __doc__)
    parser.add_argument("file", help=f"chain file (YAML), or a shipped one: {shipped}")
    parser.add_argument("--output_dir", type=Path, help="folder of all steps (default: runs/NAME)")
    arguments = parser.parse_args(argv)
    path = find_chain(arguments.file)
    folder = arguments.output_dir or Path("runs") / path.stem
    check_output_dir(folder)
    steps = read_chain(path)
    run_chain(steps, folder)
    print(describe(steps, folder))
    return 0


def run_chain(steps: list[Step], folder: Path) -> None:
    """Finish all steps, in their order, in `folder`.

    Raises:
        InputError: a step that was started with other options, that builds on one that is no longer there, or whose
            options do not fit what it builds on.
        RunError: a step failed or was interrupted, or another process works in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder):
        pending = _find_pending(steps, folder)
        for number, step in enumerate(steps, start=1):
            title = f"[{number}/{len(steps)}] {step.name}"
            if step not in pending:
                print(f"{title}: finished before", flush=True)
                continue
            step = step.located(folder)
            print(f"{title}: hfkd {step.command} {step.target}", flush=True)
            try:
                _run_step(step, folder)
            except InputError as error:
                raise InputError(f"step {step.name!r}: {error}") from error
            except RunError as error:  # its kind says with which code the command ends
                error.args = (f"step {step.name!r}: {error} (the same hfkd chain goes on from here)",)
                raise


def _find_pending(steps: list[Step], folder: Path) -> list[Step]:
    pending: dict[str, Step] = {}
    for step in steps:
        _check_options(step, folder)
        if not _result_file(step, folder).is_file():
            pending[step.name] = step
        elif gone := [name for name in step.references() if name in pending]:
            raise InputError(
                f"step {step.name!r} is finished and was made from {gone[0]!r}, which is not: remove "
                f"{_result_file(step, folder)} and {folder / step.name} to make it anew"
            )
    return list(pending.values())


def _check_options(step: Step, folder: Path) -> None:
    """Refuse to mix what was made with different options."""
    path = _options_file(step, folder)
    if not path.is_file():
        return
    before, now = (text.splitlines() for text in (path.read_text(encoding="utf-8"), step.located(folder).describe()))
    if before != now:
        changed = [line for line in now if line not in before] or [line for line in before if line not in now]
        raise InputError(
            f"step {step.name!r} was started with other options than the chain now has ({changed[0].strip()!r} "
            f"differs, see {path}): choose another --output_dir, or remove {path} and {folder / step.name}"
        )


def _options_file(step: Step, folder: Path) -> Path:
    return folder / f"{step.name}.yaml"


def _result_file(step: Step, folder: Path) -> Path:
    """What is there when the step is finished, and not before."""
    return folder / step.name / RESULTS_FILE if step.command == "train" else folder / f"{step.name}.json"


def _run_step(step: Step, folder: Path) -> None:
    """One located step. A training goes on where it has checkpoints; an evaluation that was cut off starts anew."""
    options, place = _options_file(step, folder), folder / step.name
    words = [step.target, "--config", str(options)]
    if step.command == "train":
        words += ["--output_dir", str(place)]
        if sort_checkpoints(output_dir=str(place)):
            words += ["--resume_from_checkpoint", "true"]
    else:
        words += ["--output", str(_result_file(step, folder))]
        if options.is_file() and place.is_dir():
            shutil.rmtree(place)
    write_atomically(options, step.describe())
    commands = {"train": train.run, "evaluate": evaluate.run}
    try:
        commands[step.command](words)
    except InputError:
        if not place.exists():  # nothing was made with these options
            options.unlink()
        raise


def describe(steps: list[Step], folder: Path) -> str:
    """One line for each step of a finished chain: the accuracies that it has measured."""
    width = max(len(step.name) for step in steps) + 2
    lines = [f"{folder}: accuracies, ± standard error"]
    for step in steps:
        result = json.loads(_result_file(step, folder).read_text(encoding="utf-8"))
        rows = accuracy_rows(_own_metrics(result), result["n_test"])
        found = "; ".join(f"{name} {share}" for name, share in rows.items())
        what = f"{result['protocol']} of {step.located(Path()).target}: " if "protocol" in result else ""
        lines.append(f"  {step.name:<{width}}{what}{found or '-'}")
    return "\n".join(lines)


def _own_metrics(result: dict[str, Any]) -> dict[str, float]:
    """Without those of real images and noise, which protocol generation measures beside a generator's."""
    metrics: dict[str, Any] = result["metrics"]
    return metrics.get("generator", metrics)
