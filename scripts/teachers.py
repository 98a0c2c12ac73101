"""Trained classifiers that teach, by folder or Hub id: with the data's classes and an image processor of their own."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel
from transformers.utils import logging

from hfkd.errors import InputError
from hfkd.models import STUDENT_PRESETS
from hfkd.models.class_names import match_teacher
from hfkd.models.probing import one_line


logger = logging.get_logger(__name__)


def load_teacher(name: str, class_names: Sequence[str], trust_remote_code: bool = False) -> PreTrainedModel:
    """A trained classifier, in float32, whose classes are the data's: matched by their names, see `match_teacher`.

    Raises:
        InputError: a preset, a checkpoint that is missing, no image classifier or without trained head, or other
            classes.
    """
    if name in STUDENT_PRESETS:
        raise InputError(f"teacher {name!r} is a preset with fresh weights: give a trained checkpoint")
    try:
        teacher, info = AutoModelForImageClassification.from_pretrained(
            name,
            trust_remote_code=trust_remote_code,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"teacher {name!r} cannot be loaded: {one_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"teacher {name!r} lacks weights ({', '.join(missing[:3])}): give a classifier that has been trained"
        )
    try:
        match_teacher(teacher, class_names)
    except InputError as error:
        raise InputError(f"teacher {name!r}: {error}") from error
    return teacher


def teacher_processor(name: str, trust_remote_code: bool = False) -> Any:
    """The teacher's own image processor, as its statistics and size need not be the data's; None where it has none.

    Raises:
        InputError: one that is damaged, or that only code of its repository makes, which is not trusted.
    """
    try:
        return AutoImageProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
    except OSError:
        logger.warning(f"teacher {name!r} has no image processor: it is given pixel values as the student is")
        return None
    except (ImportError, ValueError) as error:
        raise InputError(f"image processor of teacher {name!r} cannot be loaded: {one_line(error)}") from error
