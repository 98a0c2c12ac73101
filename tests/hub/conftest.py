from pathlib import Path

import pytest
import torch
from hub_fixtures import hub  # noqa: F401
from safetensors.torch import save_file


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved two-student tree with all that must stay at home beside what may be published."""
    folder = tmp_path / "run"
    for place in (folder, folder / "student_1"):
        place.mkdir()
        save_file({"weight": torch.arange(4.0)}, place / "model.safetensors")
        for name in ("config.json", "preprocessor_config.json"):
            (place / name).write_text("{}")
        (place / "modeling_tiny.py").write_text("WIDTH = 4\n")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# Tiny\n")
    (folder / "curve.png").write_bytes(b"\x89PNG")
    (folder / "resolved_config.yaml").write_text("seed: 0\n")
    for private in (
        "training_args.bin",
        "optimizer.pt",
        "optimizer.safetensors",
        "trainer_state.json",
        "scheduler.pkl",
        "manifest.json",
        "checkpoint-4/model.safetensors",
        "training_state/discriminators.safetensors",
        ".tmp-checkpoint-8-00/config.json",
        "student_x/config.json",
        "notes.txt",
    ):
        path = folder / private
        path.parent.mkdir(exist_ok=True)
        path.write_text("private")
    return folder
