"""What a classifier's configuration says of its training, and what is taken to hold where it says nothing."""

import math
from typing import Any

from transformers.utils import logging

from hfkd.errors import InputError
from hfkd.losses.generator_from_classifier import implied_margin_scale


logger = logging.get_logger(__name__)

_USED_FACTS = ("loss", "min_margin", "median_margin", "weight_decay")
ASSUMED_LOSS = 0.01  # mean cross-entropy, in nats, of a classifier that says nothing of its training


def margin_scale_of(config: Any, num_labels: int, given: float | None, name: str) -> float:
    """gamma, the margin that a classifier's training images are taken to have.

    In this order: as given; the median margin that is stored; what the stored mean cross-entropy implies; what a mean
    cross-entropy of 0.01 would imply, with a warning. A classifier that does not say that it separated its training
    images is warned of: its weights need not satisfy the conditions of convergence.

    Args:
        config: of the classifier; `training_facts`, where it has them, are those that `MaxMarginTrainer` stores.
        num_labels: its classes.
        given: gamma itself, or None.
        name: of the classifier, for the warnings.

    Raises:
        InputError: `training_facts` that are not named numbers.
    """
    facts = _facts_of(config, name)
    _warn_of_training(facts, name)
    if given is not None:
        return given
    if facts.get("median_margin", 0) > 0:
        return float(facts["median_margin"])
    if 0 < facts.get("loss", 0) < num_labels - 1:
        return implied_margin_scale(facts["loss"], num_labels)
    scale = implied_margin_scale(ASSUMED_LOSS, num_labels)
    logger.warning(
        f"{name} was stored without its margins: margin_scale={scale:.3g} is taken, as if its mean cross-entropy were "
        f"{ASSUMED_LOSS}; give --margin_scale if you know better"
    )
    return scale


def _facts_of(config: Any, name: str) -> dict[str, float]:
    facts = getattr(config, "training_facts", None) or {}
    known = (facts.get(key, 0.0) for key in _USED_FACTS) if isinstance(facts, dict) else (None,)
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in known):
        raise InputError(
            f"{name}: training_facts in its config.json ({str(facts)[:80]}) is not a table of numbers such as "
            "MaxMarginTrainer writes; remove it and give --margin_scale"
        )
    return facts


def _warn_of_training(facts: dict[str, float], name: str) -> None:
    margin = facts.get("min_margin", math.nan)
    if math.isnan(margin):
        logger.warning(
            f"{name} does not say how it was trained: unless that was to convergence, its weights do not satisfy the "
            "conditions that the generator is made from; hfkd train max-margin trains such classifiers"
        )
    elif margin <= 0 and not facts.get("weight_decay"):
        logger.warning(
            f"{name} did not separate its training images (smallest margin {margin:.3g}) and had no weight decay: its "
            "weights do not satisfy the conditions that the generator is made from; train it longer"
        )
