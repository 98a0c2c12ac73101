"""Closed forms (float64), identities and invariances of the losses between a student's logits and a teacher's."""

import pytest
import torch

from hfkd.losses import logit_distillation, online_adversarial
from hfkd.losses.logit_distillation import (
    correlation_distillation,
    decoupled_divergences,
    decoupled_kd,
    distillation_kl,
    inter_class_relation,
    intra_class_relation,
    joint_logits,
    standardise,
    standardised_kd,
)


def double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


Z1, Z2, Y = double((2, 0, -1)), double((0, 1, 2)), torch.tensor([0])
LOSSES = {
    "kd": lambda z, t, y: distillation_kl(z, t, 2.0),
    "dkd": lambda z, t, y: decoupled_kd(z, t, y, 2.0),
    "dist": lambda z, t, y: correlation_distillation(z, t, 2.0),
    "logit_standardised": lambda z, t, y: standardised_kd(z, t, 2.0),
}


def drawn(count=6, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z, t = torch.randn(2, count, classes, generator=generator, dtype=torch.float64) * 2
    return z, t, torch.randint(classes, (count,), generator=generator)


def test_kd_is_afds():
    assert logit_distillation.distillation_kl is online_adversarial.distillation_kl


@pytest.mark.parametrize(
    ("temperature", "target", "nontarget"),
    [(1.0, 1.4021177624303833, 0.46211715726000974), (4.0, 0.10822426979825625, 0.031088250442899118)],
)
def test_decoupled_closed_form(temperature, target, nontarget):
    found = decoupled_divergences(Z1, Z2, Y, temperature)
    assert [x.item() for x in found] == pytest.approx([target, nontarget], abs=1e-14)
    loss = decoupled_kd(Z1, Z2, Y, temperature, target_weight=1.0, nontarget_weight=8.0)
    assert loss.item() == pytest.approx(temperature**2 * (target + 8 * nontarget), abs=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_is_tckd_and_the_rest_of_nckd(temperature):
    """DKD, eq. 5; so with NCKD weighted by 1 - p_y of each sample decoupled KD is KD."""
    z, t, y = drawn()
    target, nontarget = decoupled_divergences(z, t, y, temperature)
    rest = 1 - (t / temperature).softmax(1).gather(1, y[:, None])[:, 0]
    whole = temperature**2 * (target + rest * nontarget).mean()
    assert whole.item() == pytest.approx(distillation_kl(z, t, temperature).item(), abs=1e-13)


def test_nckd_does_not_see_the_label_and_tckd_nothing_else():
    z, t, y = drawn()
    moved = z.scatter_add(1, y[:, None], torch.full_like(z[:, :1], 3.0))
    (target, nontarget), (other_target, same) = (decoupled_divergences(x, t, y) for x in (z, moved))
    torch.testing.assert_close(nontarget, same, rtol=0, atol=1e-13)
    assert (target - other_target).abs().min() > 1e-4
    two = [x[:, :2] for x in (z, t)]
    assert decoupled_divergences(*two, y % 2)[1].abs().max() < 1e-14  # one other class has no distribution


def test_decoupled_survives_a_sure_teacher():
    z = double((1000.0, 0.0, -1000.0)).requires_grad_()
    decoupled_kd(z, double((900.0, -900.0, 0.0)), Y).backward()
    assert torch.isfinite(z.grad).all()


def test_correlation_closed_form():
    student = double((0.5, 0.3, 0.2), (0.1, 0.6, 0.3), (0.2, 0.2, 0.6))
    teacher = double((0.7, 0.1, 0.2), (0.2, 0.5, 0.3), (0.3, 0.1, 0.6))
    assert inter_class_relation(student, teacher).item() == pytest.approx(0.06755436542408166, abs=1e-12)
    assert intra_class_relation(student, teacher).item() == pytest.approx(0.01021640923410827, abs=1e-12)
    loss = correlation_distillation(3 * student.log(), 3 * teacher.log(), 3.0, inter_weight=2.0, intra_weight=0.5)
    assert loss.item() == pytest.approx(9 * (2 * 0.06755436542408166 + 0.5 * 0.01021640923410827), abs=1e-11)


def test_relations_know_neither_scale_nor_shift():
    p, q = (x.softmax(1) for x in drawn()[:2])
    scales, shifts = drawn(6, 2, seed=1)[0].abs().split(1, dim=1)
    moved = inter_class_relation(p * (scales + 0.1) + shifts, q)
    assert moved.item() == pytest.approx(inter_class_relation(p, q).item(), abs=1e-12)
    assert inter_class_relation(p, -p).item() == pytest.approx(2, abs=1e-12)
    assert intra_class_relation(p, p).item() == pytest.approx(0, abs=1e-12)
    # Of one sample no class has an order.
    assert intra_class_relation(p[:1], q[:1]).item() == 1


def test_standardised_closed_form():
    scores = double((1.0910894511799618, -0.21821789023599236, -0.8728715609439694))
    torch.testing.assert_close(standardise(Z1), scores, rtol=0, atol=1e-14)
    assert standardised_kd(Z1, Z2, 1.0).item() == pytest.approx(1.1383450462413447, abs=1e-12)
    assert standardised_kd(Z1, Z2, 2.0).item() == pytest.approx(1.2682441175606949, abs=1e-12)


def test_standardised_knows_neither_scale_nor_shift():
    z, t, _ = drawn()
    loss = standardised_kd(z, t)
    for moved in ((5 * z - 3, t), (z, 0.01 * t + 100), (1e-3 * z + z.mean(), 7 * t)):
        assert standardised_kd(*moved).item() == pytest.approx(loss.item(), abs=1e-10)
    assert standardised_kd(-z, t).item() != pytest.approx(loss.item(), abs=1e-2)


def test_equal_logits_have_no_gradient():
    z = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    standardised_kd(z, torch.cat([Z1, Z2])).backward()
    assert torch.equal(z.grad, torch.zeros_like(z))


@pytest.mark.parametrize("name", LOSSES)
def test_the_teacher_has_no_gradient_and_agreement_no_loss(name):
    z, t, y = drawn()
    z, t = z.requires_grad_(), t.requires_grad_()
    LOSSES[name](z, t, y).backward()
    assert t.grad is None and z.grad.abs().sum() > 0
    same = t.detach().clone().requires_grad_()
    loss = LOSSES[name](same, t, y)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-13)
    assert same.grad.abs().max() < 1e-9
    shifted = LOSSES[name](z + 4.0, t - 9.0, y)
    assert shifted.item() == pytest.approx(LOSSES[name](z, t, y).item(), abs=1e-11)  # as softmax has it


@pytest.mark.parametrize("name", ["kd", "dkd", "logit_standardised"])
def test_losses_are_means_over_samples(name):
    z, t, y = drawn()
    each = [LOSSES[name](z[i : i + 1], t[i : i + 1], y[i : i + 1]).item() for i in range(len(z))]
    assert LOSSES[name](z, t, y).item() == pytest.approx(sum(each) / len(each), abs=1e-13)


def test_teachers_are_averaged_by_their_probabilities():
    joint = joint_logits([Z1, Z2], 3.0)
    mean = double((0.38089276126443683, 0.29711395991935463, 0.32199327881620854))
    torch.testing.assert_close((joint / 3).softmax(1), mean, rtol=0, atol=1e-14)
    assert distillation_kl(double((1, 0, 0)), joint, 3.0).item() == pytest.approx(0.021491921611256702, abs=1e-13)
    assert joint_logits([Z1], 3.0) is Z1
    torch.testing.assert_close((joint_logits([Z1, Z1 + 5], 2.0) / 2).softmax(1), (Z1 / 2).softmax(1))


@pytest.mark.parametrize(
    "call",
    [
        lambda: decoupled_kd(Z1, Z2[:, :2], Y),
        lambda: decoupled_kd(Z1, Z2, Y, 0.0),
        lambda: correlation_distillation(Z1, Z2, -1.0),
        lambda: standardised_kd(Z1, Z2[:, :2]),
        lambda: joint_logits([], 1.0),
        lambda: joint_logits([Z1, Z2[:, :2]], 1.0),
    ],
)
def test_errors_are_one_line(call):
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value)
