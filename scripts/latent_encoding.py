"""Encoding into a generator's latents as the command makes it."""

from dataclasses import dataclass, field, replace
from typing import Any

from transformers import AutoImageProcessor

from hfkd.data import DataArguments
from hfkd.errors import InputError
from hfkd.trainers.latent_encoding import LatentEncodingConfig, LatentEncodingTrainer

from .checkpoint import load_cohort
from .job import Job
from .squeeze_and_span import SelfSupervisedArguments, SelfSupervisedParts


@dataclass
class LatentEncodingArguments(SelfSupervisedArguments):
    """Which student learns, of which generator's latents, and whose features say how alike two images are."""

    perceptual_network: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a convolutional classifier, in whose features images and reconstructions are "
            "compared too. The paper has LPIPS by AlexNet here, whose weights hfkd does not ship: without a network "
            "of yours there is no such term."
        },
    )


def build(config: LatentEncodingConfig, data_arguments: DataArguments, arguments: LatentEncodingArguments) -> Job:
    """Load images and networks, make the trainer. Raises `InputError` for anything that does not fit."""
    if data_arguments.augmentation not in (None, "none"):
        raise InputError(
            f"augmentation={data_arguments.augmentation}: a generator makes no augmented images to find codes of: "
            "leave it out"
        )
    normalization = data_arguments.normalization or "symmetric"
    data_arguments = replace(data_arguments, normalization=normalization, augmentation="none")
    parts = SelfSupervisedParts.load(config, data_arguments, arguments)
    perceptual = _perceptual(arguments)
    return parts.job(LatentEncodingTrainer(parts.student, parts.generator, config, **perceptual, **parts.common))


def _perceptual(arguments: LatentEncodingArguments) -> dict[str, Any]:
    if arguments.perceptual_network is None:
        return {}
    found = load_cohort(arguments.perceptual_network, trust_remote_code=arguments.trust_remote_code)
    processor = AutoImageProcessor.from_pretrained(found.folder)
    return {"perceptual_network": found.students[0], "perceptual_processing_class": processor}
