"""The networks of a GAN, as options of the command, and the trainer that they make with images."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModel, PreTrainedModel

from hfkd.data import DataArguments, Preprocessing
from hfkd.errors import InputError
from hfkd.evaluation.judges import ClassifierJudge
from hfkd.models import (
    HfkdDcganDiscriminatorConfig,
    HfkdDcganDiscriminatorModel,
    HfkdDcganGeneratorConfig,
    HfkdDcganGeneratorModel,
)
from hfkd.models.configuration_stylegan2_discriminator import HfkdStyleGan2DiscriminatorConfig
from hfkd.models.configuration_stylegan2_generator import HfkdStyleGan2GeneratorConfig
from hfkd.models.modeling_stylegan2_discriminator import HfkdStyleGan2DiscriminatorModel
from hfkd.models.modeling_stylegan2_generator import HfkdStyleGan2GeneratorModel
from hfkd.models.probing import one_line
from hfkd.trainers.config import check_range
from hfkd.trainers.gan import DISCRIMINATOR, GanConfig, GanTrainer

from .checkpoint import fetch
from .cohort import student_seed
from .encoders import common_parts, symmetric_sources
from .evaluate_generation import load_classifier
from .generators import load_generator
from .job import Job


@dataclass
class GanArguments:
    """Which networks play against each other, and who judges what is generated."""

    generator: str = field(
        default="dcgan",
        metadata={
            "help": "Family of fresh weights (dcgan, or stylegan2 as for CIFAR-10), or a folder or Hub id of a "
            "generator to go on with."
        },
    )
    discriminator: str | None = field(
        default=None,
        metadata={"help": "The same for the discriminator; by default of the generator's family, or its folder's."},
    )
    width: int | None = field(
        default=None,
        metadata={
            "help": "Of fresh networks: channels of DCGAN's maps next to the image (64), most channels of StyleGAN2's "
            "maps (512)."
        },
    )
    latent_size: int | None = field(
        default=None, metadata={"help": "Latents of a fresh generator (DCGAN: 100, StyleGAN2: 512)."}
    )
    discriminator_norm: str | None = field(
        default=None, metadata={"help": "Of a fresh DCGAN discriminator: spectral (default), none or batch."}
    )
    judge: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a classifier of such images: evaluations then tell the Fréchet distance in "
            "its features, and what it takes generated images for."
        },
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Let repositories run their own code."})

    def __post_init__(self) -> None:
        for name in ("width", "latent_size"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 1)


def build(config: GanConfig, data_arguments: DataArguments, arguments: GanArguments) -> Job:
    """Load the images, make both networks and their trainer. Raises `InputError` for anything that does not fit."""
    sources = symmetric_sources(config, data_arguments)
    generator, discriminator = _networks(config, arguments, sources.preprocessing)
    trainer = GanTrainer(
        generator,
        discriminator,
        args=config,
        judge=_judge(config, arguments),
        **common_parts(sources, data_arguments),
    )
    return Job(trainer, sources.train, sources.test)


@dataclass(frozen=True)
class Fresh:
    """How a network of fresh weights is made: its configuration and model, and what an option sets in the former."""

    configuration: Callable[..., Any]
    model: Any
    options: Mapping[str, str]

    def build(self, arguments: GanArguments, images: Preprocessing, seed: int) -> Any:
        """For the images; what an option leaves open is the family's own. Raises `InputError` for unfit sizes."""
        chosen: dict[str, Any] = {"image_size": images.image_size, "num_channels": images.num_channels}
        asked = {name: getattr(arguments, option) for option, name in self.options.items()}
        try:
            made = self.configuration(**chosen, **{name: value for name, value in asked.items() if value is not None})
        except ValueError as error:
            raise InputError(f"{self.model.__name__}: {one_line(error)}") from error
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.model(made)


# Generator and discriminator of each family.
FAMILIES = {
    "dcgan": (
        Fresh(
            HfkdDcganGeneratorConfig,
            HfkdDcganGeneratorModel,
            {"width": "width", "latent_size": "latent_size"},
        ),
        Fresh(
            HfkdDcganDiscriminatorConfig,
            HfkdDcganDiscriminatorModel,
            {"width": "width", "discriminator_norm": "norm"},
        ),
    ),
    "stylegan2": (
        Fresh(
            HfkdStyleGan2GeneratorConfig.cifar,
            HfkdStyleGan2GeneratorModel,
            {"width": "channel_max", "latent_size": "latent_size"},
        ),
        Fresh(HfkdStyleGan2DiscriminatorConfig.cifar, HfkdStyleGan2DiscriminatorModel, {"width": "channel_max"}),
    ),
}


def _networks(config: GanConfig, arguments: GanArguments, images: Preprocessing) -> tuple[Any, Any]:
    """Generator and discriminator, each fresh or loaded. Raises `InputError` for an option that changes neither."""
    names = arguments.generator, arguments.discriminator or arguments.generator
    fresh = [FAMILIES[name][role] if name in FAMILIES else None for role, name in enumerate(names)]
    known = {option for network in fresh if network is not None for option in network.options}
    for option in ("width", "latent_size", "discriminator_norm"):
        if getattr(arguments, option) is not None and option not in known:
            raise InputError(
                f"{option}={getattr(arguments, option)} has no effect on generator {names[0]!r} and discriminator "
                f"{names[1]!r}: leave it out"
            )
    seeds = [student_seed(config.seed, role) for role in range(2)]
    if fresh[0] is not None:
        generator = fresh[0].build(arguments, images, seeds[0])
    else:
        generator, _ = load_generator(names[0], trust_remote_code=arguments.trust_remote_code)
    if fresh[1] is not None:
        return generator, fresh[1].build(arguments, images, seeds[1])
    return generator, _load_discriminator(names[1], arguments.trust_remote_code)


def _load_discriminator(name: str, trust_remote_code: bool) -> PreTrainedModel:
    """That of a folder or Hub repo: in its folder `discriminator`, or at its root."""
    folder = fetch(name)
    inside = folder / DISCRIMINATOR
    folder = inside if (inside / "config.json").is_file() else folder
    try:
        model, info = AutoModel.from_pretrained(
            folder, trust_remote_code=trust_remote_code, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise InputError(f"discriminator {name!r} cannot be loaded: {one_line(error)}") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise InputError(f"discriminator {name!r} lacks weights: {missing}: give a whole checkpoint")
    return model


def _judge(config: GanConfig, arguments: GanArguments) -> ClassifierJudge | None:
    found = load_classifier(arguments.judge, arguments.trust_remote_code)
    if found is None:
        return None
    return ClassifierJudge(found.students[0].to(config.device), found.preprocessing)
