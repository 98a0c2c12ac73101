"""The classifiers that a generator is born from, as options of the command, and the trainer that they make."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoImageProcessor

from hfkd.errors import InputError
from hfkd.models import HfkdConditionalGeneratorConfig, HfkdConditionalGeneratorModel
from hfkd.trainers.config import check_range
from hfkd.trainers.generator_from_classifier import GeneratorFromClassifierConfig, GeneratorFromClassifierTrainer

from .checkpoint import Cohort, load_cohort
from .cohort import student_seed
from .job import Job


@dataclass
class GeneratorFromClassifierArguments:
    """Which classifiers the generator is born from, and its size. There are no data options: no image is seen."""

    classifiers: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders or Hub ids of trained classifiers, such as hfkd train max-margin leaves."},
    )
    latent_size: int | None = field(
        default=None,
        metadata={"help": "Random numbers of an image; by default 64, or 128 for 32 pixels and more."},
    )
    hidden_sizes: list[int] = field(
        default_factory=list,
        metadata={"help": "Widths of the generator's fully connected layers; by default by the image's size."},
    )
    latent_skip: bool = field(
        default=False,
        metadata={"help": "Add latents to the image before tanh: a spread start, for images of few pixels (ours)."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Let the classifiers' repositories run their code."}
    )

    def __post_init__(self) -> None:
        if self.latent_size is not None:
            check_range("latent_size", self.latent_size, 1)


def build(config: GeneratorFromClassifierConfig, arguments: GeneratorFromClassifierArguments) -> Job:
    """Load the classifiers, make the generator and its trainer. Raises `InputError` for anything that does not fit."""
    if not arguments.classifiers:
        raise InputError(
            "a generator is born from a trained classifier: give --classifiers FOLDER_OR_HUB_ID (hfkd train "
            "max-margin trains one)"
        )
    found = [_load(name, arguments.trust_remote_code) for name in arguments.classifiers]
    trainer = GeneratorFromClassifierTrainer(
        _generator(config, arguments, found),
        [one.students[0] for one in found],
        args=config,
        processing_classes=[AutoImageProcessor.from_pretrained(one.folder) for one in found],
    )
    return Job(trainer, train=None, test=trainer.eval_dataset)


def _load(name: str, trust_remote_code: bool) -> Cohort:
    """The classifier at the root of a checkpoint, under the name that it was asked for by."""
    found = load_cohort(name, trust_remote_code=trust_remote_code)
    if found.fresh_weights:
        raise InputError(f"classifier {name!r} was saved without {found.fresh_weights[0]}: give a trained classifier")
    found.students[0].config._name_or_path = name
    return found


def _generator(
    config: GeneratorFromClassifierConfig, arguments: GeneratorFromClassifierArguments, found: list[Cohort]
) -> HfkdConditionalGeneratorModel:
    """Fresh weights, for images as all the classifiers take."""
    sizes = [(one.preprocessing.image_size, one.preprocessing.num_channels) for one in found]
    for name, size in zip(arguments.classifiers, sizes, strict=True):
        if size != sizes[0]:
            raise InputError(
                f"classifier {name!r} takes images of (size, channels) {size}, and {arguments.classifiers[0]!r} of "
                f"{sizes[0]}: one generator makes images of one kind"
            )
    configs: list[Any] = [one.students[0].config for one in found]
    names = [one.id2label[number] for one in configs for number in range(one.num_labels)]
    chosen: dict[str, Any] = {"latent_size": arguments.latent_size, "hidden_sizes": arguments.hidden_sizes}
    try:
        made = HfkdConditionalGeneratorConfig.for_images(
            *sizes[0],
            id2label=dict(enumerate(names)),
            class_counts=[one.num_labels for one in configs],
            latent_skip=arguments.latent_skip,
            **{name: value for name, value in chosen.items() if value},
        )
    except ValueError as error:  # a size without a plan, or fields that do not fit it
        raise InputError(" ".join(str(error).split())) from error
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(student_seed(config.seed, 0))
        generator = HfkdConditionalGeneratorModel(made)
    # Processors speak of pixels in [0, 1].
    generator.start_at(torch.tensor([one.preprocessing.mean for one in found]).mean(dim=0) * 2 - 1)
    return generator
