"""The classifier that is trained to a maximum margin, as options of the command, and the trainer that data makes."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hfkd.data import DataArguments, build_sources, load_image_datasets
from hfkd.models import build_student
from hfkd.trainers.max_margin import MaxMarginConfig, MaxMarginTrainer

from .cohort import student_seed
from .job import Job


@dataclass
class MaxMarginArguments:
    """Which classifier learns. Images are not augmented."""

    classifier: str = field(
        default="mlp",
        metadata={
            "help": "Preset (mlp, mlp_bn with batch norm, mlp_small_first with a small first layer; resnet8, "
            "vae_encoder_8px, ...), folder or Hub id."
        },
    )
    hidden_sizes: list[int] = field(
        default_factory=list, metadata={"help": "Widths that go over the preset's, one a layer or stage."}
    )
    norm: Literal["batch", "group", "none"] | None = field(
        default=None, metadata={"help": "Norm that goes over the preset's."}
    )
    initial_scales: list[float] = field(
        default_factory=list, metadata={"help": "Factors on the initial weights of an mlp, one a layer."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Let the classifier's repository run its own code."}
    )

    def settings(self) -> dict[str, Any]:
        """The fields of the preset's configuration that were given."""
        given = {"hidden_sizes": self.hidden_sizes, "norm": self.norm, "initial_scales": self.initial_scales}
        return {name: value for name, value in given.items() if value}


def build(config: MaxMarginConfig, data_arguments: DataArguments, arguments: MaxMarginArguments) -> Job:
    """Load the data, make the classifier and its trainer. Raises `InputError` for anything that does not fit."""
    data_arguments = replace(data_arguments, augmentation=data_arguments.augmentation or "none")
    data = load_image_datasets(data_arguments)
    sources = build_sources(data, data_arguments)
    preprocessing = sources.preprocessing
    classifier = build_student(
        arguments.classifier,
        class_names=data.columns.class_names or (),
        image_size=preprocessing.image_size,
        num_channels=preprocessing.num_channels,
        seed=student_seed(config.seed, 0),
        trust_remote_code=arguments.trust_remote_code,
        settings=arguments.settings(),
    )
    trainer = MaxMarginTrainer(
        classifier,
        args=config,
        train_dataset=sources.train,
        eval_dataset=sources.validation,
        processing_class=preprocessing.to_image_processor(),
        dataset_name=data_arguments.dataset_name,
    )
    return Job(trainer, sources.train, sources.test)
