"""Students that learn from the same images, as options of the command, and what data and options make of them."""

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from hfkd.data import DataArguments, ImageSources, build_sources, load_image_datasets
from hfkd.models import build_student
from hfkd.trainers.cohort import CohortConfig, CohortTrainer
from hfkd.trainers.online_adversarial import OnlineAdversarialConfig, OnlineAdversarialTrainer

from .job import Job
from .teachers import load_teacher, teacher_processor


@dataclass
class StudentsArguments:
    """Which students learn together."""

    students: list[str] = field(
        default_factory=lambda: ["resnet8", "resnet8"],
        metadata={"help": "Presets such as resnet20 or wrn_16_2, folders, or Hub ids, in the order of their numbers."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Let the repositories of the networks named here run their own code."}
    )


@dataclass
class CohortArguments(StudentsArguments):
    """Which students learn together, and whether a frozen teacher replaces their peers."""

    teacher: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of a trained classifier that teaches all students (offline)."},
    )


def student_seed(seed: int, student: int) -> int:
    """Seed of a student's fresh weights: no two students share one, within a run or between the seeds of a study."""
    return 1000 * seed + student


@dataclass
class CohortParts:
    """What every trainer of a cohort is made of.

    `networks` is what `build_student` needs of the data, `common` what the trainer gets besides the students.
    """

    students: list[PreTrainedModel]
    sources: ImageSources
    networks: dict[str, Any]
    common: dict[str, Any]

    @classmethod
    def load(cls, config: CohortConfig, data_arguments: DataArguments, arguments: StudentsArguments) -> "CohortParts":
        """Load the data and make the students. Raises `InputError` for anything that does not fit."""
        data = load_image_datasets(data_arguments)
        seed = config.seed if config.data_seed is None else config.data_seed
        sources = build_sources(data, data_arguments, seed=seed)
        preprocessing = sources.preprocessing
        networks: dict[str, Any] = {
            "class_names": data.columns.class_names or (),
            "image_size": preprocessing.image_size,
            "num_channels": preprocessing.num_channels,
            "trust_remote_code": arguments.trust_remote_code,
        }
        students = [
            build_student(name, seed=student_seed(config.seed, number), **networks)
            for number, name in enumerate(arguments.students)
        ]
        common = {
            "args": config,
            "train_dataset": sources.train,
            "eval_dataset": sources.validation,
            "processing_class": preprocessing.to_image_processor(),
            "dataset_name": data_arguments.dataset_name,
        }
        return cls(students, sources, networks, common)

    def job(self, trainer: CohortTrainer) -> Job:
        return Job(trainer, self.sources.train, self.sources.test)


def build(config: OnlineAdversarialConfig, data_arguments: DataArguments, cohort: CohortArguments) -> Job:
    """AFD's trainer. Raises `InputError` for anything that does not fit."""
    parts = CohortParts.load(config, data_arguments, cohort)
    teaching: dict[str, Any] = {}
    if cohort.teacher is not None:
        class_names = parts.networks["class_names"]
        teaching["teacher"] = load_teacher(cohort.teacher, class_names, cohort.trust_remote_code)
        teaching["teacher_processing_class"] = teacher_processor(cohort.teacher, cohort.trust_remote_code)
    return parts.job(OnlineAdversarialTrainer(parts.students, **teaching, **parts.common))
