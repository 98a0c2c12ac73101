"""Training state as safetensors and JSON: nested dicts and lists of tensors and plain values, never a pickle."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hfkd.errors import InputError


def write_state(folder: Path, name: str, state: Any) -> None:
    """Write `state` as `<name>.json`, in which each tensor is a reference into `<name>.safetensors`."""
    tensors: dict[str, Tensor] = {}
    plain = _detach(state, tensors)
    save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
    (folder / f"{name}.json").write_text(json.dumps(plain), encoding="utf-8")


def read_state(folder: Path, name: str) -> Any:
    """Read what `write_state` wrote, equal to the bit.

    Raises:
        InputError: when one of the two files is missing.
    """
    for file in (folder / f"{name}.json", folder / f"{name}.safetensors"):
        if not file.is_file():
            raise InputError(f"{file} is missing: this checkpoint cannot be resumed, choose another one")
    return _attach(
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8")), load_file(folder / f"{name}.safetensors")
    )


def _detach(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        key = f"t{len(tensors)}"
        # A copy: safetensors refuses strided (channels_last) tensors and two names for one memory.
        tensors[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"__tensor__": key}
    if isinstance(value, dict):
        return {"__dict__": [[key, _detach(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"__tuple__": [_detach(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_detach(item, tensors) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be part of a training state")


def _attach(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_attach(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "__tensor__":
        return tensors[content]
    if kind == "__dict__":
        return {key: _attach(item, tensors) for key, item in content}
    if kind == "__tuple__":
        return tuple(_attach(item, tensors) for item in content)
    return float(content)


def rng_state() -> dict[str, Any]:
    """State of the global generators. Data never draws from them; dropout and user code do."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.random.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.random.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
