"""Classes of a teacher and of the data, which are matched by their names."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from hfkd.errors import InputError
from hfkd.models.adapter import find_classifier
from hfkd.models.heads import put_linear_head


_NO_NAME = re.compile(r"label[ _]\d+", re.IGNORECASE)  # what transformers calls classes that nobody named
_SHOWN = 3  # names in a message


def match_classes(teacher_id2label: Mapping[int, str], data_class_names: Sequence[str]) -> list[int] | None:
    """For each of the data's classes the number of the teacher's class of the same name; None where the orders agree.

    Names are the same whatever their case, and whether words are parted by blanks, underscores or dashes. The teacher
    may know more classes than the data has. Names like LABEL_0 are none: then the numbers of classes have to be
    equal, and the orders are taken to agree.

    Args:
        teacher_id2label: of the teacher's configuration.
        data_class_names: in the order of the labels.

    Raises:
        InputError: classes that the teacher does not know, or that it knows twice; unequal numbers without names.
    """
    teacher = [str(teacher_id2label[number]) for number in sorted(teacher_id2label)]
    data = [str(name) for name in data_class_names]
    if teacher == data or (_unnamed(teacher) or _unnamed(data)) and len(teacher) == len(data):
        return None
    if _unnamed(teacher) or _unnamed(data):
        who = "the teacher's" if _unnamed(teacher) else "the data's"
        raise InputError(
            f"the teacher has {len(teacher)} classes and the data has {len(data)}, and {who} have no names to match "
            "them by: choose a teacher of the data's classes, or name them (id2label in its configuration)"
        )
    columns = _find(teacher, data)
    return None if columns == list(range(len(teacher))) else columns


def match_teacher(teacher: PreTrainedModel, data_class_names: Sequence[str]) -> None:
    """Give `teacher` the data's classes in the data's order: its last layer keeps their rows, and loses all others.

    A softmax over the rows that stay is the teacher's belief among the data's classes.

    Args:
        teacher: any transformers image classifier, changed in place where the classes are not the data's already.
        data_class_names: in the order of the labels.

    Raises:
        InputError: as `match_classes`, or a teacher without a last linear layer with a bias.
    """
    columns = match_classes(teacher.config.id2label, data_class_names)
    if columns is None:
        return
    classifier = find_classifier(teacher)
    bias = torch.zeros(classifier.out_features) if classifier.bias is None else classifier.bias
    put_linear_head(teacher, classifier.weight[columns], bias[columns], data_class_names)


def _find(teacher: Sequence[str], data: Sequence[str]) -> list[int]:
    """The number of each of the data's names among the teacher's: of the very name, else of one that is the same."""
    exact: dict[str, list[int]] = defaultdict(list)
    alike: dict[str, list[int]] = defaultdict(list)
    for number, name in enumerate(teacher):
        exact[name].append(number)
        alike[_plain(name)].append(number)
    found = [exact.get(name) or alike.get(_plain(name), []) for name in data]
    missing = [name for name, numbers in zip(data, found, strict=True) if not numbers]
    if missing:
        raise InputError(
            f"the teacher does not know {_some(missing)} of the data's {len(data)} classes (it knows "
            f"{_some(teacher)}): choose a teacher of these classes, or rename its classes (id2label in its "
            "configuration)"
        )
    columns = [numbers[0] for numbers in found]
    doubtful = [
        name for name, numbers in zip(data, found, strict=True) if len(numbers) > 1 or columns.count(numbers[0]) > 1
    ]
    if doubtful:
        raise InputError(
            f"the classes {_some(doubtful)} cannot be told apart by their names, without case, underscores and "
            "dashes: rename the teacher's (id2label in its configuration) or the data's"
        )
    return columns


def _plain(name: str) -> str:
    return " ".join(re.split(r"[\s_-]+", name.casefold())).strip()


def _unnamed(names: Sequence[str]) -> bool:
    return all(_NO_NAME.fullmatch(name) for name in names)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    more = len(names) - _SHOWN
    return shown if more <= 0 else f"{shown} and {more:,} more"
