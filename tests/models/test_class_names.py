"""A teacher's classes and the data's, matched by name."""

import pytest
import torch
from tiny_classifiers import FAMILIES

from hfkd.errors import InputError
from hfkd.models.class_names import match_classes, match_teacher


PETS = ["cat", "dog", "sea horse"]


def labels(*names):
    return dict(enumerate(names))


def unnamed(count):
    return [f"LABEL_{number}" for number in range(count)]


@pytest.mark.parametrize(
    ("teacher", "data", "columns"),
    [
        (PETS, PETS, None),
        (["Cat", "DOG", "sea_horse"], PETS, None),
        (["sea-horse", "cat", "dog"], PETS, [1, 2, 0]),
        (["dog", "Sea  Horse", "eel", "cat"], PETS, [3, 0, 1]),
        (["cat", "dog", "sea horse", "eel"], PETS, [0, 1, 2]),
        (["Cat", "cat"], ["cat", "Cat"], [1, 0]),  # the very name before one that is like it
        (["crane", "kite", "crane"], ["crane", "kite", "crane"], None),  # as ImageNet's
        (unnamed(3), PETS, None),
        (PETS, unnamed(3), None),
    ],
)
def test_columns(teacher, data, columns):
    assert match_classes(labels(*teacher), data) == columns


def test_numbers_may_come_in_any_order():
    assert match_classes({2: "cat", 0: "dog", 1: "sea horse"}, PETS) == [2, 0, 1]


@pytest.mark.parametrize(
    ("teacher", "data", "message"),
    [
        (["cat", "dog"], PETS, "does not know 'sea horse' of the data's 3 classes .it knows 'cat', 'dog'.: choose"),
        (["a", "b", "c", "d"], ["v", "w", "x", "y"], "does not know 'v', 'w', 'x' and 1 more of the data's 4 classes"),
        (["crane", "kite", "crane"], ["kite", "crane"], "classes 'crane' cannot be told apart by their names"),
        (["sea horse", "eel"], ["sea_horse", "sea-horse"], "classes 'sea_horse', 'sea-horse' cannot be told apart"),
        (unnamed(4), PETS, "the teacher has 4 classes and the data has 3, and the teacher's have no names"),
        (["a", "b"], unnamed(3), "the teacher has 2 classes and the data has 3, and the data's have no names"),
    ],
)
def test_refuses(teacher, data, message):
    with pytest.raises(InputError, match=message) as error:
        match_classes(labels(*teacher), data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["hfkd_resnet", "vit", "mobilenet_v2"])
def test_a_teacher_gets_the_classes_of_the_data(family):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    model.config.id2label = labels("eel", "sea_horse", "owl", "Dog", "Cat")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(images).logits
        match_teacher(model, PETS)
        after = model(images).logits

    torch.testing.assert_close(after, before[:, [4, 3, 1]])
    assert model.config.id2label == labels(*PETS) and model.config.num_labels == 3
    assert model.config.label2id == {name: number for number, name in enumerate(PETS)}


def test_a_teacher_that_has_them_is_left_alone():
    model = FAMILIES["hfkd_resnet"]()
    names = [name.upper() for name in "abcde"]
    model.config.id2label = labels(*"abcde")
    weight = model.get_parameter(next(name for name, p in model.named_parameters() if p.shape[0] == 5 and p.ndim == 2))
    match_teacher(model, names)
    assert any(parameter is weight for parameter in model.parameters())
    assert model.config.id2label == labels(*"abcde")
