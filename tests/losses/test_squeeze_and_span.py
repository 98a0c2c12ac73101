"""The terms of Squeeze-and-Span in float64: closed forms, invariances, and whose gradient goes where."""

import pytest
import torch

from hfkd.losses.squeeze_and_span import (
    LossWeights,
    covariance_loss,
    representation_distillation,
    span_loss,
    squeeze_loss,
    variance_loss,
)


def matrix(rows):
    return torch.tensor(rows, dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Z_G, Z_F = matrix([[1, 2], [3, 4]]), matrix([[1, 0], [0, 4]])


# Values of the reference functions, by the specification.
@pytest.mark.parametrize(
    ("z", "variance", "covariance"),
    [
        (matrix([[1, 2], [3, 2], [5, 8]]), 0.0, 36.0),
        (matrix([[0, 0], [0, 1]]), 0.6414112, 0.0),
        (0.3 * matrix([[1, 0, 2], [-1, 1, 0], [0, -1, -2], [2, 0.5, 1]]), 0.6145862, 0.01077188),
        (matrix([[3.0, -1.0]] * 4), 0.99, 0.0),
        (Z_F, 0.1464112, 4.0),
        (Z_G, 0.0, 4.0),
    ],
)
def test_closed_forms(z, variance, covariance):
    assert variance_loss(z).item() == pytest.approx(variance, abs=1e-7)
    assert covariance_loss(z).item() == pytest.approx(covariance, abs=1e-7)


def test_a_constant_batch_has_no_gradient():
    z = matrix([[3.0, -1.0]] * 4).requires_grad_()
    (gradient,) = torch.autograd.grad(variance_loss(z) + covariance_loss(z), z)
    assert torch.equal(gradient, torch.zeros_like(z))


@pytest.mark.parametrize(("count", "width"), [(256, 64), (20, 64)])
def test_identical_dimensions_are_the_signature_of_collapse(count, width):
    column = normal(count, 1)
    z = (column / column.std(dim=0)).expand(-1, width)
    assert covariance_loss(z).item() == pytest.approx(width - 1)
    assert variance_loss(z).item() == 0


@pytest.mark.parametrize(("count", "width"), [(12, 5), (5, 12), (8, 8)])
def test_covariance_is_that_of_torch(count, width):
    """Also by the smaller product, where there are fewer samples than dimensions; gradients too."""
    z = normal(count, width).requires_grad_()
    matrix_ = torch.cov(z.T)
    expected = (matrix_ - matrix_.diag().diag()).square().sum() / width
    torch.testing.assert_close(covariance_loss(z), expected)
    found = torch.autograd.grad(covariance_loss(z), z)
    torch.testing.assert_close(found, torch.autograd.grad(expected, z))


@pytest.mark.parametrize("shape", [(10, 4), (4, 10)])
def test_invariances(shape):
    z = 0.5 * normal(*shape)
    signs = normal(shape[1], seed=1).sign()
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(2))
    for changed in (z + normal(shape[1], seed=3), z.flip(0), z[:, order], z * signs):
        torch.testing.assert_close(variance_loss(changed), variance_loss(z))
        torch.testing.assert_close(covariance_loss(changed), covariance_loss(z))
    torch.testing.assert_close(covariance_loss(3 * z), 81 * covariance_loss(z))


def test_distillation_is_a_mean_and_stops_no_gradient():
    z_g, z_f = Z_G.clone().requires_grad_(), Z_F.clone().requires_grad_()
    loss = representation_distillation(z_g, z_f)
    assert loss.item() == 3.25
    of_teacher, of_student = torch.autograd.grad(loss, (z_g, z_f))
    torch.testing.assert_close(of_teacher, 2 * (Z_G - Z_F) / 4)
    torch.testing.assert_close(of_student, -of_teacher)


@pytest.mark.parametrize(("regularize", "value"), [(False, 88.910278), (True, 92.910278)])
def test_squeeze(regularize, value):
    loss, parts = squeeze_loss(Z_G, Z_F, LossWeights(25, 25, 1), regularize_teacher=regularize)
    assert loss.item() == pytest.approx(value, abs=1e-5)  # as float32 has it
    names = {"distillation", "student_variance", "student_covariance"}
    assert parts.keys() == names | ({"teacher_variance", "teacher_covariance"} if regularize else set())
    assert (parts["distillation"], parts["student_covariance"]) == (3.25, 4)


def test_the_released_form_leaves_the_teacher_to_distillation():
    """d(mu var + nu cov)/d z_g is 0 there, and is not in the paper's form."""
    weights, z_g = LossWeights(0, 25, 1), 0.2 * normal(6, 3)
    gradients = []
    for regularize in (False, True):
        teacher, student = z_g.clone().requires_grad_(), normal(6, 3, seed=1).requires_grad_()
        loss, _ = squeeze_loss(teacher, student, weights, regularize_teacher=regularize)
        gradients.append(torch.autograd.grad(loss, teacher)[0])
    assert torch.equal(gradients[0], torch.zeros(6, 3, dtype=torch.float64)) and gradients[1].abs().min() > 1e-4


def test_span_is_symmetric_and_its_parts_add_up():
    weights = LossWeights(10, 5, 2)
    one, other = normal(6, 3), 0.5 * normal(6, 3, seed=1)
    loss, parts = span_loss(one, other, weights)
    torch.testing.assert_close(loss, span_loss(other, one, weights)[0])
    expected = 10 * parts["invariance"] + 2 * (5 * parts["variance"] + 2 * parts["covariance"])
    torch.testing.assert_close(loss, expected)
    assert parts["variance"] == (variance_loss(one) + variance_loss(other)) / 2 > 0


def test_a_weight_of_zero_leaves_its_term_out():
    _, parts = squeeze_loss(Z_G, Z_F, LossWeights(1, 0, 0))
    assert parts.keys() == {"distillation"}


def test_shapes():
    with pytest.raises(ValueError, match="differ in shape"):
        representation_distillation(torch.zeros(2, 3), torch.zeros(2, 1))
    for loss in (variance_loss, covariance_loss):
        with pytest.raises(ValueError, match="N of 2 or more"):
            loss(torch.zeros(1, 3))
