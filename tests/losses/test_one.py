"""Closed forms (float64) of ONE's ensemble and losses, and who gets a gradient from which term."""

import pytest
import torch
import torch.nn.functional as F

from hfkd.losses.one import ensemble_losses, gated_ensemble
from hfkd.losses.online_adversarial import distillation_kl, kl_rampup


Z1, Z2 = (torch.tensor([row], dtype=torch.float64) for row in ([2, 0, -1], [0, 1, 2]))
LABEL = torch.tensor([0])


def test_gated_ensemble_in_closed_form():  # T23
    gates = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    expected = torch.tensor([[0.5, 0.75, 1.25]], dtype=torch.float64)
    torch.testing.assert_close(gated_ensemble(torch.stack([Z1, Z2]), gates), expected)
    # Each image has gates of its own.
    logits = torch.stack([torch.cat([Z1, Z1]), torch.cat([Z2, Z2])])
    both = gated_ensemble(logits, torch.tensor([[0.25, 0.75], [1.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(both, torch.cat([expected, Z1]))


def test_ramp_in_closed_form():  # T23
    found = [kl_rampup(epoch, 80) for epoch in (0, 40, 80, 200)]
    assert found == pytest.approx([0.0067379470, 0.2865047969, 1.0, 1.0])


def test_losses_in_closed_form():
    losses, parts = ensemble_losses([Z1, Z2], Z2, LABEL, temperature=3.0, kl_weight=0.5)
    ce1, ce2, kl = 0.1698460196, 2.4076059645, 2.0883548898  # T1 of the method document
    assert [loss.item() for loss in losses] == pytest.approx([ce1 + 0.5 * kl, ce2, ce2])
    assert set(parts) == {"student_0_ce", "student_0_kl", "student_1_ce", "student_1_kl", "teacher_ce"}
    assert parts["student_0_kl"].item() == pytest.approx(kl) and parts["student_1_kl"].item() == pytest.approx(0)


def test_the_teacher_learns_from_the_labels_alone():
    gates = torch.tensor([[0.25, 0.75]], dtype=torch.float64, requires_grad=True)
    logits = [Z1.clone().requires_grad_(), Z2.clone().requires_grad_()]
    teacher = gated_ensemble(torch.stack(logits), gates)
    losses, parts = ensemble_losses(logits, teacher, LABEL)
    for k in (0, 1):
        grads = torch.autograd.grad(losses[k], [*logits, gates], retain_graph=True, allow_unused=True)
        assert [g is not None for g in grads] == [k == 0, k == 1, False]
    from_ce = torch.autograd.grad(parts["teacher_ce"], gates, retain_graph=True)[0]
    assert from_ce.abs().min() > 0
    assert torch.equal(from_ce, torch.autograd.grad(sum(losses), gates)[0])


def test_without_kl_it_is_cross_entropy_of_all():
    losses, _ = ensemble_losses([Z1, Z2], (Z1 + Z2) / 2, LABEL, kl_weight=0.0)
    expected = sum(F.cross_entropy(z, LABEL) for z in (Z1, Z2, (Z1 + Z2) / 2))
    assert sum(losses).item() == pytest.approx(expected.item())


def test_a_batch_twice_is_the_same_batch():
    twice = [torch.cat([z, z]) for z in (Z1, Z2)]
    once, doubled = (ensemble_losses(z, z[1], LABEL.expand(len(z[1])))[0] for z in ([Z1, Z2], twice))
    assert [loss.item() for loss in doubled] == pytest.approx([loss.item() for loss in once])
    assert once[0].item() == pytest.approx((F.cross_entropy(Z1, LABEL) + distillation_kl(Z1, Z2)).item())
