"""The encoders that learn without labels, as options of the command, and the trainers that they make with images."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfkd.data import (
    Augmentation,
    DataArguments,
    ImageSource,
    ImageSources,
    Preprocessing,
    build_sources,
    collate,
    load_image_datasets,
)
from hfkd.models import HfkdBiganGeneratorConfig, HfkdBiganGeneratorModel, build_student
from hfkd.trainers.bigan import ENCODER_FIELDS, BiGanConfig, BiGanTrainer
from hfkd.trainers.config import DistillationConfig, check_range
from hfkd.trainers.encoder_checks import check_encoder, check_generator
from hfkd.trainers.vae import VaeConfig, VaeTrainer

from .cohort import student_seed
from .job import Job


MEAN_IMAGE_OF = 500  # training images: as many as ALI's code starts from


@dataclass
class VaeArguments:
    """Which encoder learns."""

    encoder: str = field(
        default="vae_encoder",
        metadata={"help": "Preset (vae_encoder for 32 pixels, vae_encoder_8px), folder or Hub id of such an encoder."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Let the encoder's repository run its own code."})


@dataclass
class BiGanArguments:
    """Which encoder learns, and how many latents the generator has; its layers mirror the encoder's."""

    encoder: str = field(
        default="bigan_encoder",
        metadata={
            "help": "Preset (bigan_encoder and bigan_encoder_svhn for 32 pixels, bigan_encoder_8px), folder or Hub "
            "id of such an encoder."
        },
    )
    latent_size: int = field(default=64, metadata={"help": "Latents, >= 1 (ALI: 64 for CIFAR-10, 256 for SVHN)."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Let the encoder's repository run its own code."})

    def __post_init__(self) -> None:
        check_range("latent_size", self.latent_size, 1)


def build_vae(config: VaeConfig, data_arguments: DataArguments, arguments: VaeArguments) -> Job:
    """Load the images, make the encoder and its trainer. Raises `InputError` for anything that does not fit."""
    sources = symmetric_sources(config, data_arguments)
    trainer = VaeTrainer(_encoder(config, arguments, sources), args=config, **common_parts(sources, data_arguments))
    return Job(trainer, sources.train, sources.test)


def build_bigan(config: BiGanConfig, data_arguments: DataArguments, arguments: BiGanArguments) -> Job:
    """Load the images, make both networks and their trainer. Raises `InputError` for anything that does not fit."""
    sources = symmetric_sources(config, data_arguments)
    encoder = _encoder(config, arguments, sources)
    check_encoder(encoder, ENCODER_FIELDS, "bigan_encoder", sources.preprocessing)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(student_seed(config.seed, 1))
        generator = HfkdBiganGeneratorModel(HfkdBiganGeneratorConfig.mirror(encoder.config, arguments.latent_size))
    check_generator(generator, sources.preprocessing)
    generator.start_at(_mean_image(sources.train))
    trainer = BiGanTrainer(encoder, generator, args=config, **common_parts(sources, data_arguments))
    return Job(trainer, sources.train, sources.test)


def symmetric_sources(config: DistillationConfig, arguments: DataArguments) -> ImageSources:
    """Images in [-1, 1], as they are: neither paper augments them. Labels are not needed, and not looked at."""
    normalization, augmentation = arguments.normalization or "symmetric", arguments.augmentation or "none"
    arguments = replace(arguments, normalization=normalization, augmentation=augmentation)
    seed = config.seed if config.data_seed is None else config.data_seed
    return build_sources(load_image_datasets(arguments, require_labels=False), arguments, seed=seed)


def _encoder(
    config: DistillationConfig, arguments: VaeArguments | BiGanArguments, sources: ImageSources
) -> PreTrainedModel:
    return build_backbone(arguments.encoder, config.seed, sources.preprocessing, arguments.trust_remote_code)


def build_backbone(
    name: str,
    seed: int,
    preprocessing: Preprocessing,
    trust_remote_code: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """The base model of a preset with fresh weights, or of a checkpoint, for such images; see `build_student`."""
    classifier = build_student(
        name,
        class_names=("0", "1"),  # of a head that is left out
        image_size=preprocessing.image_size,
        num_channels=preprocessing.num_channels,
        seed=student_seed(seed, 0),
        trust_remote_code=trust_remote_code,
        settings=settings,
    )
    encoder = classifier.base_model
    encoder.config.id2label = None
    encoder.config.num_labels = 2  # the default, with its names, which are not saved
    return encoder


def common_parts(sources: ImageSources, arguments: DataArguments) -> dict[str, Any]:
    return {
        "train_dataset": sources.train,
        "eval_dataset": sources.validation,
        "processing_class": sources.preprocessing.to_image_processor(),
        "dataset_name": arguments.dataset_name,
    }


def _mean_image(source: ImageSource) -> Tensor:
    """(C, H, W), of the first training images without augmentation."""
    plain = source.variant(augmentation=Augmentation())
    keys = [(0, row) for row in range(min(MEAN_IMAGE_OF, len(plain)))]
    return plain.materialise(collate(plain.__getitems__(keys)))["pixel_values"].mean(dim=0)
