"""`hfkd evaluate GENERATOR --protocol generation`: its images beside real held-out and training images, and noise."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfkd.data import DataArguments, ImageDatasets, Preprocessing, load_image_datasets, make_source
from hfkd.errors import InputError
from hfkd.evaluation.generation import RealImages, generation_metrics, uniform_noise
from hfkd.evaluation.image_grid import nearest_image_grid
from hfkd.evaluation.inference import outputs_over
from hfkd.evaluation.judges import NEIGHBOURS, ClassifierJudge, Judge, NearestNeighbourJudge
from hfkd.evaluation.likeness import nearest_same_class
from hfkd.evaluation.sampling import balanced_labels, class_names, draw_images
from hfkd.trainers.config import check_range

from .checkpoint import Cohort, load_cohort
from .generation_card import PICTURE, card_of, update_card
from .generation_parent import named_parent, sqrt_stationarity_under
from .generators import load_generator
from .measured_data import check_class_names, check_classes, check_labelled_test, data_of_run
from .options import build
from .sample import picture_path, save_picture


NEAREST = 4  # training images beside each sample of the picture
SAMPLES = 10  # rows of the picture, where there are no classes
_ROWS = {"generator": "generator", "held_out": "held-out images", "noise": "noise", "training": "training images"}
_MEND = "evaluate on the data that the parent classifier was trained for"


@dataclass
class GenerationArguments:
    """How a generator is measured, with --protocol generation."""

    judge: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a classifier that was trained on other images than the parent classifier; "
            "by default the 5 nearest of half of the held-out images."
        },
    )
    classifier: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of the generator's parent classifier, for self_accuracy and, of a full-batch "
            "one, sqrt_stationarity; its run.yaml says which images it was trained on, to which the generator's are "
            "compared. By default the folder that the generator's run.yaml names, where it still exists."
        },
    )
    classifier_index: int = field(
        default=0, metadata={"help": "Whose classes, of a generator born from several classifiers."}
    )
    num_images: int = field(default=1000, metadata={"help": "Generated images, >= 2, the classes in turn."})
    seed: int = field(default=0, metadata={"help": "Of the latents and of the noise."})
    picture: str | None = field(
        default=None, metadata={"help": "Picture to write: a sample of each class and its nearest training images."}
    )

    update_card: bool = field(
        default=False,
        metadata={
            "help": f"Put the figures and such a picture ({PICTURE}, which shows training images) into the card in "
            "the generator's folder."
        },
    )

    def __post_init__(self) -> None:
        check_range("num_images", self.num_images, 2)
        check_range("seed", self.seed, 0)


def evaluate_generation(
    name: str,
    values: dict[str, Any],
    arguments: GenerationArguments,
    *,
    batch_size: int = 256,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> dict[str, Any]:
    """Measure the generator `name` against real images, and write the pictures that `arguments` ask for.

    Args:
        values: the options that the user named, of which those of the data count.

    Returns:
        `metrics`: for each of `generator`, `held_out` and `noise` what `generation_metrics` gives, and for `training`,
        the parent's own images, `sqrt_stationarity` where it is measured; `n_test`; `protocol`; and `settings`, what
        was compared with what.

    Raises:
        InputError: no generator, no classifier, or data that do not fit them.
    """
    card = card_of(name) if arguments.update_card else None
    pictures = [] if arguments.picture is None else [picture_path(arguments.picture)]
    if card is not None:
        pictures.append(card.with_name(PICTURE))
    generator, folder = load_generator(name, trust_remote_code=trust_remote_code, revision=revision)
    names = class_names(generator, arguments.classifier_index)
    parent_name = arguments.classifier or named_parent(folder, arguments.classifier_index)
    parent = load_classifier(parent_name, trust_remote_code)
    judging = load_classifier(arguments.judge, trust_remote_code)
    data = load_image_datasets(_data_arguments(values, [parent.folder] if parent else [folder, folder.parent]))
    if names is not None:
        check_class_names(names, data, f"the generator {name!r}", _MEND)
    real = _real_images(data, _preprocessing(generator.config, parent), batch_size)
    judge = _judge(judging, "judge", data, batch_size)
    if judge is None:
        count = len(data.columns.class_names or ())
        judge = NearestNeighbourJudge(real.reference, real.reference_labels, count)
    labels = None if names is None else balanced_labels(arguments.num_images, range(len(names)))
    images = draw_images(
        generator,
        arguments.num_images,
        labels=labels,
        seed=arguments.seed,
        classifier_index=arguments.classifier_index,
        batch_size=batch_size,
    )
    rows = {
        "generator": (images, labels),
        "held_out": (real.held_out[: len(images)], None if labels is None else real.held_out_labels[: len(images)]),
        "noise": (uniform_noise(images, arguments.seed), labels),
    }
    classifier = _judge(parent, "classifier", data, batch_size)
    stationarity = None
    if parent is not None and labels is not None:
        stationarity = sqrt_stationarity_under(parent, generator, folder)
    metrics = {
        row: generation_metrics(*made, real, judge, classifier=classifier, sqrt_stationarity=stationarity)
        for row, made in rows.items()
    }
    if stationarity is not None:
        metrics["training"] = {"sqrt_stationarity": stationarity(real.training, real.training_labels)}
    if pictures:
        known = judge(images).probabilities.argmax(dim=1) if labels is None else labels
        _draw_nearest(pictures, images, known, real, SAMPLES if names is None else len(names))
    result = {
        "protocol": "generation",
        "metrics": metrics,
        "n_test": len(real.reference) + len(real.held_out),
        "settings": _settings(arguments, parent_name, data, real, rows),
    }
    if card is not None:
        shown = "Generated images" if names is None else "An image of each class"
        update_card(card, result, _ROWS, f"{shown}, and on the right the training images that are most like it")
    return result


def describe_generation(result: dict[str, Any]) -> str:
    """A table with a line for each metric, and a column for each set of images; "-" where it was not measured."""
    columns = result["metrics"]
    names = list(columns["generator"])
    width = max(map(len, names)) + 2
    lines = ["".join([" " * width, *(f"{_ROWS[row]:>18}" for row in columns)])]
    for name in names:
        cells = (f"{row[name]:>18.4f}" if name in row else f"{'-':>18}" for row in columns.values())
        lines.append("".join([f"{name.replace('_', ' '):<{width}}", *cells]))
    return "\n".join(lines)


def load_classifier(name: str | None, trust_remote_code: bool) -> Cohort | None:
    if name is None:
        return None
    cohort = load_cohort(name, trust_remote_code=trust_remote_code)
    if cohort.fresh_weights:
        raise InputError(f"checkpoint {name!r} was saved without a classifier: give one that was trained on classes")
    return cohort


def _data_arguments(values: dict[str, Any], folders: list[Path]) -> DataArguments:
    """Data options: what the user names, over those of the run in the first of `folders` that has some.

    Those of the run say which images were trained on, so that they hold unless the user names another dataset.
    """
    of_run: dict[str, Any] = next(filter(None, map(data_of_run, folders)), {})
    if not of_run and "dataset_name" not in values:
        raise InputError(
            "no run.yaml says which images the parent classifier was trained on: name them with --dataset_name, or "
            "give the run's folder by --classifier"
        )
    default = DataArguments().dataset_name
    if values.get("dataset_name", of_run.get("dataset_name", default)) != of_run.get("dataset_name", default):
        of_run = {}
    arguments: DataArguments = build([DataArguments], {**of_run, **values})[0]
    return arguments


def _preprocessing(config: Any, parent: Cohort | None) -> Preprocessing:
    """To images as the generator makes them: its size and channels, in [-1, 1]."""
    shape = {"image_size": config.image_size, "num_channels": config.num_channels}
    half = (0.5,) * config.num_channels
    if parent is None:
        return Preprocessing(**shape, mean=half, std=half)
    return replace(parent.preprocessing, **shape, mean=half, std=half)


def _real_images(data: ImageDatasets, preprocessing: Preprocessing, batch_size: int) -> RealImages:
    test = check_labelled_test(data)
    if data.columns.multi_label:
        raise InputError(f"protocol 'generation' needs one label per image, and {data.name!r} has several")
    parts: list[Tensor] = []
    for name, dataset in (("train", data.train), ("test", test)):
        source = make_source(dataset, data.columns, preprocessing, name=name)
        images, labels = outputs_over(source, lambda pixel_values: pixel_values, torch.device("cpu"), batch_size)
        assert labels is not None  # one label column serves all splits
        parts += [images, labels]
    return RealImages.split(*parts)


def _judge(cohort: Cohort | None, role: str, data: ImageDatasets, batch_size: int) -> Judge | None:
    if cohort is None:
        return None
    student = cohort.students[0]
    check_classes(student.config, data, f"the {role}", f"give a {role} of the same classes")
    student.to("cuda" if torch.cuda.is_available() else "cpu")
    return ClassifierJudge(student, cohort.preprocessing, batch_size)


def _draw_nearest(paths: list[Path], images: Tensor, labels: Tensor, real: RealImages, count: int) -> None:
    """The first `count` images, each with the training images of its class that are most like it."""
    fewest = min(int((real.training_labels == label).sum()) for label in labels[:count])
    _, nearest = nearest_same_class(
        images[:count], labels[:count], real.training, real.training_labels, k=min(NEAREST, fewest)
    )
    grid = nearest_image_grid(images[:count], real.training[nearest])
    for path in paths:
        save_picture(grid, path)


def _settings(
    arguments: GenerationArguments,
    parent_name: str | None,
    data: ImageDatasets,
    real: RealImages,
    rows: dict[str, Any],
) -> dict[str, Any]:
    neighbours = f"{NEIGHBOURS} nearest of {len(real.reference):,} held-out images"
    return {
        "dataset": data.name,
        "judge": arguments.judge or neighbours,
        "classifier": parent_name or "not given",
        "seed": arguments.seed,
        "training images": len(real.training),
        "reference images": len(real.reference),
        **{f"images of {row}": len(images) for row, (images, _) in rows.items()},
    }
