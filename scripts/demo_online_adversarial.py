"""The demo of AFD: a pair that learns together against the same two students, each on its own."""

import time
from pathlib import Path
from typing import Any

from torch import Tensor

from hfkd.evaluation.cohort import cohort_metrics, ensemble_scores
from hfkd.evaluation.statistics import describe_difference, paired_accuracy_difference

from .demo_parts import logits_on_test, one_thread, reload, right
from .methods import find_method
from .options import check_values, read_yaml
from .present import percent
from .train import train


METHOD = "online-adversarial"
# 200 labels, and 1,597 test images: on the usual split one image decides.
RECIPE = "digits.yaml"
# The same students, seeds and batches, without anything between them.
ALONE: dict[str, Any] = {"kl_weight": 0.0, "feature_loss": "none"}
CAVEAT = "The error is that of 1,597 images; another seed moves the numbers too, which `hfkd study` measures."


def demo(output_dir: Path) -> None:
    """Train both, compare them on the test images, reload a student, and say where everything lies."""
    started = time.monotonic()
    with one_thread():
        _train_both(output_dir)
        print("3/3  measuring both on the other 1,597 digits, and reloading a student in a new process", flush=True)
        print(_comparison(output_dir))
        print(reload(output_dir))
    print(_closing(output_dir, time.monotonic() - started))


def _train_both(output_dir: Path) -> None:
    method = find_method(METHOD)
    recipe = method.recipes / RECIPE
    settings = check_values(read_yaml(recipe), method.dataclasses(), str(recipe)) | {"save_strategy": "no"}
    print("1/3  training a pair of students that teach each other (AFD) on 200 labelled digits", flush=True)
    train(method, {**settings, "output_dir": str(output_dir)}, show_logs=False)
    print("2/3  training the same two students alone (cross-entropy only)", flush=True)
    train(method, {**settings, **ALONE, "output_dir": str(output_dir / "alone")}, show_logs=False)


def _comparison(output_dir: Path) -> str:
    together, labels = logits_on_test(output_dir)
    alone, _ = logits_on_test(output_dir / "alone")
    n = len(labels)
    ours, theirs = cohort_metrics(list(together.unbind(1)), labels), cohort_metrics(list(alone.unbind(1)), labels)
    rows = {f"student {k}, with its peer": ours[f"student_{k}_accuracy"] for k in range(together.shape[1])}
    rows["ensemble of the pair (mean of logits)"] = ours["ensemble_accuracy"]
    rows |= {f"student {k}, alone": theirs[f"student_{k}_accuracy"] for k in range(alone.shape[1])}
    rows["ensemble of two that learned alone"] = theirs["ensemble_accuracy"]
    lines = [f"  {name:<40}{percent(share, n)}" for name, share in rows.items()]
    pairs = [("the first student with its peer", "the same student alone", together[:, 0], alone[:, 0])]
    pairs.append(("the ensemble of the pair", "that of two that learned alone", _mean(together), _mean(alone)))
    words = []
    for a, b, scores_a, scores_b in pairs:
        difference = paired_accuracy_difference(right(scores_a, labels), right(scores_b, labels))
        words.append(f"  {describe_difference(difference, a, b)}")
    return "\n".join(
        [f"\naccuracy on {n:,} test digits, ± standard error", *lines, "\nin words", *words, f"  {CAVEAT}\n"]
    )


def _mean(logits: Tensor) -> Tensor:
    return ensemble_scores(list(logits.unbind(1)))[0]


def _closing(output_dir: Path, seconds: float) -> str:
    return f"""done in {seconds:.0f} s; what lies where:
  {output_dir}/             student 0, its processor, its code, and the card README.md
  {output_dir}/student_1/   its peer
  {output_dir}/run.yaml     every option of the run
  {output_dir}/alone/       the students that learned alone

try next:
  hfkd evaluate {output_dir}
  hfkd train {METHOD} --config {output_dir}/run.yaml --output_dir runs/three --students resnet8 resnet8 resnet14
  hfkd push {output_dir} YOUR_NAME/digits-afd"""
