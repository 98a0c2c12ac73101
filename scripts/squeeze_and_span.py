"""Student and frozen generator as options of the command, and the trainer of Squeeze-and-Span that they make."""

from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel

from hfkd.data import DataArguments, ImageSources, build_sources, load_image_datasets
from hfkd.errors import InputError
from hfkd.models import STUDENT_PRESETS, HfkdResNetConfig
from hfkd.trainers.self_supervised_config import SelfSupervisedConfig
from hfkd.trainers.squeeze_and_span import SqueezeAndSpanConfig, SqueezeAndSpanTrainer

from .encoders import build_backbone, common_parts
from .generators import load_generator
from .job import Job


@dataclass
class SelfSupervisedArguments:
    """Which student learns, and from which generator. Images are augmented by `ssl` unless asked otherwise."""

    generator: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a generator, such as hfkd train gan, hfkd train generator-from-classifier or "
            "hfkd convert stylegan2-ada leaves; none where synthetic_share is 0."
        },
    )
    student: str = field(
        default="resnet18_cifar",
        metadata={"help": "Preset (resnet8 to resnet110, resnet18_cifar, resnet18, resnet50, ...), folder or Hub id."},
    )
    zero_init_residual: bool | None = field(
        default=None,
        metadata={"help": "Fresh residual blocks pass their input on (code: yes); by default where a preset can."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Let the student's and the generator's repositories run their own code."}
    )

    def settings(self) -> dict[str, Any]:
        """The fields of the student's configuration that go over its preset's."""
        preset = STUDENT_PRESETS.get(self.student)
        can = preset is not None and preset.model_class.config_class is HfkdResNetConfig
        if self.zero_init_residual is None:
            return {"zero_init_residual": True} if can else {}
        return {"zero_init_residual": self.zero_init_residual}


@dataclass
class SelfSupervisedParts:
    """What all methods of the family are built of, for the command."""

    sources: ImageSources
    student: PreTrainedModel
    generator: PreTrainedModel | None
    common: dict[str, Any]

    @classmethod
    def load(
        cls, config: SelfSupervisedConfig, data_arguments: DataArguments, arguments: SelfSupervisedArguments
    ) -> "SelfSupervisedParts":
        """Images, student and generator. Raises `InputError` for anything that does not fit."""
        if config.synthetic_share and arguments.generator is None:
            raise InputError(
                f"synthetic_share={config.synthetic_share:g} needs a generator: give --generator FOLDER_OR_HUB_ID "
                "(hfkd train gan trains one)"
            )
        generator = None
        if arguments.generator is not None:
            generator, _ = load_generator(arguments.generator, trust_remote_code=arguments.trust_remote_code)
            generator.config._name_or_path = arguments.generator  # what the card calls it
        sources = _sources(config, data_arguments)
        student = build_backbone(
            arguments.student,
            config.seed,
            sources.preprocessing,
            arguments.trust_remote_code,
            arguments.settings(),
        )
        common = common_parts(sources, data_arguments) | {"augmentation": sources.train.augmentation}
        return cls(sources, student, generator, common)

    def job(self, trainer: Any) -> Job:
        """Real images are training images unless all samples are synthetic."""
        train = None if trainer.args.synthetic_share == 1 else self.sources.train
        return Job(trainer, train, self.sources.test)


def build(config: SqueezeAndSpanConfig, data_arguments: DataArguments, arguments: SelfSupervisedArguments) -> Job:
    """Load images and generator, make student and trainer. Raises `InputError` for anything that does not fit."""
    parts = SelfSupervisedParts.load(config, data_arguments, arguments)
    return parts.job(SqueezeAndSpanTrainer(parts.student, parts.generator, config, **parts.common))


def _sources(config: SelfSupervisedConfig, arguments: DataArguments) -> ImageSources:
    """Two views of each real image; labels, where there are some, are for evaluation alone."""
    arguments = replace(arguments, augmentation=arguments.augmentation or "ssl")
    seed = config.seed if config.data_seed is None else config.data_seed
    return build_sources(load_image_datasets(arguments, require_labels=False), arguments, seed=seed)
