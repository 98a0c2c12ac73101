"""The methods that the command knows, each by its stem. Nothing of a method is imported before it is asked for."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfkd.errors import InputError

from .suggest import nearest


RECIPES = Path(__file__).parent / "recipes"


def _load(target: str) -> Any:
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Method:
    """Where a method's parts are, as `module:name`.

    `config`: its Config dataclass. `setup`: the dataclass of its own options for the command (which networks).
    `data`: that of its data options; None for a method that sees no data. `build`: `build(config, data, setup) -> Job`
    (`build(config, setup)` without data), which loads the data and makes the Trainer. `benchmark` and `demo`:
    functions behind the subcommands of these names, where the method has them; `toy`: that behind `hfkd demo --toy`.
    `metrics`: what a study of the method shows unless it names others. `leaves_generator`: it saves a generator, whose
    features no probe reads, and no student.
    """

    stem: str
    summary: str
    config: str
    setup: str
    build: str
    benchmark: str | None = None
    demo: str | None = None
    toy: str | None = None
    metrics: tuple[str, ...] = ("accuracy",)
    data: str | None = "hfkd.data:DataArguments"
    leaves_generator: bool = False

    @property
    def name(self) -> str:
        """The stem as it is written on a command line, with dashes."""
        return self.stem.replace("_", "-")

    @property
    def recipes(self) -> Path:
        return RECIPES / self.stem

    def dataclasses(self) -> list[type]:
        """Set-up, data options (if any) and Config, in the order in which `--help` shows them."""
        return [_load(part) for part in (self.setup, self.data, self.config) if part is not None]

    def load(self, part: str) -> Any:
        """The object behind `build`, `benchmark`, `demo` or `toy`. Raises `InputError` where the method has none."""
        target = getattr(self, part)
        if target is None:
            others = ", ".join(method.name for method in METHODS.values() if getattr(method, part))
            raise InputError(f"{self.name} has no {part}: choose one of {others}, or hfkd train {self.name}.")
        return _load(target)


METHODS = {
    method.stem: method
    for method in [
        Method(
            stem="online_adversarial",
            summary="AFD: a cohort whose students teach each other logits and feature-map distributions",
            config="hfkd.trainers.online_adversarial:OnlineAdversarialConfig",
            setup="hfkd.scripts.cohort:CohortArguments",
            build="hfkd.scripts.cohort:build",
            benchmark="hfkd.scripts.benchmark_online_adversarial:benchmark",
            demo="hfkd.scripts.demo_online_adversarial:demo",
            metrics=("mean_accuracy", "ensemble_accuracy"),
        ),
        Method(
            stem="supervised",
            summary="Cross-entropy alone: the baseline that every distillation has to beat",
            config="hfkd.trainers.supervised:SupervisedConfig",
            setup="hfkd.scripts.peers:SupervisedArguments",
            build="hfkd.scripts.peers:build_supervised",
            metrics=("mean_accuracy",),
        ),
        Method(
            stem="distillation",
            summary="Offline distillation: a student learns from labels and trained teachers, by nine losses",
            config="hfkd.trainers.distillation:OfflineDistillationConfig",
            setup="hfkd.scripts.distillation:OfflineDistillationArguments",
            build="hfkd.scripts.distillation:build",
            benchmark="hfkd.scripts.benchmark_distillation:benchmark",
            metrics=("mean_accuracy",),
        ),
        Method(
            stem="mutual_learning",
            summary="DML: students that learn from the labels and from each other's predictions",
            config="hfkd.trainers.mutual_learning:MutualLearningConfig",
            setup="hfkd.scripts.cohort:StudentsArguments",
            build="hfkd.scripts.peers:build_mutual_learning",
            metrics=("mean_accuracy", "ensemble_accuracy"),
        ),
        Method(
            stem="kdcl",
            summary="KDCL: students that learn from the labels and from one ensemble of all of them",
            config="hfkd.trainers.kdcl:KdclConfig",
            setup="hfkd.scripts.cohort:StudentsArguments",
            build="hfkd.scripts.peers:build_kdcl",
            metrics=("mean_accuracy", "ensemble_accuracy"),
        ),
        Method(
            stem="one",
            summary="ONE: branches of one network that are taught by their own gated ensemble",
            config="hfkd.trainers.one:OneConfig",
            setup="hfkd.scripts.cohort:StudentsArguments",
            build="hfkd.scripts.peers:build_one",
            metrics=("mean_accuracy", "gated_ensemble_accuracy"),
        ),
        Method(
            stem="pcl",
            summary="PCL: branches of one network, taught by a classifier on all of them and by each other's averages",
            config="hfkd.trainers.pcl:PclConfig",
            setup="hfkd.scripts.cohort:StudentsArguments",
            build="hfkd.scripts.peers:build_pcl",
            metrics=("mean_accuracy", "peer_ensemble_accuracy"),
        ),
        Method(
            stem="ffl",
            summary="FFL: students and a classifier on their fused feature maps, which teach each other",
            config="hfkd.trainers.ffl:FflConfig",
            setup="hfkd.scripts.cohort:StudentsArguments",
            build="hfkd.scripts.peers:build_ffl",
            metrics=("mean_accuracy", "fused_accuracy"),
        ),
        Method(
            stem="gradient_features",
            summary="Gradients as features: a linear classifier on the activations and gradients of a trained network",
            config="hfkd.trainers.gradient_features:GradientFeaturesConfig",
            setup="hfkd.scripts.gradient_base:GradientBaseArguments",
            build="hfkd.scripts.gradient_base:build",
            benchmark="hfkd.scripts.benchmark_gradient_features:benchmark",
            demo="hfkd.scripts.demo_gradient_features:demo",
        ),
        Method(
            stem="bigan",
            summary="BiGAN (ALI): an encoder and a generator without labels; a base network for gradient features",
            config="hfkd.trainers.bigan:BiGanConfig",
            setup="hfkd.scripts.encoders:BiGanArguments",
            build="hfkd.scripts.encoders:build_bigan",
            metrics=("reconstruction_error", "discriminator_accuracy"),
        ),
        Method(
            stem="vae",
            summary="VAE: an encoder without labels, with ACAI's networks; a base network for gradient features",
            config="hfkd.trainers.vae:VaeConfig",
            setup="hfkd.scripts.encoders:VaeArguments",
            build="hfkd.scripts.encoders:build_vae",
            metrics=("elbo", "reconstruction_error"),
        ),
        Method(
            stem="gan",
            summary="GAN: a generator of images without labels; a teacher for squeeze-and-span",
            config="hfkd.trainers.gan:GanConfig",
            setup="hfkd.scripts.gan:GanArguments",
            build="hfkd.scripts.gan:build",
            metrics=("frechet_distance", "judge_confidence"),
            leaves_generator=True,
        ),
        Method(
            stem="squeeze_and_span",
            summary="Squeeze-and-Span: a student backbone from a GAN generator's features, without labels",
            config="hfkd.trainers.squeeze_and_span:SqueezeAndSpanConfig",
            setup="hfkd.scripts.squeeze_and_span:SelfSupervisedArguments",
            build="hfkd.scripts.squeeze_and_span:build",
            benchmark="hfkd.scripts.benchmark_squeeze_and_span:benchmark",
            demo="hfkd.scripts.demo_squeeze_and_span:demo",
            metrics=("knn_accuracy", "representation_rank"),
        ),
        Method(
            stem="vicreg",
            summary="VICReg: a backbone without labels from two views of real images, a generator's, or both",
            config="hfkd.trainers.vicreg:VicregConfig",
            setup="hfkd.scripts.squeeze_and_span:SelfSupervisedArguments",
            build="hfkd.scripts.two_views:build_vicreg",
            metrics=("knn_accuracy",),
        ),
        Method(
            stem="simsiam",
            summary="SimSiam: a backbone without labels from two views, one of which predicts the other",
            config="hfkd.trainers.simsiam:SimSiamConfig",
            setup="hfkd.scripts.squeeze_and_span:SelfSupervisedArguments",
            build="hfkd.scripts.two_views:build_simsiam",
            metrics=("knn_accuracy",),
        ),
        Method(
            stem="latent_encoding",
            summary="Encoding: a backbone without labels that says of which latents a frozen generator makes an image",
            config="hfkd.trainers.latent_encoding:LatentEncodingConfig",
            setup="hfkd.scripts.latent_encoding:LatentEncodingArguments",
            build="hfkd.scripts.latent_encoding:build",
            metrics=("knn_accuracy", "reconstruction_error"),
        ),
        Method(
            stem="max_margin",
            summary="Full-batch training of a classifier to a maximum margin: what a generator can be born from",
            config="hfkd.trainers.max_margin:MaxMarginConfig",
            setup="hfkd.scripts.max_margin:MaxMarginArguments",
            build="hfkd.scripts.max_margin:build",
        ),
        Method(
            stem="generator_from_classifier",
            summary="GBC: a generator of images by class, from a trained classifier's weights and no data at all",
            config="hfkd.trainers.generator_from_classifier:GeneratorFromClassifierConfig",
            setup="hfkd.scripts.generator_from_classifier:GeneratorFromClassifierArguments",
            build="hfkd.scripts.generator_from_classifier:build",
            benchmark="hfkd.scripts.benchmark_generator_from_classifier:benchmark",
            demo="hfkd.scripts.demo_generator_from_classifier:demo",
            toy="hfkd.scripts.toy_generator_from_classifier:toy",
            metrics=("sqrt_stationarity", "self_accuracy"),
            data=None,
            leaves_generator=True,
        ),
    ]
}


def find_method(name: str) -> Method:
    """The method of this stem, dashes or underscores. Raises `InputError` that suggests the nearest."""
    stem = name.replace("-", "_")
    if stem not in METHODS:
        known = [method.name for method in METHODS.values()]
        raise InputError(
            f"unknown method {name!r}{nearest(name.replace('_', '-'), known)}; methods: {', '.join(known)}."
        )
    return METHODS[stem]
