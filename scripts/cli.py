"""The `hfkd` command: finds the subcommand, and turns every failure into one line and an exit code.

Exit codes: 0 done; 2 bad input, found before the first step; 1 failure while running; 130 stopped by SIGINT and 143 by
SIGTERM. `HFKD_DEBUG=1` shows the traceback behind the line.
"""

import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from hfkd.errors import InputError, RunError

from .suggest import nearest


# Each is a module of this package with `run(argv) -> int`, imported when called so that `hfkd --help` stays fast.
COMMANDS = {
    "train": "train a method: hfkd train METHOD [--config FILE.yaml] [--option value ...]",
    "evaluate": "measure a saved checkpoint: hfkd evaluate CHECKPOINT --dataset_name NAME --protocol accuracy",
    "sample": "images of a saved generator as one picture: hfkd sample GENERATOR --num_images 64 --output grid.png",
    "exponents": "how a classifier's tensors scale, for generating from it: hfkd exponents CHECKPOINT",
    "convert": "other formats' networks: hfkd convert stylegan2-ada FILE.pkl FOLDER",
    "push": "share a saved folder on the Hub: hfkd push FOLDER REPO_ID",
    "study": "arms x seeds from one file, resumable: hfkd study FILE.yaml",
    "chain": "steps that build on each other, from one file, resumable: hfkd chain FILE.yaml",
    "search": "random search by a data-free criterion, resumable: hfkd search METHOD --trials 20 [--config FILE.yaml]",
    "benchmark": "measure a method's speed: hfkd benchmark METHOD",
    "demo": "a method's whole chain on the embedded digits, offline: hfkd demo [METHOD]",
    "env": "versions and hardware, for bug reports",
}
MODULES = {"env": "environment"}
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


def usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: hfkd COMMAND ...    (hfkd COMMAND --help says more)",
            "",
            "Distil and share small vision models on Hugging Face.",
            "",
            *lines,
            "",
            "HFKD_DEBUG=1 shows the traceback behind an error.",
        ]
    )


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Turn SIGTERM into `SystemExit(143)`, so that temporary files and child processes are cleaned up.

    Trainers install their own handler while they train, which finishes the step and saves first.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum: int, frame: FrameType | None) -> None:
        sys.exit(TERMINATED)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _dispatch(command: str, argv: Sequence[str]) -> int:
    if command not in COMMANDS:
        raise InputError(f"unknown command {command!r}{nearest(command, COMMANDS)}; hfkd --help lists the commands.")
    module = importlib.import_module(f"{__package__}.{MODULES.get(command, command)}")
    return int(module.run(list(argv)))


def _report(error: BaseException, code: int) -> int:
    """Print the one line (and the traceback if asked for), and give back the exit code."""
    if os.environ.get("HFKD_DEBUG") == "1":
        traceback.print_exception(error, file=sys.stderr)
    known = isinstance(error, InputError | RunError)
    name = "" if known else f"{type(error).__name__}: "
    hint = "" if known else " (HFKD_DEBUG=1 shows the traceback)"
    print(f"hfkd: error: {name}{' '.join(str(error).split())}{hint}", file=sys.stderr)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    try:
        with _sigterm_as_exit():
            return _dispatch(arguments[0], arguments[1:])
    except InputError as error:
        return _report(error, 2)
    except RunError as error:  # a trainer that a signal stopped, after saving, brings its own exit code
        return _report(error, getattr(error, "exit_code", 1))
    except KeyboardInterrupt:
        print("hfkd: stopped by the keyboard", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as stop:  # a subcommand's --help, a signal, or a trainer that saved and left
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        return _report(error, 1)


if __name__ == "__main__":
    sys.exit(main())
