"""The base network of gradient features and what is linearised of it, as options, and the trainer that they make."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from transformers import AutoImageProcessor, PreTrainedModel

from hfkd.data import DataArguments, ImageSources, build_sources, load_image_datasets
from hfkd.data.sources import RESIDENT_LIMIT_BYTES
from hfkd.errors import InputError
from hfkd.models import STUDENT_PRESETS, build_gradient_features, build_student, load_base
from hfkd.models.gradient_features import as_classifier
from hfkd.models.modeling_gradient_features import build_classifier
from hfkd.trainers.gradient_features import GradientFeaturesConfig, GradientFeaturesTrainer

from .cohort import student_seed
from .job import Job


Source = Literal["pretrained", "random"]


@dataclass
class GradientBaseArguments:
    """Which network is the base, and which gradients of it are features. Images are not augmented unless asked for."""

    base: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a trained network of transformers or hfkd, whose own classifier is dropped; "
            "or a preset such as resnet8, whose weights are random."
        },
    )
    theta2: list[str] = field(
        default_factory=lambda: ["1"],
        metadata={"help": "What is linearised: a number of top blocks, or names of modules (* and ? as in files)."},
    )
    mode: Literal["full", "activation", "gradient", "finetune"] = field(
        default="full",
        metadata={"help": "Features: full (activations and gradients) or one kind; finetune trains theta2 itself."},
    )
    ntk: Literal["fan_out", "fan_in", "none"] = field(
        default="fan_out",
        metadata={
            "help": "Scale of the raw weights in the modes full and gradient: fan_out (the authors' code), fan_in or "
            "none."
        },
    )
    ntk_head: bool = field(default=True, metadata={"help": "Scale the raw weights on activations, too."})
    whiten: bool = field(
        default=False,
        metadata={
            "help": "Whiten what enters the layers of theta2, in the modes full and gradient (ours): the same "
            "functions by far fewer updates."
        },
    )
    fold_batch_norm: bool = field(default=True, metadata={"help": "Fold batch norms into convolutions (paper: yes)."})
    gradient_theta1: Source = field(
        default="pretrained",
        metadata={"help": "Below theta2 in the gradient branch alone: pretrained, or random (the paper's ablation)."},
    )
    gradient_theta2: Source = field(
        default="pretrained", metadata={"help": "Theta2 in the gradient branch alone: pretrained or random."}
    )

    def __post_init__(self) -> None:
        if self.mode in ("activation", "finetune") and (self.ntk != "fan_out" or not self.ntk_head or self.whiten):
            raise InputError(
                f"ntk={self.ntk}, ntk_head={self.ntk_head}, whiten={self.whiten} have no effect with "
                f"mode={self.mode}: leave out"
            )
        if "random" in (self.gradient_theta1, self.gradient_theta2) and self.mode not in ("full", "gradient"):
            raise InputError(
                f"gradient_theta1={self.gradient_theta1}, gradient_theta2={self.gradient_theta2}: mode={self.mode} "
                "has no gradient branch; choose mode full or gradient, or leave both pretrained"
            )


def build(config: GradientFeaturesConfig, data_arguments: DataArguments, arguments: GradientBaseArguments) -> Job:
    """Load data and base, build the classifier and its trainer. Raises `InputError` for anything that does not fit."""
    if arguments.base is None:
        raise InputError(
            "gradient features need a base network: give --base FOLDER_OR_HUB_ID of a trained one (hfkd demo "
            "gradient-features trains one on digits)"
        )
    trained = None if arguments.base in STUDENT_PRESETS else load_base(arguments.base)
    sources, class_names = _load_images(config, data_arguments, trained)
    base = trained or build_student(
        arguments.base,
        class_names=class_names,
        image_size=sources.preprocessing.image_size,
        num_channels=sources.preprocessing.num_channels,
        seed=student_seed(config.seed, 0),
    )
    trainer = GradientFeaturesTrainer(
        build_model(base, arguments, class_names, seed=config.seed),
        args=config,
        train_dataset=sources.train,
        eval_dataset=sources.validation,
        processing_class=sources.preprocessing.to_image_processor(),
        dataset_name=data_arguments.dataset_name,
    )
    return Job(trainer, sources.train, sources.test)


def _load_images(
    config: GradientFeaturesConfig, data_arguments: DataArguments, base: PreTrainedModel | None
) -> tuple[ImageSources, tuple[str, ...]]:
    """Images as the base's own processor makes them, where it has one, and the names of their classes."""
    arguments = replace(data_arguments, augmentation=data_arguments.augmentation or "none")
    data = load_image_datasets(arguments)
    if not data.columns.class_names:
        raise InputError(f"dataset {data.name!r} has no labels: name its label column, or choose labelled data")
    sources = build_sources(
        data,
        arguments,
        seed=config.seed if config.data_seed is None else config.data_seed,
        processor=None if base is None else _processor(base.config._name_or_path),
        num_channels=None if base is None else getattr(base.config, "num_channels", 3),
        # Random crops are cut out of whole images.
        resident_limit=0 if config.evaluation_crops > 1 else RESIDENT_LIMIT_BYTES,
    )
    return sources, tuple(data.columns.class_names)


def _processor(name_or_path: str) -> Any:
    """The processor that was saved with a base; None where there is none, and the data's statistics hold."""
    try:
        return AutoImageProcessor.from_pretrained(name_or_path)
    except OSError:
        return None


def build_model(
    base: PreTrainedModel, arguments: GradientBaseArguments, class_names: tuple[str, ...], seed: int
) -> PreTrainedModel:
    """The classifier on `base`, whose gradient branch has random weights where the arguments say so."""
    random = "random" in (arguments.gradient_theta1, arguments.gradient_theta2)
    model = build_gradient_features(
        base,
        _theta2(arguments.theta2),
        class_names=class_names,
        mode=arguments.mode,
        ntk=arguments.ntk if arguments.mode in ("full", "gradient") else None,
        ntk_head=arguments.ntk_head,
        whiten=arguments.whiten,
        fold_batch_norm=arguments.fold_batch_norm,
        gradient_base=_fresh(base, student_seed(seed, 1)) if random else None,
    )
    if random:
        pretrained = model.backbone.base.state_dict()
        for name, value in model.backbone.linearised_base.state_dict().items():
            kind = arguments.gradient_theta2 if name in model.config.theta2 else arguments.gradient_theta1
            if kind == "pretrained":
                value.copy_(pretrained[name])
    return model


def _theta2(items: list[str]) -> int | list[str]:
    """A number of blocks, or names."""
    return int(items[0]) if len(items) == 1 and items[0].isdecimal() else items


def _fresh(base: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A network of the architecture of `base` with weights of its own; the global random state is left as it was."""
    classifier = as_classifier(base)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build_classifier(classifier.config).eval()
