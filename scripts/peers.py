"""The methods that AFD is compared with, as the command makes them of students and data."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hfkd.data import DataArguments
from hfkd.trainers.ffl import FflTrainer
from hfkd.trainers.kdcl import KdclTrainer
from hfkd.trainers.mutual_learning import MutualLearningTrainer
from hfkd.trainers.one import OneTrainer
from hfkd.trainers.pcl import PclTrainer
from hfkd.trainers.supervised import SupervisedTrainer

from .cohort import CohortParts, StudentsArguments
from .job import Job


@dataclass
class SupervisedArguments(StudentsArguments):
    """Which students learn; several do not know of each other."""

    students: list[str] = field(
        default_factory=lambda: ["resnet8"],
        metadata={"help": "Presets such as resnet20 or wrn_16_2, folders, or Hub ids."},
    )


def _builder(trainer: Callable[..., Any]) -> Callable[[Any, DataArguments, StudentsArguments], Job]:
    """Load the data, make the students and their trainer. Raises `InputError` for anything that does not fit."""

    def build(config: Any, data_arguments: DataArguments, arguments: StudentsArguments) -> Job:
        parts = CohortParts.load(config, data_arguments, arguments)
        return parts.job(trainer(parts.students, **parts.common))

    return build


build_supervised = _builder(SupervisedTrainer)
build_mutual_learning = _builder(MutualLearningTrainer)
build_kdcl = _builder(KdclTrainer)
build_one = _builder(OneTrainer)
build_pcl = _builder(PclTrainer)
build_ffl = _builder(FflTrainer)
