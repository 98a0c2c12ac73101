"""Closed forms (float64) of KDCL's teachers, their inequalities on random logits, and the optimum found otherwise."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize

from hfkd.losses.kdcl import (
    ensemble_teacher,
    error_covariance,
    general_weights,
    linear_teacher,
    minlogit_teacher,
    naive_teacher,
)


Z1, Z2 = (torch.tensor([row], dtype=torch.float64) for row in ([2, 0, -1], [0, 1, 2]))
PAIR, LABEL = torch.stack([Z1, Z2]), torch.tensor([1])
VARIANTS = ("naive", "linear", "minlogit", "mean")


def ce(logits, labels=LABEL):
    return F.cross_entropy(logits, labels, reduction="none")


def random_logits(students, count=400, classes=7, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(students, count, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (count,), generator=generator)


def close(value, expected, atol=1e-7):
    torch.testing.assert_close(value, torch.tensor(expected, dtype=value.dtype), rtol=0, atol=atol)


# -- closed forms (T21, T22) ---------------------------------------------------------------------------------------


def test_naive_is_the_better_student():
    close(ce(Z1), [2.1698460196])
    close(ce(Z2), [1.4076059645])
    assert torch.equal(naive_teacher(PAIR, LABEL), Z2)


def test_naive_is_chosen_for_each_image():
    logits, labels = torch.cat([PAIR, PAIR], dim=1), torch.tensor([1, 0])
    assert torch.equal(naive_teacher(logits, labels), torch.cat([Z2, Z1]))


def test_minlogit_in_closed_form():
    teacher = minlogit_teacher(PAIR, LABEL)
    assert torch.equal(teacher, torch.tensor([[-1.0, 0.0, -1.0]], dtype=torch.float64))
    close(ce(teacher), [0.5514447139])


def test_linear_in_closed_form():
    teacher = linear_teacher(PAIR, LABEL)
    first = (2 + np.log(2 / 3)) / 5
    torch.testing.assert_close(teacher, first * Z1 + (1 - first) * Z2, rtol=0, atol=1e-12)
    close(ce(teacher), [1.2220416873])


def test_general_weights_in_closed_form():
    covariance = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    close(general_weights(covariance, ridge=0.0), [2 / 3, 1 / 3], atol=1e-14)
    close(general_weights(covariance), [2 / 3, 1 / 3], atol=1e-6)


def test_error_covariance_is_the_mean_of_inner_products():
    logits, labels = random_logits(3, count=5)
    errors = (logits.softmax(-1) - F.one_hot(labels, 7)).numpy()
    expected = [
        [np.mean([a @ b for a, b in zip(first, second, strict=True)]) for second in errors] for first in errors
    ]
    close(error_covariance(logits, labels), expected, atol=1e-12)
    # float64 whatever the logits are: an average over many images.
    assert error_covariance(logits.float(), labels).dtype == torch.float64


# -- properties ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("students", [2, 3, 5])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_and_minlogit_are_never_worse_than_naive(students, scale, dtype):
    logits, labels = random_logits(students, scale=scale)
    logits = logits.to(dtype)
    naive = ce(naive_teacher(logits, labels), labels)
    assert (ce(linear_teacher(logits, labels), labels) <= naive).all()
    # The right class is at 0 exactly and every other one at the least: only rounding of the log-sum may differ.
    assert (ce(minlogit_teacher(logits, labels), labels) <= naive * (1 + 1e-5) + 1e-6).all()


@pytest.mark.parametrize("students", [2, 3, 4])
def test_linear_is_the_optimum_that_another_solver_finds(students):
    logits, labels = random_logits(students, count=30, classes=6)
    found = ce(linear_teacher(logits, labels), labels)
    for n, label in enumerate(labels.tolist()):
        z = logits[:, n].numpy()

        def error(weights, z=z, label=label):
            mixed = weights @ z
            return np.log(np.exp(mixed - mixed.max()).sum()) + mixed.max() - mixed[label]

        best = minimize(
            error,
            np.full(students, 1 / students),
            method="SLSQP",
            bounds=[(0, 1)] * students,
            constraints={"type": "eq", "fun": lambda weights: weights.sum() - 1},
            options={"ftol": 1e-12, "maxiter": 300},
        )
        assert found[n].item() == pytest.approx(best.fun, abs=5e-3)  # fifty steps of exponentiated gradient
        if students == 2:
            assert found[n].item() == pytest.approx(best.fun, abs=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_order_of_the_students_does_not_matter(variant):
    logits, labels = random_logits(3, count=50)
    turned = ensemble_teacher(logits[[2, 0, 1]], labels, variant)
    torch.testing.assert_close(ensemble_teacher(logits, labels, variant), turned, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_students_that_agree_are_their_own_teacher(variant):
    logits, labels = random_logits(1, count=20)
    teacher = ensemble_teacher(logits.expand(3, -1, -1), labels, variant)
    torch.testing.assert_close(teacher.softmax(-1), logits[0].softmax(-1), rtol=0, atol=1e-12)


def test_general_weights_have_the_smallest_error_of_all_with_sum_one():
    logits, labels = random_logits(3)
    covariance = error_covariance(logits, labels)
    weights = general_weights(covariance, ridge=0.0)
    assert weights.sum().item() == pytest.approx(1.0)
    for shift in ([1, -1, 0], [0, 1, -1], [-1, 0, 1]):
        other = weights + 0.05 * torch.tensor(shift, dtype=torch.float64)
        assert weights @ covariance @ weights < other @ covariance @ other


@pytest.mark.parametrize("covariance", [torch.ones(2, 2), torch.zeros(3, 3)], ids=["alike", "without error"])
def test_general_weights_of_a_singular_covariance_are_equal(covariance):
    weights = general_weights(covariance.double())
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / len(weights)), rtol=0, atol=1e-6)


def test_general_combines_logits():
    weights = torch.tensor([1.5, -0.5])
    teacher = ensemble_teacher(PAIR, LABEL, "general", weights)
    torch.testing.assert_close(teacher, 1.5 * Z1 - 0.5 * Z2)


@pytest.mark.parametrize("variant", [*VARIANTS, "general"])
def test_a_teacher_is_a_target(variant):
    logits, labels = random_logits(2, count=4)
    teacher = ensemble_teacher(logits.requires_grad_(), labels, variant, torch.tensor([0.5, 0.5]))
    assert teacher.shape == (4, 7) and not teacher.requires_grad


@pytest.mark.parametrize(("variant", "match"), [("best", "is unknown"), ("general", "needs weights")])
def test_bad_input(variant, match):
    with pytest.raises(ValueError, match=match):
        ensemble_teacher(PAIR, LABEL, variant)
