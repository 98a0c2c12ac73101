"""Losses of PCL, peer collaborative learning (Wu and Gong, AAAI 2021, arXiv 2006.04147).

The authors' code is not public. The losses follow a public reproduction of it; what that decides says "inferred".
"""

from collections.abc import Sequence

from torch import Tensor

from hfkd.losses.mutual_learning import mutual_kl


MEAN_TEACHER_DECAY = 0.999


def mean_teacher_decay(update: int, most: float = MEAN_TEACHER_DECAY) -> float:
    """phi(g) = min(1 - 1/g, `most`): what a mean teacher keeps of itself in update g, counted from 1.

    Early on this is the plain mean of the weights after each update so far.
    """
    return min(1 - 1 / update, most)


def mean_teacher_kl(logits: Sequence[Tensor], means: Sequence[Tensor], temperature: float = 3.0) -> list[Tensor]:
    """Of each peer i: 1/(m-1) sum over j != i of T^2 KL(softmax(mean teacher j / T) || softmax(z_i / T)).

    That the mean is over the others, and never over a peer's own mean teacher, is inferred.

    Args:
        logits: (N, K) of each peer.
        means: (N, K) of each peer's mean teacher; they are targets, and get no gradient.
        temperature: T > 0.

    Raises:
        ValueError: a single peer, shapes that differ, or a temperature that is not positive.
    """
    return [
        mutual_kl(own, [mean for j, mean in enumerate(means) if j != i], temperature) for i, own in enumerate(logits)
    ]
