"""Probes of frozen features, as options of `hfkd evaluate`: nearest neighbours and linear classifiers."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from hfkd.data import (
    Augmentation,
    DataArguments,
    ImageDatasets,
    ImageSource,
    ResizedCrop,
    ViewAugmentation,
    augmentation_for,
    make_source,
)
from hfkd.errors import InputError
from hfkd.evaluation.cohort import accuracy
from hfkd.evaluation.frozen_features import Features, frozen_features
from hfkd.evaluation.inference import outputs_over
from hfkd.evaluation.knn import KNNSettings, check_features, knn_accuracy
from hfkd.evaluation.linear_probe import LinearHead, LinearProbeSettings, fit_linear_probe
from hfkd.evaluation.sgd_probe import SGDProbeSettings, fit_sgd_probe
from hfkd.trainers.config import check_choice

from .checkpoint import Cohort


@dataclass
class ProbeArguments:
    """How frozen features are measured, with --protocol knn or linear-probe."""

    probe: Literal["logistic", "sgd"] = field(
        default="logistic",
        metadata={
            "help": "linear-probe: logistic regression on the images as they are (fast, deterministic), or sgd, a "
            "linear layer trained on crops and flips (Squeeze and Span, section 5.1)."
        },
    )
    probe_optimizer: Literal["sgd", "lars"] = field(
        default="sgd", metadata={"help": "Of probe sgd; lars is what the paper's code has for STL-10."}
    )
    probe_learning_rate: float = field(
        default=30.0, metadata={"help": "Of probe sgd (paper: 30 at batch 256; code for STL-10: lars, 1.6 at 4096)."}
    )
    probe_batch_size: int = field(default=256, metadata={"help": "Images of a step of probe sgd (paper: 256)."})
    probe_epochs: int = field(default=90, metadata={"help": "Of probe sgd (paper: 90); cosine rate, by the epoch."})
    probe_augment: bool = field(
        default=True,
        metadata={
            "help": "probe sgd sees random resized crops (0.08, 1), and flips unless --horizontal_flip false or the "
            "pictures are of digits; false: the images as they are, whose features are made once."
        },
    )
    probe_seed: int = field(default=0, metadata={"help": "Of probe sgd: first weights, order, crops."})
    knn_neighbours: int = field(default=20, metadata={"help": "How many vote (Squeeze and Span's monitor: 200)."})
    knn_temperature: float = field(
        default=0.07, metadata={"help": "A vote weighs exp(cosine / this) (Squeeze and Span's monitor: 0.1)."}
    )
    features: Features = field(
        default="last",
        metadata={"help": "last: what a classifier would read; blocks: those of all blocks of a discriminator."},
    )
    bf16: bool = field(default=False, metadata={"help": "Make the features under bf16 autocast."})
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "linear-probe: empty or new folder for the network with its fitted classifier, which "
            "AutoModelForImageClassification loads."
        },
    )

    def __post_init__(self) -> None:
        check_choice("probe", self.probe, ("logistic", "sgd"))
        check_choice("features", self.features, ("last", "blocks"))
        self.knn = KNNSettings(self.knn_neighbours, self.knn_temperature)
        self.sgd = SGDProbeSettings(
            self.probe_optimizer, self.probe_learning_rate, self.probe_batch_size, self.probe_epochs, self.probe_seed
        )

    def refuse_unused(self, names: set[str], protocol: str) -> None:
        """Raise InputError for an option that was named, though the protocol or the probe does not look at it."""
        for name in sorted(names):
            if protocol == "linear-probe" and name.startswith("probe_") and self.probe != "sgd":
                raise InputError(f"--{name} is for --probe sgd, and --probe is {self.probe!r}")
            wanted = "knn" if name.startswith("knn_") else "linear-probe"
            shared = name in ("features", "bf16") and protocol in ("knn", "linear-probe")
            if protocol != wanted and not shared:
                raise InputError(f"--{name} is for --protocol {wanted}, and --protocol is {protocol!r}")


@dataclass
class Probed:
    """What probes of a cohort give: metrics, the settings for the record, and the fitted heads (none of kNN)."""

    metrics: dict[str, float]
    settings: dict[str, Any]
    heads: list[LinearHead]


def probe(
    cohort: Cohort,
    data: ImageDatasets,
    data_arguments: DataArguments,
    arguments: ProbeArguments,
    *,
    protocol: str,
    batch_size: int,
    device: torch.device,
) -> Probed:
    """Measure every student, which is on `device`, on the test images.

    Raises:
        InputError: several labels for each image, or features that cannot be probed.
    """
    if data.columns.multi_label:
        raise InputError(f"protocol {protocol!r} needs one label per image, and {data.name!r} has several")
    classes = len(data.columns.class_names or ())
    train, test = _sources(cohort, data, data_arguments, arguments, protocol)
    found = Probed({}, {}, [])
    for number, student in enumerate(cohort.students):
        features, name = frozen_features(student, arguments.features, arguments.bf16), f"student_{number}"
        if protocol == "linear-probe" and arguments.probe == "sgd":
            fitted = fit_sgd_probe(features, train, test, classes, arguments.sgd, device)
            found.metrics |= {f"{name}_accuracy": fitted.accuracy, f"{name}_best_accuracy": fitted.best_accuracy}
            found.settings = {"probe": "sgd", **asdict(arguments.sgd), "augmentation": _described(train.augmentation)}
            found.heads.append(fitted.head)
            continue
        known = _features_of(features, train, test, device, batch_size)
        if protocol == "knn":
            found.metrics[f"{name}_accuracy"], found.settings = knn_accuracy(*known, arguments.knn)
        else:
            head = fit_linear_probe(*known[:2], classes)
            found.metrics[f"{name}_accuracy"] = accuracy(head.logits(known[2]), known[3])
            found.settings = {"probe": "logistic", **asdict(LinearProbeSettings())}
            found.heads.append(head)
    found.settings |= {name: getattr(arguments, name) for name in ("features", "bf16")}
    found.settings["training images"] = len(data.train)
    return found


def _sources(
    cohort: Cohort, data: ImageDatasets, data_arguments: DataArguments, arguments: ProbeArguments, protocol: str
) -> tuple[ImageSource, ImageSource]:
    """Training images, under the crops and flips of the paper's probe where they are asked for; and test images."""
    preprocessing = cohort.preprocessing
    settings: dict[str, Any] = {}
    if protocol == "linear-probe" and arguments.probe == "sgd" and arguments.probe_augment:
        asked = replace(data_arguments, augmentation="ssl")
        views = augmentation_for(asked, data.name, preprocessing.image_size)
        assert isinstance(views, ViewAugmentation)  # as asked
        views = replace(views, jitter_probability=0.0, grey_probability=0.0)
        # Small images are cut on the device, large ones at decoding.
        cut = "crop" if views.crop else "resized_crop"
        augmentation = replace(views, **{cut: ResizedCrop()})  # type: ignore[arg-type]
        settings = {"augmentation": augmentation, "seed": arguments.probe_seed}
    train = make_source(data.train, data.columns, preprocessing, name="train", **settings)
    return train, make_source(data.test, data.columns, preprocessing, name="test")


def _described(augmentation: Augmentation) -> str:
    if not augmentation:
        return "none"
    return "random resized crops (0.08, 1)" + (", flips" if augmentation.horizontal_flip else "")


def _features_of(
    features: Callable[[Tensor], Tensor], train: ImageSource, test: ImageSource, device: torch.device, batch_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and labels of the training images, then of the test images, on the CPU."""
    seen, labels = outputs_over(train, features, device, batch_size)
    test_seen, test_labels = outputs_over(test, features, device, batch_size)
    assert labels is not None and test_labels is not None  # one label column serves all splits
    check_features(seen, labels, test_seen, test_labels)
    return seen, labels, test_seen, test_labels
