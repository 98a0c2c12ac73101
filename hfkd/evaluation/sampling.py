"""Images from a generator, whatever its class: which classes it knows, and many samples in batches."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfkd.errors import InputError


def is_generator(model: Any) -> bool:
    """Whether `model` has `sample`, as `GeneratorPreTrainedModel` describes it, and `latent_size` in its `config`."""
    return callable(getattr(model, "sample", None)) and hasattr(getattr(model, "config", None), "latent_size")


def class_names(generator: Any, classifier_index: int = 0) -> list[str] | None:
    """Names of the classes that the generator makes images of, or None where it knows none.

    One that knows classes takes labels, and the others refuse them by a ValueError.

    Args:
        generator: see `is_generator`.
        classifier_index: whose classes, of a generator that was born from several classifiers.

    Raises:
        InputError: no such classifier.
    """
    config = generator.config
    count = getattr(config, "num_classifiers", 1)
    if not 0 <= classifier_index < count:
        raise InputError(
            f"classifier_index {classifier_index} is outside the generator's {count} classifiers: use 0 to {count - 1}"
        )
    if count > 1:
        return list(config.class_names(classifier_index))
    try:
        generator.sample(1, labels=[0], seed=0)
    except ValueError:
        return None
    return [config.id2label[number] for number in range(config.num_labels)]


def balanced_labels(n: int, classes: Sequence[int]) -> Tensor:
    """`n` labels (n,): the `classes` in turn."""
    return torch.tensor(classes)[torch.arange(n) % len(classes)]


def draw_images(
    generator: Any,
    n: int,
    *,
    labels: Tensor | None = None,
    seed: int = 0,
    classifier_index: int = 0,
    batch_size: int = 256,
) -> Tensor:
    """`n` images (n, C, H, W) in [-1, 1], float32 on the CPU.

    The first `batch_size` are those of `generator.sample(batch_size, labels, seed)`; further batches have seeds of
    their own, which follow from `seed`.

    Args:
        generator: see `is_generator`.
        labels: (n,) class numbers, of a generator of classes.
        classifier_index: as in `class_names`.
    """
    conditions: dict[str, Any] = {}
    if getattr(generator.config, "num_classifiers", 1) > 1:
        conditions["classifier_index"] = classifier_index
    images = []
    for number, start in enumerate(range(0, n, batch_size)):
        if labels is not None:
            conditions["labels"] = labels[start : start + batch_size]
        batch_seed = seed if number == 0 else int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        images.append(generator.sample(min(batch_size, n - start), seed=batch_seed, **conditions).float().cpu())
    return torch.cat(images)
