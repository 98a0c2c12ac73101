"""One prediction from several crops of an image."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def mean_prediction(logits: Sequence[Tensor], several_labels: bool) -> Tensor:
    """Logits (N, C) of the mean over T crops of the probabilities that T tensors of logits (N, C) give.

    The gradient-features paper (arXiv 2004.05529, section 4) averages over ten random crops and does not say what;
    probabilities are inferred. A single crop's logits are given back as they are.

    Args:
        several_labels: probabilities are a sigmoid for each class, and otherwise a softmax over the classes. The
            logits of a softmax are then normalised ones, log-probabilities.
    """
    if len(logits) == 1:
        return logits[0]
    stacked, count = torch.stack(list(logits)), math.log(len(logits))
    if several_labels:
        return F.logsigmoid(stacked).logsumexp(dim=0) - F.logsigmoid(-stacked).logsumexp(dim=0)
    return stacked.log_softmax(dim=-1).logsumexp(dim=0) - count
