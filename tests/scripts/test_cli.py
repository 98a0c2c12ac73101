import os
import signal
import subprocess
import sys
import types

import pytest

from hfkd.errors import InputError, RunError
from hfkd.scripts.cli import COMMANDS, main


def serve(monkeypatch, run):
    """Make `hfkd env` run the given function."""
    module = types.ModuleType("hfkd.scripts.environment")
    module.run = run
    monkeypatch.setitem(sys.modules, "hfkd.scripts.environment", module)


def fail_with(error):
    def run(argv):
        raise error

    return run


class Stopped(RunError):
    exit_code = 143


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("seed 1.5: not whole"), 2, "hfkd: error: seed 1.5: not whole\n"),
        (InputError("two\n  lines"), 2, "hfkd: error: two lines\n"),
        (RunError("disk full"), 1, "hfkd: error: disk full\n"),
        (Stopped("stopped by SIGTERM"), 143, "hfkd: error: stopped by SIGTERM\n"),
        (KeyError("x"), 1, "hfkd: error: KeyError: 'x' (HFKD_DEBUG=1 shows the traceback)\n"),
        (KeyboardInterrupt(), 130, "hfkd: stopped by the keyboard\n"),
        (SystemExit(143), 143, ""),
        (SystemExit(None), 0, ""),
    ],
)
def test_each_failure_has_its_code_and_one_line(monkeypatch, capsys, error, code, line):
    monkeypatch.delenv("HFKD_DEBUG", raising=False)
    serve(monkeypatch, fail_with(error))
    assert main(["env"]) == code
    assert capsys.readouterr().err == line


def test_debug_shows_the_traceback(monkeypatch, capsys):
    serve(monkeypatch, fail_with(InputError("bad")))
    monkeypatch.setenv("HFKD_DEBUG", "1")
    assert main(["env"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.endswith("hfkd: error: bad\n")


def test_sigterm_ends_with_143_and_cleans_up(monkeypatch):
    cleaned = []

    def run(argv):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            cleaned.append(True)

    serve(monkeypatch, run)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["env"]) == 143
    assert cleaned
    assert signal.getsignal(signal.SIGTERM) is before


def test_unknown_command_suggests_the_nearest(capsys):
    assert main(["trian"]) == 2
    error = capsys.readouterr().err
    assert "unknown command 'trian' (did you mean 'train'?)" in error


def test_no_command_prints_the_usage(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(f"  {command} " in usage for command in COMMANDS)


@pytest.mark.parametrize("command", ["evaluate", "sample", "push", "study", "benchmark", "demo", "env"])
def test_every_command_has_help(capsys, command):
    assert main([command, "--help"]) == 0
    assert f"hfkd {command}" in capsys.readouterr().out


def test_env_names_versions_and_hardware(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("torch", "transformers", "python", "cpu"))


def test_help_starts_fast_and_without_torch():
    """In a real process: the modules that `hfkd --help` imports, and its exit code."""
    code = (
        "import sys; from hfkd.scripts.cli import main; code = main(['--help'])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: hfkd COMMAND")


def test_module_entry_point_returns_the_code():
    result = subprocess.run(
        [sys.executable, "-m", "hfkd.scripts.cli", "evalute"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "did you mean 'evaluate'" in result.stderr
