"""What is measured of one classifier."""

from torch import Tensor

from hfkd.evaluation.cohort import TOP_K, accuracy, top_k_accuracy
from hfkd.evaluation.metrics import ElevenPointAveragePrecision, MeanAveragePrecision
from hfkd.losses.gradient_features import classification_loss


def classifier_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """`loss` (mean, nats), and how right `logits` (N, C) are, all in [0, 1].

    With integer labels (N,) that is `accuracy` and, of more than five classes, `top5_accuracy`; with float labels
    (N, C) of zeros and ones `mean_average_precision` (area) and `mean_average_precision_11_point` (VOC 2007's).

    Raises:
        InputError: labels of another kind, or several labels per image of which none occurs.
    """
    metrics = {"loss": classification_loss(logits, labels).item()}
    if labels.dim() == 1:
        metrics["accuracy"] = accuracy(logits, labels)
        if logits.shape[1] > TOP_K:
            metrics["top5_accuracy"] = top_k_accuracy(logits, labels)
        return metrics
    scores, targets = logits.double().numpy(), labels.long().numpy()
    for metric in (MeanAveragePrecision(), ElevenPointAveragePrecision()):
        metrics |= metric.compute(predictions=scores, references=targets)
    return metrics
