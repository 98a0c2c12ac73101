"""ONE's gate: weights of sum one, and the function that is documented."""

import torch
import torch.nn.functional as F

from hfkd.models.branch_gate import BranchGate


def test_gates_sum_to_one_and_differ_by_image():
    torch.manual_seed(0)
    gates = BranchGate(6, 3)(torch.randn(20, 6))
    assert gates.shape == (20, 3) and (gates > 0).all()
    torch.testing.assert_close(gates.sum(dim=1), torch.ones(20))
    assert gates.std(dim=0).min() > 0


def test_it_is_linear_norm_relu_softmax():
    torch.manual_seed(0)
    gate, pooled = BranchGate(6, 2).double(), torch.randn(5, 6, dtype=torch.float64)
    z = F.linear(pooled, gate.layers[0].weight, gate.layers[0].bias)
    norm = (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(gate(pooled), norm.relu().softmax(1))
