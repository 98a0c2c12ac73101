"""Accuracy of a cohort: each student, their mean, and their two ensembles."""

import torch
from torch import Tensor

from hfkd.errors import InputError


TOP_K = 5


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of rows of `scores` (N, C) whose largest entry is at `labels` (N,)."""
    return (scores.argmax(dim=-1) == labels).double().mean().item()


def top_k_accuracy(scores: Tensor, labels: Tensor, k: int = TOP_K) -> float:
    """Share of rows of `scores` (N, C) with `labels` (N,) among the `min(k, C)` largest entries.

    Ties and NaN count against the label, so that constant or broken scores earn nothing.
    """
    own = scores.gather(-1, labels[:, None])
    rivals = (~(scores < own)).sum(dim=-1) - 1
    return (rivals < min(k, scores.shape[-1])).double().mean().item()


def ensemble_scores(logits: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean of the students' logits and mean of their probabilities, both (N, C).

    The two rank classes differently (a sure student weighs more in the logits), so results must say which is meant.
    """
    stacked = torch.stack(logits)
    return stacked.mean(dim=0), stacked.softmax(dim=-1).mean(dim=0)


def cohort_metrics(logits: list[Tensor], labels: Tensor) -> dict[str, float]:
    """Accuracies of K students on the same N samples, all in [0, 1].

    `logits`: K tensors (N, C); `labels`: (N,) class numbers. Keys: `student_<k>_accuracy`, `student_<k>_top5` (only
    with more than five classes), `mean_accuracy` (mean of the students') and, for two students or more,
    `ensemble_accuracy` (mean of logits) and `ensemble_prob_accuracy` (mean of softmax probabilities).

    Raises:
        InputError: no student, no sample, or shapes that do not agree.
    """
    if not logits:
        raise InputError("cohort_metrics: an empty list of logits; pass one (N, C) tensor per student.")
    shapes = {tuple(student.shape) for student in logits}
    if len(shapes) > 1 or logits[0].dim() != 2 or labels.shape != logits[0].shape[:1] or len(labels) == 0:
        raise InputError(
            f"cohort_metrics: logits of shape {sorted(shapes)} with labels of shape {tuple(labels.shape)}; "
            "every student needs (N, C) logits and the labels must be (N,) with N > 0."
        )
    metrics = {}
    for k, student in enumerate(logits):
        metrics[f"student_{k}_accuracy"] = accuracy(student, labels)
        if student.shape[-1] > TOP_K:
            metrics[f"student_{k}_top5"] = top_k_accuracy(student, labels)
    metrics["mean_accuracy"] = sum(metrics[f"student_{k}_accuracy"] for k in range(len(logits))) / len(logits)
    if len(logits) > 1:
        mean_logits, mean_probabilities = ensemble_scores(logits)
        metrics["ensemble_accuracy"] = accuracy(mean_logits, labels)
        metrics["ensemble_prob_accuracy"] = accuracy(mean_probabilities, labels)
    return metrics
