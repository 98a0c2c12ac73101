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
        "DiscriminatorOutput",
        "DiscriminatorPreTrainedModel",
        "GeneratorOutput",
        "GeneratorPreTrainedModel",
        "HfkdBiganEncoderConfig",
        "HfkdBiganEncoderForImageClassification",
        "HfkdBiganEncoderModel",
        "HfkdBiganGeneratorConfig",
        "HfkdBiganGeneratorModel",
        "HfkdConditionalGeneratorConfig",
        "HfkdConditionalGeneratorModel",
        "HfkdDcganDiscriminatorConfig",
        "HfkdDcganDiscriminatorModel",
        "HfkdDcganGeneratorConfig",
        "HfkdDcganGeneratorModel",
        "HfkdGradientFeaturesConfig",
        "HfkdGradientFeaturesForImageClassification",
        "HfkdGradientFeaturesModel",
        "HfkdMlpConfig",
        "HfkdMlpForImageClassification",
        "HfkdMlpModel",
        "HfkdResNetConfig",
        "HfkdResNetForImageClassification",
        "HfkdResNetModel",
        "HfkdStyleGan2DiscriminatorConfig",
        "HfkdStyleGan2DiscriminatorModel",
        "HfkdStyleGan2GeneratorConfig",
        "HfkdStyleGan2GeneratorModel",
        "HfkdVaeEncoderConfig",
        "HfkdVaeEncoderForImageClassification",
        "HfkdVaeEncoderModel",
        "HfkdWideResNetConfig",
        "HfkdWideResNetForImageClassification",
        "HfkdWideResNetModel",
        "build_gradient_features",
        "build_student",
    ),
    "hfkd.data": (
        "Augmentation",
        "DataArguments",
        "Preprocessing",
        "ViewAugmentation",
        "build_sources",
        "load_image_datasets",
    ),
    "hfkd.evaluation.teacher_report": ("TeacherReport", "teacher_report"),
    "hfkd.models.class_names": ("match_classes", "match_teacher"),
    "hfkd.trainers.base": ("DistillationTrainer",),
    "hfkd.trainers.bigan": ("BiGanConfig", "BiGanTrainer"),
    "hfkd.trainers.cohort": ("CohortConfig", "CohortTrainer"),
    "hfkd.trainers.config": ("DistillationConfig",),
    "hfkd.trainers.ffl": ("FflConfig", "FflTrainer"),
    "hfkd.trainers.distillation": ("OfflineDistillationConfig", "OfflineDistillationTrainer"),
    "hfkd.trainers.gan": ("GanConfig", "GanTrainer"),
    "hfkd.trainers.generator_from_classifier": ("GeneratorFromClassifierConfig", "GeneratorFromClassifierTrainer"),
    "hfkd.trainers.gradient_features": ("CODE_PRESET", "GradientFeaturesConfig", "GradientFeaturesTrainer"),
    "hfkd.trainers.interrupt": ("TrainingInterrupted",),
    "hfkd.trainers.kdcl": ("KdclConfig", "KdclTrainer"),
    "hfkd.trainers.latent_encoding": ("LatentEncodingConfig", "LatentEncodingTrainer"),
    "hfkd.trainers.max_margin": ("MaxMarginConfig", "MaxMarginTrainer"),
    "hfkd.trainers.mutual_learning": ("MutualLearningConfig", "MutualLearningTrainer"),
    "hfkd.trainers.one": ("OneConfig", "OneTrainer"),
    "hfkd.trainers.online_adversarial": ("OnlineAdversarialConfig", "OnlineAdversarialTrainer"),
    "hfkd.trainers.pcl": ("PclConfig", "PclTrainer"),
    "hfkd.trainers.self_supervised": ("SelfSupervisedTrainer",),
    "hfkd.trainers.self_supervised_config": ("SelfSupervisedConfig",),
    "hfkd.trainers.simsiam": ("SimSiamConfig", "SimSiamTrainer"),
    "hfkd.trainers.squeeze_and_span": ("SqueezeAndSpanConfig", "SqueezeAndSpanTrainer"),
    "hfkd.trainers.supervised": ("SupervisedConfig", "SupervisedTrainer"),
    "hfkd.trainers.vae": ("VaeConfig", "VaeTrainer"),
    "hfkd.trainers.vicreg": ("VicregConfig", "VicregTrainer"),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hfkd' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
