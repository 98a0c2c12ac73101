"""Whether networks, images and batches fit each other: found out before a run starts, not in its first step."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import datasets
import torch
from torch import nn
from transformers import PreTrainedModel

from hfkd.data import ImageColumns, ImageSource, Preprocessing, find_columns
from hfkd.errors import InputError
from hfkd.models.class_names import match_classes
from hfkd.models.probing import as_height_width, image_errors, probe_pixels, undisturbed

from .config import DistillationConfig


def check_networks(
    students: Sequence[PreTrainedModel], teachers: Sequence[PreTrainedModel], least_students: int = 2
) -> torch.dtype:
    """The students' common precision.

    Raises:
        InputError: no list of models, fewer than `least_students` where no teacher is, shared weights, unequal
            classes, a teacher that has them by other names or in another order, or mixed or half precision.
    """
    if isinstance(students, nn.Module):
        raise InputError(f"students={type(students).__name__} is a single model: pass a list of students")
    if len(students) < (1 if teachers else least_students):
        needs = "two or more, or pass a teacher" if least_students == 2 else f"{least_students} or more"
        raise InputError(f"{len(students)} student(s): students that learn from each other are {needs}")
    networks = _by_name(students, teachers)
    for name, network in networks.items():
        check_is_model(name, network)
    _check_own_weights(networks)
    counts = [network.config.num_labels for network in networks.values()]
    if len(set(counts)) > 1:
        raise InputError(f"the networks have {counts} classes: all students and teachers need the same number")
    _check_class_names(students[0], teachers)
    return common_precision(students)


def _check_class_names(student: PreTrainedModel, teachers: Sequence[PreTrainedModel]) -> None:
    names = [student.config.id2label[number] for number in sorted(student.config.id2label)]
    for teacher in teachers:
        if match_classes(teacher.config.id2label, names) is not None:
            raise InputError(
                f"a teacher ({type(teacher).__name__}) has the students' classes in another order: bring it to theirs "
                "by hfkd.models.class_names.match_teacher"
            )


def check_is_model(name: str, network: object) -> None:
    """Raise InputError unless `network`, which a message calls `name`, is a model."""
    if not isinstance(network, PreTrainedModel):
        raise InputError(f"{name} is a {type(network).__name__}: pass a model, as build_student makes one of a name")


def _by_name(students: Sequence[PreTrainedModel], teachers: Sequence[PreTrainedModel]) -> dict[str, PreTrainedModel]:
    named = {f"student {k}": student for k, student in enumerate(students)}
    if len(teachers) == 1:
        return named | {"the teacher": teachers[0]}
    return named | {f"teacher {k}": teacher for k, teacher in enumerate(teachers)}


def _check_own_weights(networks: Mapping[str, PreTrainedModel]) -> None:
    weights = {name: {id(parameter) for parameter in network.parameters()} for name, network in networks.items()}
    for a, b in combinations(weights, 2):
        if weights[a] & weights[b]:
            raise InputError(f"{a} and {b} share weights: build each network by itself, or copy it with copy.deepcopy")


def common_precision(students: Sequence[PreTrainedModel]) -> torch.dtype:
    """float32 or float64, whichever all students have.

    Raises:
        InputError: mixed or half precision.
    """
    found = {parameter.dtype for student in students for parameter in student.parameters()}
    if len(found) > 1 or not found <= {torch.float32, torch.float64}:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        raise InputError(
            f"the students' weights are {names}: make all float32 (or all float64) by model.float(), "
            "and have half precision computed with bf16=True"
        )
    return found.pop()


def check_images(
    students: Sequence[PreTrainedModel], teachers: Sequence[PreTrainedModel], preprocessing: Preprocessing
) -> None:
    """Raise InputError unless each network takes images of the size and the channels of the data."""
    for name, network in _by_name(students, teachers).items():
        wanted = getattr(network.config, "num_channels", preprocessing.num_channels)
        if wanted not in (1, preprocessing.num_channels):
            raise InputError(
                f"{name} has num_channels={wanted} and the images have {preprocessing.num_channels}: build the "
                "network with num_channels of the data, or decode the images with those of the network"
            )
        pixels = probe_pixels(network, preprocessing.image_size, preprocessing.num_channels)
        with undisturbed(network), image_errors(network, pixels):
            network(pixel_values=pixels)


def check_teacher_sizes(
    teachers: Sequence[PreTrainedModel], processors: Sequence[Any], image_size: int, mend: str
) -> None:
    """Raise InputError where a teacher, by its processor or else its configuration, was made for another size.

    A convolutional one would take the images, and see things at a scale that it has never seen.

    Args:
        teachers, processors: one processor, or None, for each teacher.
        image_size: side of the images that the teachers are to see.
        mend: the end of the message, in which {own} and {given} stand for the two sizes.
    """
    for teacher, processor in zip(teachers, processors, strict=True):
        own: Any = getattr(teacher.config, "image_size", None)
        if processor is not None:
            own = Preprocessing.from_image_processor(processor).image_size
        if own is None:
            continue
        height, width = as_height_width(own)
        if (height, width) != (image_size, image_size):
            own = height if height == width else f"{height}x{width}"
            raise InputError(
                f"a teacher ({type(teacher).__name__}) was made for images of {own} pixels and the data has "
                f"{image_size}: {mend.format(own=own, given=image_size)}"
            )


def check_labels(name: str, dataset: Any, num_labels: int, *, several_labels: bool = False) -> None:
    """Raise InputError unless each image of `dataset` has one label, of as many classes as the networks have.

    Args:
        name: the argument that `dataset` was given as.
        dataset: an `ImageSource`, a `datasets.Dataset`, a dict of them, or None.
        num_labels: the networks' classes.
        several_labels: whether the method also takes data with several labels for each image.
    """
    for part, one in parts_of(name, dataset):
        columns = columns_of(part, one)
        if columns.num_labels is None:
            raise InputError(f"{part} has no labels: name its label column, or choose labelled data")
        if columns.multi_label and not several_labels:
            raise InputError(
                f"{part} has several labels for each image (column {columns.label_column!r}), and this method is for "
                "one: choose a column of ClassLabel"
            )
        if columns.num_labels != num_labels:
            raise InputError(
                f"{part} has {columns.num_labels} classes and the networks have {num_labels}: "
                "build the networks with the data's class_names"
            )


def parts_of(name: str, dataset: Any) -> Iterator[tuple[str, Any]]:
    """The datasets, if any, that were given as the argument `name`, each with what a message calls it."""
    if isinstance(dataset, dict):
        for part, one in dataset.items():
            yield from parts_of(f"{name}[{part!r}]", one)
    elif dataset is not None:
        yield name, dataset


def columns_of(name: str, dataset: Any) -> ImageColumns:
    """The image and label columns of `dataset`, which was given as the argument `name`."""
    if isinstance(dataset, ImageSource):
        return dataset.columns
    if not isinstance(dataset, datasets.Dataset):
        raise InputError(f"{name} is a {type(dataset).__name__}: pass an ImageSource or a datasets.Dataset")
    return find_columns(dataset.features)


def check_batches(dataset: Any, args: DistillationConfig, students: Sequence[nn.Module], others: nn.Module) -> None:
    """Raise InputError where an epoch has no batch, or one of a single image that batch norm cannot take.

    Args:
        dataset: the training images, or None.
        args: the run's settings.
        students: whose batch norm `sync_batchnorm` widens to all ranks.
        others: what is trained beside them.
    """
    if dataset is None:
        return
    count, batch, ranks = len(dataset), args.train_batch_size, args.world_size
    least = batch * ranks if args.dataloader_drop_last else 1
    if count < least:
        raise InputError(
            f"train_dataset has {count} images, and an epoch with dataloader_drop_last={args.dataloader_drop_last} "
            f"needs {least} or more: give more images, or choose a smaller per_device_train_batch_size"
        )
    # Several ranks fill their last batches up with the first images.
    last = batch if args.dataloader_drop_last or ranks > 1 else count % batch or batch
    synchronised = args.sync_batchnorm and ranks > 1
    if 1 in (batch, last) and _has_batch_norm([others] if synchronised else [*students, others]):
        mend = "choose 2 or more" if batch == 1 else "choose another, or dataloader_drop_last=True"
        raise InputError(
            f"per_device_train_batch_size={batch} gives a batch of one image of the {count}, "
            f"in which batch norm has nothing to compare: {mend}"
        )


def _has_batch_norm(modules: Iterable[nn.Module]) -> bool:
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for module in modules for layer in module.modules())
