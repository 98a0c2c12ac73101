"""Closed forms (float64) of deep mutual learning's KL term."""

import pytest
import torch

from hfkd.losses.mutual_learning import mutual_kl
from hfkd.losses.online_adversarial import distillation_kl


Z1, Z2, Z3 = (torch.tensor([row], dtype=torch.float64) for row in ([2, 0, -1], [0, 1, 2], [1, 1, 1]))


def test_pair_in_closed_form():
    assert mutual_kl(Z1, [Z2]).item() == pytest.approx(1.8226302472, abs=1e-10)
    assert mutual_kl(Z2, [Z1]).item() == pytest.approx(1.6851240641, abs=1e-7)
    assert mutual_kl(Z1, [Z2], temperature=3.0).item() == pytest.approx(2.0883548898, abs=1e-10)


def test_peers_are_averaged_and_get_no_gradient():
    own, peers = Z1.clone().requires_grad_(), [Z2.clone().requires_grad_(), Z3.clone().requires_grad_()]
    loss = mutual_kl(own, peers)
    assert loss.item() == pytest.approx((distillation_kl(Z1, Z2, 1.0) + distillation_kl(Z1, Z3, 1.0)).item() / 2)
    loss.backward()
    # d KL(p_j || p) / dz = p - p_j, of the mean of the peers' probabilities.
    expected = Z1.softmax(1) - (Z2.softmax(1) + Z3.softmax(1)) / 2
    torch.testing.assert_close(own.grad, expected, rtol=0, atol=1e-12)
    assert peers[0].grad is None and peers[1].grad is None


def test_no_peers_are_refused():
    with pytest.raises(ValueError, match="two networks"):
        mutual_kl(Z1, [])
