"""What a model card is made of. A trainer fills a `CardData`; `card.py` renders it."""

import dataclasses
import enum
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hfkd.evaluation.teacher_report import TeacherReport
from hfkd.hub.manifest import file_sha256
from hfkd.hub.publish import is_repo_id
from hfkd.models import code_files
from hfkd.models.backbone import feature_attribute


_METRIC_KEY = re.compile(
    r"(?:eval_|test_)?(student_\d+|mean|ensemble_prob|gated_ensemble|peer_ensemble|ensemble|fused)_(\w+)"
)
_SUBJECTS = {
    "mean": "Mean of the students",
    "ensemble": "Ensemble (mean of logits)",
    "ensemble_prob": "Ensemble (mean of probabilities)",
    "gated_ensemble": "Ensemble by the gate",
    "peer_ensemble": "Peer ensemble",
    "fused": "Fused classifier",
}
# Name in the trainer's metrics -> metric id in the model-index, and its name in tables.
_METRICS = {
    "accuracy": ("accuracy", "Accuracy"),
    "top5": ("top_5_accuracy", "Top-5 accuracy"),
    "mean_average_precision": ("mean_average_precision", "Mean average precision"),
}
# Those of a method with one classifier.
_SINGLE_METRICS = {
    "accuracy": _METRICS["accuracy"],
    "top5_accuracy": _METRICS["top5"],
    "mean_average_precision": _METRICS["mean_average_precision"],
    "mean_average_precision_11_point": ("mean_average_precision", "Mean average precision (11 points)"),
    "knn_accuracy": ("knn_accuracy", "Accuracy of 200 nearest neighbours"),
    "representation_rank": ("representation_rank", "Effective rank of the representations"),
    "min_margin": ("min_margin", "Smallest margin"),
    "median_margin": ("median_margin", "Median margin"),
    "sqrt_stationarity": ("sqrt_stationarity", "Part of the classifier's weights left unexplained (sqrt of L_st)"),
    "duality": ("duality", "Duality loss"),
    "self_accuracy": ("self_accuracy", "Agreement of the classifier with the labels"),
    "frechet_distance": ("frechet_distance", "Fréchet distance in the judge's features"),
    "judge_confidence": ("judge_confidence", "Mean confidence of the judge"),
    "smallest_judge_share": ("smallest_judge_share", "Share of the judge's rarest class"),
}
# Those of networks that work together, and are measured together.
_JOINT_METRICS = {
    "reconstruction_error": ("mse", "Mean squared reconstruction error (pixels in [-1, 1])"),
    "elbo": ("elbo", "Evidence lower bound (nats per image)"),
}
# Of the ids above, those of the Hub's own list, https://hf.co/metrics; the others stand in the model-index alone.
HUB_METRICS = frozenset({"accuracy", "mse"})
# Settings that say where a run lies or who ran it, not what it computes.
_NOT_HYPERPARAMETERS = re.compile(
    r".*token.*|.*_dir|hub_.*|push_to_hub.*|run_name|report_to|resume_from_checkpoint|disable_tqdm|do_\w+"
)


@dataclass(frozen=True)
class Method:
    """The facts of a method, as its trainer class states them. `template` is a file of this folder.

    `arxiv_id` is empty for a paper that is not there, which has a `paper_url` instead.
    """

    name: str
    paper_title: str
    arxiv_id: str
    citation: str
    tags: tuple[str, ...]
    template: str
    task: str = "image-classification"
    paper_url: str = ""

    @classmethod
    def of(cls, trainer: Any) -> "Method":
        """From a trainer or its class: `_name`, `_paper` (title, id, citation), `_tag_names`, `_template_file`.

        A `_paper` without an arXiv id has a `url`.

        `_task`, where there is one, is the Hub's name of what student 0 does.
        """
        paper = trainer._paper
        tags = tuple(trainer._tag_names)
        facts = (trainer._name, paper["title"], paper["id"], paper["citation"], tags, trainer._template_file)
        return cls(*facts, task=getattr(trainer, "_task", cls.task), paper_url=paper.get("url", ""))

    @property
    def link(self) -> str:
        """Where the paper can be read."""
        return self.paper_url or f"https://arxiv.org/abs/{self.arxiv_id}"


@dataclass(frozen=True)
class Student:
    """One saved network: what it is, its number of parameters, whether it brings code, and where it lies.

    `folder` is None in a cohort, whose first student lies at the root and its peers in `student_1`, ...; `features`
    is what to read of the outputs of an encoder.
    """

    description: str
    parameters: int
    custom_code: bool
    folder: str | None = None
    features: str = "pooler_output"

    @classmethod
    def of(cls, model: PreTrainedModel, name: str | None = None, folder: str | None = None) -> "Student":
        """From a model; `name` is what the user called it, a preset for example."""
        kind = type(model).__name__
        description = f"{name} ({kind})" if name else kind
        features = feature_attribute(model)
        return cls(description, model.num_parameters(), bool(code_files(model)), folder, features)


@dataclass(frozen=True)
class Parent:
    """A network that this one comes from: a teacher, a starting point. Either on the Hub, or known by its weights."""

    role: str
    name: str
    hub_id: str | None = None
    weights_sha256: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, role: str, name_or_path: str | Path) -> "Parent":
        """From what was given to `from_pretrained`. A local path is cut to its last part, its weights are hashed."""
        hub_id = hub_id_or_none(str(name_or_path))
        path = Path(name_or_path)
        weights = {file.name: file_sha256(file) for file in sorted(path.glob("*.safetensors"))} if not hub_id else {}
        return cls(role, hub_id or path.resolve().name, hub_id, weights)


@dataclass(frozen=True)
class DataUsed:
    """The dataset: its name, its Hub id if it has one, and the number of images of each split."""

    name: str
    hub_id: str | None = None
    splits: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, name_or_path: str, splits: Mapping[str, int]) -> "DataUsed":
        """From `--dataset_name`: a Hub id, embedded data, or a local path, which is cut to its last part."""
        hub_id = hub_id_or_none(name_or_path)
        return cls(hub_id or Path(name_or_path).resolve().name, hub_id, splits)


@dataclass(frozen=True)
class Measurement:
    """One number: who reached it, by which metric (`metric_id` for the model-index, `metric` for people), where."""

    subject: str
    metric_id: str
    metric: str
    value: float
    split: str


@dataclass(frozen=True)
class Picture:
    """A PNG that lies beside the card."""

    file: str
    caption: str


@dataclass(frozen=True)
class CardData:
    """Everything that a card tells. Only what is given is told.

    Attributes:
        method: the method's facts.
        location: how a user names the model: its repo id or, for a local result, the folder as the user gave it.
        revision: the repo's branch, where it is not the main one.
        students: the saved networks, student 0 first.
        parents: teachers and starting points.
        data: what it was trained and measured on.
        license: a licence identifier of the Hub.
        measurements: the numbers, in the order of the table.
        teacher_report: students against their teachers, where there are any.
        hyperparameters: settings that differ from the defaults, see `changed_settings`.
        settings_title: what the table of them is called.
        log_history: `trainer.state.log_history`, from which `write_card` draws the curves.
        pictures: further pictures, already saved beside the card.
        environment: what `hfkd.hub.hardware.environment_report` returns.
        wall_time_s: training time in seconds.
        command: the line that repeats the run.
    """

    method: Method
    location: str
    students: tuple[Student, ...]
    parents: tuple[Parent, ...] = ()
    data: DataUsed | None = None
    license: str | None = None
    measurements: tuple[Measurement, ...] = ()
    teacher_report: TeacherReport | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    settings_title: str = "Settings that differ from the defaults"
    log_history: tuple[Mapping[str, Any], ...] = ()
    pictures: tuple[Picture, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    wall_time_s: float | None = None
    command: str | None = None
    revision: str | None = None

    @property
    def has_discriminator(self) -> bool:
        """Whether the generator at the root comes with the discriminator that it was trained against."""
        return any(student.folder == "discriminator" for student in self.students)


def hub_id_or_none(name: str) -> str | None:
    """`name` if it is a NAMESPACE/NAME of the Hub and no local path; None otherwise."""
    return name if name.count("/") == 1 and is_repo_id(name) and not Path(name).exists() else None


def measurements_of(metrics: Mapping[str, Any], split: str) -> tuple[Measurement, ...]:
    """The scores among a trainer's metrics (`eval_student_0_accuracy`, `eval_ensemble_top5`, ...).

    Losses, run times and numbers that are not finite (the Hub refuses those) are left out.
    """
    found = []
    for key, value in metrics.items():
        name = key.removeprefix("eval_").removeprefix("test_")
        if not math.isfinite(value):
            continue
        if joint := _JOINT_METRICS.get(name):
            found.append(Measurement("All networks", *joint, float(value), split))
        if single := _SINGLE_METRICS.get(name):
            found.append(Measurement("Model", *single, float(value), split))
        match = _METRIC_KEY.fullmatch(key)
        if match is None or match[2] not in _METRICS:
            continue
        subject = _SUBJECTS.get(match[1]) or f"Student {match[1].removeprefix('student_')}"
        found.append(Measurement(subject, *_METRICS[match[2]], float(value), split))
    return tuple(found)


def changed_settings(args: Any) -> dict[str, Any]:
    """Plain fields of a config dataclass that differ from their defaults, without tokens, paths and Hub settings."""
    changed = {}
    for item in dataclasses.fields(args):
        default = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
        value, default = (x.value if isinstance(x, enum.Enum) else x for x in (getattr(args, item.name), default))
        # TrainingArguments turns some of its None into False or [] by itself.
        same = value == default or not (value or default)
        plain = isinstance(value, str | int | float | list | tuple) or value is None
        if plain and not same and not _NOT_HYPERPARAMETERS.fullmatch(item.name):
            changed[item.name] = value
    return changed
