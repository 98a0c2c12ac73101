"""`hfkd study FILE.yaml`: every arm with every seed, each run in a process and on a device of its own.

A killed study goes on where it stopped: finished runs are in the results file, an unfinished one has checkpoints, and
what protocols have measured of it lies in its folder.
"""

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer_utils import sort_checkpoints

from hfkd.errors import InputError, RunError
from hfkd.hub.hardware import environment_report, hardware_line, versions_line

from .parser import Parser
from .report import describe_run, write_report
from .results import COLUMNS, Row, append_csv, exclusive, read_csv, write_atomically
from .study_file import Run, Study, read_study
from .study_processes import Processes, Work, cuda_devices, in_turn
from .study_protocols import is_measured, metrics_of
from .train import RESULTS_FILE


# Does what `hfkd` does with these arguments, for a run in its folder; the descriptor keeps the study's lock meanwhile.
Runner = Callable[[list[str], Run, Path, int], None]
_IDENTITY = ("recipe", "arm", "dataset", "seed")
_SETTINGS_FILE = "settings.yaml"


def run(argv: list[str]) -> int:
    parser = Parser("study", __doc__)
    parser.add_argument("file", type=Path, help="study file (YAML)")
    parser.add_argument("--output_dir", type=Path, help="folder of runs and report (default: runs/NAME)")
    parser.add_argument("--results", type=Path, help="results file to append to (default: OUTPUT_DIR/results.csv)")
    arguments = parser.parse_args(argv)
    study = read_study(arguments.file)
    folder = arguments.output_dir or Path("runs") / study.name
    results = arguments.results or folder / "results.csv"
    processes = Processes(cuda_devices())
    run_study(study, folder, results, processes, processes.each)
    print(write_report(study, read_csv(results, COLUMNS), folder))
    return 0


def run_study(
    study: Study,
    folder: Path,
    results: Path,
    runner: Runner,
    each: Callable[[Work, Sequence[Run]], None] = in_turn,
) -> None:
    """Finish all runs of `study` below `folder`/runs and append their rows to `results`.

    `each` does the work for all runs, in turn or some at a time.

    Raises:
        InputError: a run that was started with other settings.
        RunError: runs failed (the others are finished first), or another process works in the folder.
    """
    runs_folder = folder / "runs"
    runs_folder.mkdir(parents=True, exist_ok=True)
    failures: list[str] = []
    with exclusive(runs_folder) as lock:
        pending = _find_pending(study, runs_folder, results)
        started, ended, counting = time.monotonic(), 0, threading.Lock()

        def work(item: Run) -> None:
            nonlocal ended
            run_folder = runs_folder / item.folder
            try:
                _train(item, run_folder, runner, lock)
                _measure(study, item, run_folder, runner, lock)
                rows, error = _rows(study, item, run_folder), None
                append_csv(results, COLUMNS, rows, key=(*_IDENTITY, "metric"))
            except RunError as raised:
                rows, error = [], str(raised)
            with counting:
                ended += 1
                if error is not None:
                    failures.append(error)
                    line = f"{item.arm}, seed {item.seed} failed: {error}"
                else:
                    seconds = (time.monotonic() - started) / ended * (len(pending) - ended)
                    line = describe_run(item, rows, study.metrics[0], seconds)
                print(f"[{ended}/{len(pending)}] {line}", flush=True)

        each(work, pending)
    if failures:
        raise RunError(f"{len(failures)} of {len(pending)} runs failed, the first: {failures[0]}")


def _find_pending(study: Study, runs_folder: Path, results: Path) -> list[Run]:
    measured: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for row in read_csv(results, COLUMNS):
        measured[tuple(row[name] for name in _IDENTITY)].add(row["metric"])
    runs, pending = list(study.runs()), []
    for item in runs:
        _check_unchanged(study, item, runs_folder / item.folder)
        metrics = measured[study.name, item.arm, study.dataset, str(item.seed)]
        if not metrics or not all(is_measured(protocol, metrics) for protocol in study.protocols):
            pending.append(item)
    done = len(runs) - len(pending)
    print(f"{study.name}: {done} of {len(runs)} runs are in {results}, {len(pending)} to go", flush=True)
    return pending


def _train(item: Run, folder: Path, runner: Runner, lock: int) -> None:
    """Train one run, or go on with it where it has a checkpoint; nothing where it is trained."""
    if (folder / RESULTS_FILE).exists():
        return
    settings = folder / _SETTINGS_FILE
    _write_settings(settings, item.method.stem, item.settings)
    command = ["train", item.method.name, "--config", str(settings), "--output_dir", str(folder)]
    if sort_checkpoints(output_dir=str(folder)):
        command += ["--resume_from_checkpoint", "true"]
    runner(command, item, folder, lock)


def _measure(study: Study, item: Run, folder: Path, runner: Runner, lock: int) -> None:
    """Those protocols of the study that have not measured the run yet."""
    for protocol, options in study.protocols.items():
        settings, result = folder / f"{protocol}.yaml", folder / f"{protocol}.json"
        if not result.exists():
            _write_settings(settings, protocol, options)
            command = ["evaluate", str(folder), "--protocol", protocol]
            runner([*command, "--config", str(settings), "--output", str(result)], item, folder, lock)


def _write_settings(path: Path, of: str, options: Mapping[str, Any]) -> None:
    """Write options as YAML, under a comment that tells the method or protocol that they are of."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"# {of}\n{yaml.safe_dump(dict(options), sort_keys=False)}")


def _check_unchanged(study: Study, item: Run, folder: Path) -> None:
    """Refuse to mix results: a run keeps what it was started with, and what it was measured by."""
    _check_settings(folder / _SETTINGS_FILE, item.method.stem, item.settings, item)
    for protocol, options in study.protocols.items():
        if (folder / f"{protocol}.json").exists():
            _check_settings(folder / f"{protocol}.yaml", protocol, options, item)


def _check_settings(path: Path, of: str, options: Mapping[str, Any], item: Run) -> None:
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    first, _, _ = text.partition("\n")
    before = {"method": first[2:] if first.startswith("# ") else of, **yaml.safe_load(text)}
    now = {"method": of, **options}
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        name = changed[0]
        raise InputError(
            f"arm {item.arm!r}, seed {item.seed} was started with {name}={before.get(name)!r}, and the study now says "
            f"{now.get(name)!r}: rename the arm or the study, or remove {path.parent} and its rows."
        )


def _rows(study: Study, item: Run, folder: Path) -> list[Row]:
    """The rows of a finished run: one per test metric, then those of the protocols.

    `n_train` of a protocol's are the labelled images that it has, and `wall_s` of all is the training's.
    """
    finished = _read(folder / RESULTS_FILE)
    environment = environment_report()
    shared = {
        "recipe": study.name,
        "arm": item.arm,
        "dataset": study.dataset,
        "seed": str(item.seed),
        # Empty for a resumed run: how long it ran before it was killed is not known.
        "wall_s": "" if finished["wall_s"] is None else f"{finished['wall_s']:.1f}",
        "hardware": hardware_line(environment),
        "versions": versions_line(environment),
    }
    measured = [(finished["n_train"], finished["n_test"], finished["metrics"])]
    for protocol in study.protocols:
        result = _read(folder / f"{protocol}.json")
        found = metrics_of(protocol, result["metrics"])
        measured.append((result["settings"]["training images"], result["n_test"], found))
    return [
        {**shared, "n_train": str(n_train), "n_test": str(n_test), "metric": name, "value": repr(value)}
        for n_train, n_test, metrics in measured
        for name, value in metrics.items()
    ]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
