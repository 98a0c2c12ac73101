"""Whether a saved student is this run's: weights alone do not say what function they are of."""

import json
from typing import Any

from transformers import PreTrainedConfig

from hfkd.errors import InputError


# What a configuration records besides what its network computes; `problem_type` a trainer takes from the labels.
_RECORDS = frozenset(
    (
        *("_name_or_path", "architectures", "auto_map", "dtype", "problem_type", "torch_dtype", "training_facts"),
        "transformers_version",
    )
)
_SHOWN = 60  # characters of a value


def check_same_configuration(where: Any, saved: PreTrainedConfig, own: PreTrainedConfig) -> None:
    """Raise InputError naming the first setting, also of a configuration within, in which two of one class differ.

    Args:
        where: the saved one was found, for the message.
        saved, own: of the checkpoint and of this run's student.
    """
    # The run's own goes the way that the saved one has gone, so that defaults are filled in alike.
    again = type(own).from_dict(own.to_dict())
    before, now = (_flat(json.loads(config.to_json_string(use_diff=False))) for config in (saved, again))
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise InputError(
                f"{where} was saved with {name}={_shown(before.get(name))}, and this run's student has "
                f"{_shown(now.get(name))}: resume with the checkpoint's settings, or start a new run"
            )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if name in _RECORDS:
            continue
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
