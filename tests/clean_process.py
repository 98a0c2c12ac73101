"""Run code where hfkd cannot be imported: what a user without it sees."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


_BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"hfkd", "trainers", "model_cards", "scripts", "evaluate"}:
            raise ModuleNotFoundError(f"{name} is blocked: this process stands for a user without hfkd")

sys.meta_path.insert(0, Blocked())
"""


def run_clean(code: str, environment: Mapping[str, str], folder: Path) -> str:
    """Standard output of `code`, run in `folder` by an isolated interpreter without hfkd."""
    command = [sys.executable, "-I", "-c", _BLOCK + code]
    result = subprocess.run(command, env=dict(environment), cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout
