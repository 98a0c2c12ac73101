"""`hfkd evaluate CHECKPOINT`: each student of a saved cohort, and their ensemble, on test images; or a generator."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hfkd.data import DataArguments, ImageDatasets, ImageSource, load_image_datasets, make_source
from hfkd.errors import InputError
from hfkd.evaluation.classifier import classifier_metrics
from hfkd.evaluation.cohort import cohort_metrics
from hfkd.evaluation.frozen_features import has_classifier
from hfkd.evaluation.inference import outputs_over
from hfkd.evaluation.metrics import MeanAveragePrecision

from .checkpoint import Cohort, load_cohort
from .evaluate_generation import GenerationArguments, describe_generation, evaluate_generation
from .measured_data import check_classes, check_labelled_test, data_of_run
from .options import build, read_options
from .present import describe_accuracies
from .probed_checkpoint import check_can_be_saved, save_probed
from .probes import ProbeArguments, Probed, probe
from .results import write_atomically


@dataclass
class EvaluateArguments:
    """How a checkpoint is measured."""

    protocol: Literal["accuracy", "linear-probe", "knn", "generation"] = field(
        default="accuracy",
        metadata={
            "help": "accuracy of the students as they are; or of a probe on their frozen pooled features; generation: "
            "the images of a generator against real ones and noise."
        },
    )
    batch_size: int = field(default=256, metadata={"help": "Images per forward pass."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub checkpoint."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Let the checkpoint run its own Python code."})
    output: str | None = field(default=None, metadata={"help": "JSON file to write the result to."})

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch_size {self.batch_size} is too small: give at least 1")


KINDS = [EvaluateArguments, ProbeArguments, GenerationArguments, DataArguments]


def run(argv: list[str]) -> int:
    name = argv[0] if argv and not argv[0].startswith("-") else None
    values = read_options(KINDS, argv[1:] if name else argv, "hfkd evaluate CHECKPOINT")
    if name is None:
        raise InputError("hfkd evaluate needs a checkpoint first: hfkd evaluate FOLDER_OR_HUB_ID [--option value ...]")
    arguments, of_probe, of_generation = build([EvaluateArguments, ProbeArguments, GenerationArguments], values)
    of_probe.refuse_unused({item.name for item in fields(ProbeArguments)} & values.keys(), arguments.protocol)
    if arguments.protocol == "generation":
        result = evaluate_generation(
            name,
            values,
            of_generation,
            batch_size=arguments.batch_size,
            trust_remote_code=arguments.trust_remote_code,
            revision=arguments.revision,
        )
        text = describe_generation(result)
    else:
        result = _evaluate_cohort(name, values, arguments, of_probe)
        text = describe_accuracies(result["metrics"], result["n_test"])
    print(text)
    for setting, value in result["settings"].items():
        print(f"  {setting}: {value}")
    if arguments.output is not None:
        write_atomically(Path(arguments.output), json.dumps(result, indent=2) + "\n")
    return 0


def _evaluate_cohort(
    name: str, values: dict[str, Any], arguments: EvaluateArguments, of_probe: ProbeArguments
) -> dict[str, Any]:
    unused = sorted(field.name for field in fields(GenerationArguments) if field.name in values)
    if unused:
        raise InputError(f"--{unused[0]} is for --protocol generation, and --protocol is {arguments.protocol!r}")
    trust, revision = arguments.trust_remote_code, arguments.revision
    cohort = load_cohort(name, trust_remote_code=trust, revision=revision, headless=True)
    whole = has_classifier(cohort.students[0]) and not cohort.fresh_weights
    if not whole and arguments.protocol == "accuracy":
        raise InputError(
            f"checkpoint {name!r} was saved without a classifier: use --protocol linear-probe or --protocol knn"
        )
    if of_probe.output_dir is not None:
        check_can_be_saved(cohort, of_probe.output_dir)
    # Unless the user names data, the test images are those of the run.
    data_options = {} if "dataset_name" in values else data_of_run(cohort.folder)
    (data_arguments,) = build([DataArguments], {**data_options, **values})
    data = load_image_datasets(data_arguments)
    result, probed = evaluate(cohort, data, data_arguments, arguments, of_probe)
    if of_probe.output_dir is not None:
        save_probed(cohort, name, probed, data, of_probe.output_dir)
    return result


def evaluate(
    cohort: Cohort,
    data: ImageDatasets,
    data_arguments: DataArguments,
    arguments: EvaluateArguments,
    of_probe: ProbeArguments,
) -> tuple[dict[str, Any], Probed]:
    """Measure a cohort on the test images.

    Returns `metrics`, `n_test`, `protocol`, and the probe's `settings`; and what the probe found. Metrics are named as
    by `cohort_metrics`, and those of a single student as by `classifier_metrics`; probes give `student_<k>_accuracy`,
    several labels per image `student_<k>_mean_average_precision`.

    Raises:
        InputError: no labelled test images, or other classes than the students know.
    """
    test_images = check_labelled_test(data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for student in cohort.students:
        student.to(device)
    if arguments.protocol == "accuracy":
        mend = "evaluate on the data it was trained for, or use --protocol linear-probe"
        check_classes(cohort.students[0].config, data, "the checkpoint", mend)
        test = make_source(test_images, data.columns, cohort.preprocessing, name="test")
        found = Probed(_accuracies(cohort, test, device, arguments.batch_size), {}, [])
    else:
        found = probe(
            cohort,
            data,
            data_arguments,
            of_probe,
            protocol=arguments.protocol,
            batch_size=arguments.batch_size,
            device=device,
        )
    result = {"metrics": found.metrics, "n_test": len(test_images), "settings": found.settings}
    return {"protocol": arguments.protocol, **result}, found


def logits_over(
    cohort: Cohort, source: ImageSource, device: torch.device, batch_size: int = 256
) -> tuple[Tensor, Tensor]:
    """Logits (N, S, K) of the S students over the N images of a labelled source, and its labels."""

    def logits(pixel_values: Tensor) -> Tensor:
        return torch.stack([student(pixel_values).logits for student in cohort.students], dim=1)

    outputs, labels = outputs_over(source, logits, device, batch_size)
    assert labels is not None  # checked by the callers
    return outputs, labels


def _accuracies(cohort: Cohort, test: ImageSource, device: torch.device, batch_size: int) -> dict[str, float]:
    logits, labels = logits_over(cohort, test, device, batch_size)
    students = list(logits.unbind(dim=1))
    if len(students) == 1:
        return {name: value for name, value in classifier_metrics(students[0], labels).items() if name != "loss"}
    if labels.dim() == 1:
        return cohort_metrics(students, labels)
    return {
        f"student_{k}_{name}": value
        for k, scores in enumerate(students)
        for name, value in MeanAveragePrecision()
        .compute(predictions=scores.numpy(), references=labels.long().numpy())
        .items()
    }
