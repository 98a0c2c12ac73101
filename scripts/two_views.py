"""VICReg and SimSiam as the command makes them."""

from hfkd.data import DataArguments
from hfkd.trainers.simsiam import SimSiamConfig, SimSiamTrainer
from hfkd.trainers.vicreg import VicregConfig, VicregTrainer

from .job import Job
from .squeeze_and_span import SelfSupervisedArguments, SelfSupervisedParts


def build_vicreg(config: VicregConfig, data_arguments: DataArguments, arguments: SelfSupervisedArguments) -> Job:
    """Load images and any generator, make the trainer. Raises `InputError` for anything that does not fit."""
    parts = SelfSupervisedParts.load(config, data_arguments, arguments)
    return parts.job(VicregTrainer(parts.student, config, parts.generator, **parts.common))


def build_simsiam(config: SimSiamConfig, data_arguments: DataArguments, arguments: SelfSupervisedArguments) -> Job:
    """Load images and any generator, make the trainer. Raises `InputError` for anything that does not fit."""
    parts = SelfSupervisedParts.load(config, data_arguments, arguments)
    return parts.job(SimSiamTrainer(parts.student, config, parts.generator, **parts.common))
