"""The classifier that a generator was born from: which one it is, and what its weights demand of images."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoImageProcessor

from hfkd.trainers.convergence import ConvergenceConditions
from hfkd.trainers.draws import DrawsOnlyConfig
from hfkd.trainers.generator_from_classifier import GeneratorFromClassifierConfig

from .checkpoint import Cohort
from .methods import find_method
from .options import RUN_FILE, build, check_values, read_yaml


METHOD = "generator-from-classifier"
# Learned multipliers are not kept with a generator; those of cross-entropy, at their best scale, need no training.
_LEARNED = ("multipliers", "multiplier_learning_rate")


def options_of_run(generator: Path) -> dict[str, Any]:
    """The options of the run that made the generator in this folder; none where it is of another method or unknown."""
    path = generator / RUN_FILE
    options = read_yaml(path) if path.is_file() else {}
    return check_values(options, find_method(METHOD).dataclasses(), str(path)) if "classifiers" in options else {}


def named_parent(generator: Path, classifier_index: int) -> str | None:
    """The parent's folder by the generator's run.yaml, if it is still there."""
    names = options_of_run(generator).get("classifiers", [])
    named = names[classifier_index] if classifier_index < len(names) else None
    return named if named is not None and Path(named).expanduser().is_dir() else None


def sqrt_stationarity_under(parent: Cohort, generator: Any, folder: Path) -> Callable[[Tensor, Tensor], float] | None:
    """What `generation_metrics` takes: sqrt(L_st) of images and labels, all as one batch, under the parent.

    Its settings are those of the run that made the generator in `folder`, or the method's own; its multipliers are
    always those of cross-entropy. None where another method made the generator and its parent was not trained by full
    batches: weights of such a parent satisfy no condition, and its training images need not fit into one batch.

    Raises:
        InputError: a parent whose stationary parameters cannot be found.
    """
    student: Any = parent.students[0]
    options = options_of_run(folder)
    if not options and not getattr(student.config, "training_facts", None):
        return None
    own = {item.name for item in fields(GeneratorFromClassifierConfig)}
    own -= {*_LEARNED, *(item.name for item in fields(DrawsOnlyConfig))}
    (settings,) = build(
        [GeneratorFromClassifierConfig], {name: value for name, value in options.items() if name in own}
    )
    size, channels = generator.config.image_size, generator.config.num_channels
    processor = AutoImageProcessor.from_pretrained(parent.folder)
    conditions = ConvergenceConditions(student, processor, settings, size, channels).to(student.device)

    def measure(images: Tensor, labels: Tensor) -> float:
        found = conditions(images.to(student.device), labels.to(student.device)).stationarity
        assert found is not None  # it was asked for
        return found.detach().sqrt().item()

    return measure
