"""A network with the classifier that a linear probe has fitted, saved as one folder with its card."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import AutoImageProcessor

from hfkd.data import ImageDatasets
from hfkd.errors import InputError
from hfkd.evaluation.frozen_features import has_classifier
from hfkd.hub.hardware import environment_report
from hfkd.hub.manifest import atomic_folder
from hfkd.hub.remote_code import write_code
from hfkd.model_cards import CardData, DataUsed, Method, Parent, Student, measurements_of, write_card
from hfkd.models import HfkdGradientFeaturesConfig
from hfkd.models.heads import put_linear_head
from hfkd.trainers.checkpointing import check_output_dir

from .checkpoint import Cohort
from .probes import Probed


LINEAR_PROBE = Method(
    name="Linear probe",
    paper_title="Understanding intermediate layers using linear classifier probes",
    arxiv_id="1610.01644",
    citation=(
        "@article{alain2016probes,\n"
        "  title   = {Understanding intermediate layers using linear classifier probes},\n"
        "  author  = {Alain, Guillaume and Bengio, Yoshua},\n"
        "  journal = {arXiv preprint arXiv:1610.01644},\n"
        "  year    = {2016}\n"
        "}"
    ),
    tags=("hfkd", "linear-probe"),
    template="linear_probe.md",
)


def check_can_be_saved(cohort: Cohort, output_dir: str) -> None:
    """Raise InputError unless the network takes a linear head and the folder is free to write it to."""
    student: Any = cohort.students[0]
    reason = None
    if len(cohort.students) > 1:
        reason = f"the checkpoint has {len(cohort.students)} students: give the folder of one, such as its student_1"
    elif not has_classifier(student):
        reason = f"{type(student).__name__} has no place for a classifier: leave output_dir out"
    elif student.config.model_type == HfkdGradientFeaturesConfig.model_type:
        reason = "a gradient-features classifier has one on more than these features: give its base network"
    elif Path(output_dir).exists() and not Path(output_dir).is_dir() or any(Path(output_dir).glob("*")):
        reason = "it exists and is not an empty folder: choose another"
    if reason is not None:
        raise InputError(f"output_dir={output_dir}: {reason}")
    check_output_dir(output_dir)


def save_probed(cohort: Cohort, name: str, probed: Probed, data: ImageDatasets, output_dir: str) -> None:
    """Write the one student of `cohort` with its fitted head, its processor, its code and a card.

    Args:
        cohort: what was probed; its student gets the head.
        name: of the checkpoint, as the user gave it.
        probed: of this student.
        data: that the head was fitted to.
        output_dir: a folder that is empty or not there yet.
    """
    (student,), (head,) = cohort.students, probed.heads
    student.to("cpu")
    put_linear_head(student, head.weight, head.bias, data.columns.class_names or ())
    processor: Any = AutoImageProcessor.from_pretrained(cohort.folder)
    with atomic_folder(Path(output_dir)) as folder:
        student.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_code([student], folder)
        write_card(_card(cohort, name, probed, data, output_dir), folder)


def _card(cohort: Cohort, name: str, probed: Probed, data: ImageDatasets, location: str) -> CardData:
    accuracy = {"accuracy": probed.metrics["student_0_accuracy"]}
    own_card = cohort.folder / "README.md"
    sizes = {"train": len(data.train), "test": len(data.test or ())}
    return CardData(
        method=LINEAR_PROBE,
        location=location,
        students=(Student.of(cohort.students[0]),),
        parents=(Parent.of("backbone", name),),
        data=DataUsed.of(data.name, sizes),
        license=ModelCard.load(own_card).data.license if own_card.is_file() else None,
        measurements=measurements_of(accuracy, "test"),
        hyperparameters=probed.settings,
        settings_title="Settings of the probe",
        environment=environment_report(),
    )
