"""Loading a saved generator, from a folder or the Hub."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

import hfkd.models  # noqa: F401  registers the hfkd_* model types
from hfkd.errors import InputError
from hfkd.evaluation.sampling import is_generator

from .checkpoint import fetch


def load_generator(name: str, *, trust_remote_code: bool = False, revision: str | None = None) -> tuple[Any, Path]:
    """A generator (see `is_generator`) in evaluation mode, on the accelerator if there is one, and its folder here.

    `name` is a folder, a Hub repo, or such a repo's folder: user/repo/generator.

    Raises:
        InputError: nothing there, a network that is no generator, weights missing, or code that needs
            `trust_remote_code`.
    """
    folder = _fetch(name, revision)
    try:
        model, info = AutoModel.from_pretrained(
            folder, trust_remote_code=trust_remote_code, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise InputError(f"generator {name!r} cannot be loaded: {' '.join(str(error).split())}") from error
    if not is_generator(model):
        inside = (folder / "generator" / "config.json").is_file()
        mend = f"the generator beside it is {Path(name) / 'generator'}" if inside else "give a generator's folder"
        raise InputError(f"{name!r} is a {type(model).__name__}, which makes no images: {mend}")
    if info["missing_keys"]:
        raise InputError(
            f"generator {name!r} lacks weights: {', '.join(sorted(info['missing_keys'])[:3])}: give a whole checkpoint"
        )
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), folder


def _fetch(name: str, revision: str | None) -> Path:
    """The folder `name`, or a local copy of the Hub repo, whose folder may follow its name."""
    parts = name.split("/")
    if len(parts) != 3 or Path(name).expanduser().is_dir() or parts[0] in ("", ".", "..", "~"):
        return fetch(name, revision)
    folder = fetch("/".join(parts[:2]), revision) / parts[2]
    if not folder.is_dir():
        raise InputError(f"generator {name!r}: the repo has no such folder; give user/repo, or user/repo/generator")
    return folder
