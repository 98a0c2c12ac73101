"""Losses of deep mutual learning (Zhang, Xiang, Hospedales and Lu, CVPR 2018, arXiv 1706.00384)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hfkd.losses.online_adversarial import distillation_kl


def mutual_kl(logits: Tensor, peers: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
    """1/(m-1) sum over peers j of T^2 KL(softmax(z_j / T) || softmax(z / T)) (paper, eq. 9; there T = 1).

    Args:
        logits: (N, K) logits of the network that learns.
        peers: those of the others, (N, K) each; they are targets, and get no gradient.
        temperature: T > 0. With T = 3 this is the form in which ONE and AFD compare with the method.

    Raises:
        ValueError: no peers, shapes that differ, or a temperature that is not positive.
    """
    if not peers:
        raise ValueError("peers is empty: mutual learning needs two networks or more")
    return torch.stack([distillation_kl(logits, peer, temperature) for peer in peers]).mean()
