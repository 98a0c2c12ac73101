"""Measured numbers as a person reads them."""

from collections.abc import Mapping

from hfkd.evaluation.statistics import proportion


# Two that rank classes differently.
_ENSEMBLES = {"ensemble_accuracy": "ensemble_of_logits", "ensemble_prob_accuracy": "ensemble_of_probabilities"}


def percent(share: float, n: int) -> str:
    """`97.31 ± 0.40 %`: a share of n images with its standard error."""
    estimate = proportion(share, n)
    return f"{100 * estimate.value:.2f} ± {100 * estimate.standard_error:.2f} %"


def accuracy_rows(metrics: Mapping[str, float], n: int) -> dict[str, str]:
    """The accuracies among `metrics`, by what they are called, in the metrics' order."""
    rows = {}
    for name, value in metrics.items():
        if name.endswith(("accuracy", "top5")) and not name.startswith("discriminator"):
            label = _ENSEMBLES.get(name, name.replace("_accuracy", ""))
            # The students of a mean were measured on the same images: a proportion's error is not its own.
            text = f"{100 * value:.2f} %" if label == "mean" else percent(value, n)
            rows[label.replace("_", " ").replace("top5", "top-5")] = text
    return rows


def precision_rows(metrics: Mapping[str, float]) -> dict[str, str]:
    """The mean average precisions among `metrics`, of data with several labels for each image, by what has them."""
    rows = {}
    for name, value in metrics.items():
        owner, found, points = name.partition("mean_average_precision")
        if found:
            rows[f"{owner}{points}".replace("_", " ").strip() or "area"] = f"{value:.4f}"
    return rows


def describe_metrics(metrics: Mapping[str, float], n: int) -> str:
    """The accuracies or precisions as `describe_accuracies` has them; where there are none, every metric."""
    if accuracy_rows(metrics, n) or precision_rows(metrics):
        return describe_accuracies(metrics, n)
    return describe_all(metrics, f"{n:,} test images")


def describe_all(metrics: Mapping[str, float], measured_on: str) -> str:
    """One line per metric, as it is."""
    width = max(map(len, metrics)) + 2
    return "\n".join([f"on {measured_on}", *(f"  {name:<{width}}{value:.4g}" for name, value in metrics.items())])


def describe_accuracies(metrics: Mapping[str, float], n: int) -> str:
    """One line per accuracy, with the standard error that n test images leave, or per mean average precision."""
    title, rows = "accuracy", accuracy_rows(metrics, n)
    if not rows:
        title, rows = "mean average precision", precision_rows(metrics)
    width = max(map(len, rows), default=0) + 2
    return "\n".join([f"{title} on {n:,} test images", *(f"  {name:<{width}}{text}" for name, text in rows.items())])
