"""Closed forms (float64), invariances and gradient masks of the losses between features."""

import math

import pytest
import torch

from hfkd.losses.feature_distillation import (
    at_common_size,
    attention_transfer_loss,
    contrastive_loss,
    hierarchical_context_loss,
    hint_loss,
    relational_angle_loss,
    relational_distance_loss,
)


POINTS = torch.tensor([[0, 0], [3, 4], [0, 8]], dtype=torch.float64)  # distances 5, 8, 5
LINE = torch.tensor([[0], [1], [3]], dtype=torch.float64)  # distances 1, 3, 2


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MAPS = {
    "hint": hint_loss,
    "attention": attention_transfer_loss,
    "hierarchical context": hierarchical_context_loss,
}
RELATIONS = {"distance": relational_distance_loss, "angle": relational_angle_loss}


def test_maps_meet_at_the_smaller_size():
    one, other = at_common_size(drawn(2, 3, 4, 2), drawn(2, 5, 2, 4))
    assert (one.shape, other.shape) == ((2, 3, 2, 2), (2, 5, 2, 2))
    same = drawn(2, 3, 4, 4)
    assert at_common_size(same, same)[0] is same


def test_hint_closed_form():
    student = torch.tensor([[1.0, 0.0], [2.0, 1.0]], dtype=torch.float64).view(1, 1, 2, 2)
    teacher = torch.tensor([[0.0, 1.0], [2.0, 3.0]], dtype=torch.float64).view(1, 1, 2, 2)
    assert hint_loss(student, teacher).item() == (1 + 1 + 0 + 4) / 4
    assert hint_loss(student, torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64)).item() == 4  # the mean, 1, against 3


def test_attention_closed_form():
    """Squares (9, 0, 0, 16) of two channels against (1, 1, 1, 1) of one: q / |q|_2 is what is compared."""
    student = torch.tensor([[3.0, 0, 0, 0], [0, 0, 0, 4.0]], dtype=torch.float64).view(1, 2, 2, 2)
    teacher = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    length = math.hypot(9, 16)
    expected = sum((q - 0.5) ** 2 for q in (9 / length, 0, 0, 16 / length)) / 4
    assert attention_transfer_loss(student, teacher).item() == pytest.approx(expected, abs=1e-14)


def test_attention_knows_no_scale_sign_or_order_of_channels():
    student, teacher = drawn(3, 4, 4, 4), drawn(3, 7, 8, 8, seed=1)
    loss = attention_transfer_loss(student, teacher).item()
    assert attention_transfer_loss(-5 * student.flip(1), 0.01 * teacher.flip(1)).item() == pytest.approx(loss)
    assert attention_transfer_loss(student.flip(2), teacher).item() != pytest.approx(loss, rel=1e-2)


def test_relations_closed_form():
    assert relational_distance_loss(POINTS, LINE).item() == pytest.approx(0.018518518518518524, abs=1e-14)
    assert relational_angle_loss(POINTS, LINE).item() == pytest.approx(0.022162962962962964, abs=1e-14)


@pytest.mark.parametrize("name", RELATIONS)
def test_relations_know_neither_place_nor_size_nor_direction(name):
    student, teacher = drawn(5, 4), drawn(5, 7, seed=1)
    rotation = torch.linalg.qr(drawn(4, 4, seed=2)).Q
    loss = RELATIONS[name](student, teacher).item()
    assert loss > 1e-3
    assert RELATIONS[name](3 * student @ rotation + 2, 0.1 * teacher - 5).item() == pytest.approx(loss, abs=1e-12)
    assert RELATIONS[name](student @ rotation, student).item() == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("name", RELATIONS)
def test_samples_in_one_place_break_nothing(name):
    student = drawn(4, 3)
    student[1] = student[0]
    for embeddings in (student, torch.zeros(4, 3, dtype=torch.float64)):
        embeddings = embeddings.clone().requires_grad_()
        RELATIONS[name](embeddings, drawn(4, 3, seed=1)).backward()
        assert torch.isfinite(embeddings.grad).all() and embeddings.grad.abs().max() < 100


@pytest.mark.parametrize(("name", "count"), [("distance", 1), ("angle", 1), ("angle", 2)])
def test_a_last_batch_too_small_for_relations_has_none(name, count):
    embeddings = drawn(count, 3).requires_grad_()
    loss = RELATIONS[name](embeddings, drawn(count, 3, seed=1))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-14) and embeddings.grad.abs().max() < 1e-12


def test_contrastive_closed_form():
    """h = e^s / (e^s + k / M) with k / M = 2 / 10."""
    scores = torch.tensor([[0.5, 0.1, 0.2]], dtype=torch.float64).log()
    assert contrastive_loss(scores, 10).item() == pytest.approx(1.4350845252893225, abs=1e-13)
    twice = contrastive_loss(scores.repeat(3, 1), 10)
    assert twice.item() == pytest.approx(1.4350845252893225, abs=1e-13)
    # As likely as noise: h is 1/2 for each of the three.
    assert contrastive_loss(torch.full((1, 3), math.log(0.2)), 10).item() == pytest.approx(3 * math.log(2))


def test_contrastive_pulls_the_positive_and_pushes_the_negatives():
    scores = drawn(4, 6).requires_grad_()
    contrastive_loss(scores, 100).backward()
    assert (scores.grad[:, 0] < 0).all() and (scores.grad[:, 1:] > 0).all()


def test_hierarchical_context_closed_form():
    """Differences of 1 everywhere are 1 at every level; those that cancel are seen by the whole map alone."""
    zeros = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    assert hierarchical_context_loss(zeros + 1, zeros).item() == pytest.approx(1)
    stripes = zeros.clone()
    stripes[..., ::2] = 1
    stripes[..., 1::2] = -1
    assert hierarchical_context_loss(stripes, zeros).item() == pytest.approx(1 / (1 + 1 / 2 + 1 / 4 + 1 / 8))
    # Of 2x2 positions the level of one is left, with weight 1/2.
    small = torch.tensor([1.0, -1, 1, -1], dtype=torch.float64).view(1, 1, 2, 2)
    assert hierarchical_context_loss(small, torch.zeros_like(small)).item() == pytest.approx(1 / 1.5)
    one = torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64)
    assert hierarchical_context_loss(one, torch.zeros_like(one)).item() == 9


@pytest.mark.parametrize("loss", [*MAPS.values(), *RELATIONS.values()], ids=[*MAPS, *RELATIONS])
def test_the_teacher_has_no_gradient(loss):
    shape = (4, 3, 8, 8) if loss in MAPS.values() else (4, 3)
    student, teacher = drawn(*shape).requires_grad_(), drawn(*shape, seed=1).requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    assert loss(teacher.detach(), teacher).item() == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize(
    "call",
    [
        lambda: hint_loss(drawn(2, 3, 4, 4), drawn(2, 5, 4, 4)),
        lambda: hierarchical_context_loss(drawn(2, 3, 4, 4), drawn(2, 3, 2, 2)),
    ],
)
def test_errors_are_one_line(call):
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value)
