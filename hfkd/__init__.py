"""Distil and generate with small vision models on Hugging Face.

Public names are loaded at first use, so that `import hfkd` costs next to nothing.
"""

from importlib import import_module
from typing import Any


__version__ = "0.1.0"

_PUBLIC = {
    "hfkd.errors": ("InputError", "RunError"),
    "hfkd.models": (
        "ClassifierAdapter",
        "GeneratorOutput",
        "GeneratorPreTrainedModel",
        "HfkdBiganEncoderConfig",
        "HfkdBiganEncoderForImageClassification",
        "HfkdBiganEncoderModel",
        "HfkdBiganGeneratorConfig",
        "HfkdBiganGeneratorModel",
        "HfkdConditionalGeneratorConfig",
        "HfkdConditionalGeneratorModel",
        "HfkdGradientFeaturesConfig",
        "HfkdGradientFeaturesForImageClassification",
        "HfkdGradientFeaturesModel",
        "HfkdMlpConfig",
        "HfkdMlpForImageClassification",
        "HfkdMlpModel",
        "HfkdResNetConfig",
        "HfkdResNetForImageClassification",
        "HfkdResNetModel",
        "HfkdVaeEncoderConfig",
        "HfkdVaeEncoderForImageClassification",
        "HfkdVaeEncoderModel",
        "HfkdWideResNetConfig",
        "HfkdWideResNetForImageClassification",
        "HfkdWideResNetModel",
        "build_gradient_features",
        "build_student",
    ),
    "hfkd.data": ("Augmentation", "DataArguments", "Preprocessing", "build_sources", "load_image_datasets"),
    "hfkd.trainers.base": ("DistillationTrainer",),
    "hfkd.trainers.bigan": ("BiGanConfig", "BiGanTrainer"),
    "hfkd.trainers.config": ("DistillationConfig",),
    "hfkd.trainers.generator_from_classifier": ("GeneratorFromClassifierConfig", "GeneratorFromClassifierTrainer"),
    "hfkd.trainers.gradient_features": ("CODE_PRESET", "GradientFeaturesConfig", "GradientFeaturesTrainer"),
    "hfkd.trainers.interrupt": ("TrainingInterrupted",),
    "hfkd.trainers.max_margin": ("MaxMarginConfig", "MaxMarginTrainer"),
    "hfkd.trainers.online_adversarial": ("OnlineAdversarialConfig", "OnlineAdversarialTrainer"),
    "hfkd.trainers.vae": ("VaeConfig", "VaeTrainer"),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hfkd' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
