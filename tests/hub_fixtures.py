"""The loopback Hub as a fixture: `from hub_fixtures import hub` in a conftest.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub.constants
import pytest
from loopback_hub import LoopbackHub


@contextmanager
def loopback_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[LoopbackHub]:
    """A Hub beside which no login of the machine's user is in reach."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(folder / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with LoopbackHub() as server:
        yield server


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    """A Hub for this test alone."""
    with loopback_hub(monkeypatch, tmp_path) as server:
        yield server
