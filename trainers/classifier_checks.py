"""Whether a generator and the classifiers that it is to be born from fit each other."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from hfkd.errors import InputError

from .cohort_checks import check_is_model


def check_generator_and_classifiers(generator: Any, classifiers: Sequence[Any], processors: Sequence[Any]) -> None:
    """Raise InputError unless all are models, the generator says what it makes, and each classifier comes once."""
    check_is_model("generator", generator)
    for name in ("latent_size", "class_counts", "image_size", "num_channels"):
        if not hasattr(generator.config, name):
            raise InputError(
                f"the generator is a {type(generator).__name__} without config.{name}: use an "
                "HfkdConditionalGeneratorModel, or a model with its methods and fields"
            )
    if not classifiers:
        raise InputError("classifiers=[]: a generator is born from at least one classifier")
    for classifier in classifiers:
        check_is_model("classifier", classifier)
    if len(set(map(id, classifiers))) < len(classifiers):
        raise InputError("classifiers holds one network twice: give each once")
    if len(processors) != len(classifiers):
        raise InputError(
            f"{len(classifiers)} classifiers have {len(processors)} processing_classes: give one for each, None for a "
            "classifier that takes values in [-1, 1] as they are"
        )


def check_class_counts(generator: PreTrainedModel, counts: Sequence[int]) -> None:
    """Raise InputError unless the generator makes images of as many classes as each classifier knows."""
    wanted, found = list(generator.config.class_counts), list(counts)
    if wanted != found:
        raise InputError(
            f"the generator was built for classifiers of {wanted} classes, and these have {found}: build it with "
            f"class_counts={found}"
        )
