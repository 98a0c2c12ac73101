"""`hfkd study FILE.yaml`: every arm with every seed, each run in a process of its own.

A killed study goes on where it stopped: finished runs are in the results file, and an unfinished one has checkpoints.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
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
from .train import RESULTS_FILE


# Runs `settings` in `folder`, or goes on there; the file descriptor keeps the study's lock while the run lives.
Runner = Callable[[Study, Run, Path, int], None]
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
    run_study(study, folder, results, run_in_process)
    print(write_report(study, read_csv(results, COLUMNS), folder))
    return 0


def run_study(study: Study, folder: Path, results: Path, runner: Runner) -> None:
    """Finish all runs of `study` below `folder`/runs and append their rows to `results`.

    Raises:
        InputError: a run that was started with other settings.
        RunError: runs failed (the others are finished first), or another process works in the folder.
    """
    runs_folder = folder / "runs"
    runs_folder.mkdir(parents=True, exist_ok=True)
    failures = []
    with exclusive(runs_folder) as lock:
        pending = _find_pending(study, runs_folder, results)
        started = time.monotonic()
        for number, item in enumerate(pending, start=1):
            run_folder = runs_folder / item.folder
            try:
                if not (run_folder / RESULTS_FILE).exists():
                    _write_settings(item, run_folder)
                    runner(study, item, run_folder, lock)
                rows = _rows(study, item, run_folder)
            except RunError as error:
                failures.append(str(error))
                print(f"[{number}/{len(pending)}] {item.arm}, seed {item.seed} failed: {error}", flush=True)
                continue
            append_csv(results, COLUMNS, rows, key=(*_IDENTITY, "metric"))
            seconds = (time.monotonic() - started) / number * (len(pending) - number)
            print(f"[{number}/{len(pending)}] {describe_run(item, rows, study.metrics[0], seconds)}", flush=True)
    if failures:
        raise RunError(f"{len(failures)} of {len(pending)} runs failed, the first: {failures[0]}")


def _find_pending(study: Study, runs_folder: Path, results: Path) -> list[Run]:
    done = {tuple(row[name] for name in _IDENTITY) for row in read_csv(results, COLUMNS)}
    pending = []
    for item in study.runs():
        _check_settings(item, runs_folder / item.folder)
        if (study.name, item.arm, study.dataset, str(item.seed)) not in done:
            pending.append(item)
    total = len(study.arms) * len(study.seeds)
    print(f"{study.name}: {total - len(pending)} of {total} runs are in {results}, {len(pending)} to go", flush=True)
    return pending


def _write_settings(item: Run, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / _SETTINGS_FILE, yaml.safe_dump(item.settings, sort_keys=False))


def _check_settings(item: Run, folder: Path) -> None:
    """Refuse to mix results: a run that was started keeps the settings it was started with."""
    path = folder / _SETTINGS_FILE
    if not path.exists():
        return
    before = yaml.safe_load(path.read_text(encoding="utf-8"))
    changed = [name for name in {**before, **item.settings} if before.get(name) != item.settings.get(name)]
    if changed:
        name = changed[0]
        raise InputError(
            f"arm {item.arm!r}, seed {item.seed} was started with {name}={before.get(name)!r}, and the study now says "
            f"{item.settings.get(name)!r}: rename the arm or the study, or remove {folder} and its rows."
        )


def run_in_process(study: Study, item: Run, folder: Path, lock: int) -> None:
    """Train one run as `hfkd train` in a child process, resuming where it has a checkpoint; its output is `log.txt`.

    A signal to the study is handed on to the child, which saves and stops, before the study ends.
    """
    command = [sys.executable, "-m", "hfkd.scripts.cli", "train", study.method.name]
    command += ["--config", str(folder / _SETTINGS_FILE), "--output_dir", str(folder)]
    if sort_checkpoints(output_dir=str(folder)):
        command += ["--resume_from_checkpoint", "true"]
    log_file = folder / "log.txt"
    with log_file.open("ab") as log:
        # A session of its own: Ctrl-C reaches it once, from here, and not twice.
        child = subprocess.Popen(command, stdout=log, stderr=log, pass_fds=(lock,), start_new_session=True)
        try:
            code = child.wait()
        except (KeyboardInterrupt, SystemExit) as stop:
            child.send_signal(signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM)
            child.wait()
            raise
    if code:
        last = log_file.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
        message = f"arm {item.arm!r}, seed {item.seed}: exit code {code}: {last} (see {log_file})"
        raise InputError(message) if code == 2 else RunError(message)


def _rows(study: Study, item: Run, folder: Path) -> list[Row]:
    """The rows of a finished run, one per test metric."""
    finished: dict[str, Any] = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
    environment = environment_report()
    shared = {
        "recipe": study.name,
        "arm": item.arm,
        "dataset": study.dataset,
        "n_train": str(finished["n_train"]),
        "n_test": str(finished["n_test"]),
        "seed": str(item.seed),
        # Empty for a resumed run: how long it ran before it was killed is not known.
        "wall_s": "" if finished["wall_s"] is None else f"{finished['wall_s']:.1f}",
        "hardware": hardware_line(environment),
        "versions": versions_line(environment),
    }
    return [{**shared, "metric": name, "value": repr(value)} for name, value in finished["metrics"].items()]
