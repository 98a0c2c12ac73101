"""A student and its teachers as options of the command, and the trainer of offline distillation that they make."""

from dataclasses import dataclass, field

from hfkd.data import DataArguments
from hfkd.errors import InputError
from hfkd.trainers.distillation import OfflineDistillationConfig, OfflineDistillationTrainer

from .cohort import CohortParts, StudentsArguments
from .job import Job
from .teachers import load_teacher, teacher_processor


@dataclass
class OfflineDistillationArguments:
    """Which student learns, and from which teachers."""

    student: str = field(
        default="resnet20", metadata={"help": "Preset such as resnet20 or wrn_16_2, folder, or Hub id."}
    )
    teachers: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Folders or Hub ids of trained classifiers, such as hfkd train supervised leaves; their classes "
            "are matched with the data's by name."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Let the repositories of the networks named here run their own code."}
    )


def build(
    config: OfflineDistillationConfig, data_arguments: DataArguments, arguments: OfflineDistillationArguments
) -> Job:
    """Load data and teachers, make student and trainer. Raises `InputError` for anything that does not fit."""
    if not arguments.teachers:
        raise InputError("no teacher: give --teachers FOLDER_OR_HUB_ID (hfkd train supervised trains one)")
    students = StudentsArguments([arguments.student], arguments.trust_remote_code)
    parts = CohortParts.load(config, data_arguments, students)
    class_names = parts.networks["class_names"]
    trainer = OfflineDistillationTrainer(
        parts.students[0],
        [load_teacher(name, class_names, arguments.trust_remote_code) for name in arguments.teachers],
        teacher_processing_classes=[
            teacher_processor(name, arguments.trust_remote_code) for name in arguments.teachers
        ],
        **parts.common,
    )
    return parts.job(trainer)
