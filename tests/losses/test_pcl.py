"""Closed forms (float64) of PCL's mean teachers."""

import pytest
import torch

from hfkd.losses.online_adversarial import distillation_kl
from hfkd.losses.pcl import mean_teacher_decay, mean_teacher_kl


Z1, Z2, Z3 = (torch.tensor([row], dtype=torch.float64) for row in ([2, 0, -1], [0, 1, 2], [1, 1, 1]))


def test_decay_is_a_running_mean_up_to_its_limit():
    assert [mean_teacher_decay(g) for g in (1, 2, 4, 1000, 10**6)] == [0, 0.5, 0.75, 0.999, 0.999]
    values, average = [3.0, 5.0, 10.0, 2.0], 0.0
    for g, value in enumerate(values, start=1):
        decay = mean_teacher_decay(g)
        average = decay * average + (1 - decay) * value
    assert average == pytest.approx(sum(values) / 4)


def test_each_peer_learns_from_the_mean_teachers_of_the_others():
    found = mean_teacher_kl([Z1, Z2, Z3], [Z2, Z3, Z1])
    expected = [
        (distillation_kl(Z1, Z3) + distillation_kl(Z1, Z1)) / 2,
        (distillation_kl(Z2, Z2) + distillation_kl(Z2, Z1)) / 2,
        (distillation_kl(Z3, Z2) + distillation_kl(Z3, Z3)) / 2,
    ]
    assert [kl.item() for kl in found] == pytest.approx([kl.item() for kl in expected])


def test_pair_in_closed_form_and_mean_teachers_are_targets():
    logits, means = ([z.clone().requires_grad_() for z in (Z1, Z2)] for _ in range(2))
    found = mean_teacher_kl(logits, means)
    assert [kl.item() for kl in found] == pytest.approx([2.0883548898, 2.1408159385])
    sum(found).backward()
    assert all(z.grad is not None for z in logits) and all(z.grad is None for z in means)


def test_a_single_peer_is_refused():
    with pytest.raises(ValueError, match="two networks"):
        mean_teacher_kl([Z1], [Z2])
