"""The demo of squeeze-and-span: a GAN learns to draw digits, and a student learns from it to tell them apart."""

import time
from pathlib import Path
from typing import Any

from torch import Tensor

from hfkd.data import DataArguments, load_image_datasets
from hfkd.evaluation.statistics import describe_difference, paired_accuracy_difference
from hfkd.trainers.checkpointing import check_no_other_run

from .checkpoint import load_cohort
from .demo_parts import data_of, logits_of, one_thread, reload, right
from .evaluate import EvaluateArguments, evaluate
from .measured_data import data_of_run
from .methods import find_method
from .options import build, check_values, read_yaml, resolved
from .present import percent
from .probed_checkpoint import save_probed
from .probes import ProbeArguments
from .train import repeats, train


METHOD, TEACHER = "squeeze-and-span", "gan"
RECIPE = "digits.yaml"
CLASSIFIER = "classifier"  # folder of a network with what the last probe fitted
FEW = 200
# Protocol, its settings (of neighbours those of the paper's code) and data options.
PROBES: dict[str, tuple[Any, ProbeArguments, dict[str, Any]]] = {
    "200 nearest neighbours": ("knn", ProbeArguments(knn_neighbours=200, knn_temperature=0.1), {}),
    f"linear probe, {FEW} labels": ("linear-probe", ProbeArguments(), {"max_train_samples": FEW}),
    "linear probe, all labels": ("linear-probe", ProbeArguments(), {}),
}
NETWORKS = {"": "the student", "untrained": "the same network untrained"}
CAVEAT = "The error is that of {:,} images and one seed; `hfkd study` measures several."


def demo(output_dir: Path) -> None:
    """Train teacher and student, probe it beside its own first weights, reload it, and say where everything lies."""
    started = time.monotonic()
    teacher, student, untrained = _settings(output_dir)
    options = resolved(find_method(METHOD).dataclasses(), student)
    check_no_other_run(output_dir, repeats(output_dir, options))  # before the GAN takes its time
    with one_thread():
        print("1/3  training the teacher: a GAN that learns to draw digits", flush=True)
        train(find_method(TEACHER), teacher, show_logs=False)
        print("2/3  training a student on the GAN's features and images, and on real ones; no labels", flush=True)
        for settings in (student, untrained):
            train(find_method(METHOD), settings, show_logs=False)
        print("3/3  probing it with digits that nothing was trained on, and reloading it in a new process", flush=True)
        print(_comparison(output_dir))
        print(reload(output_dir / CLASSIFIER, "the probed student", data_of(output_dir)))
    print(_closing(output_dir, time.monotonic() - started))


def _settings(output_dir: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Of teacher and student, and of a run without an epoch, which leaves the weights that the student starts from."""
    teacher = {**_recipe(TEACHER), "output_dir": str(output_dir / "teacher")}
    student = {**_recipe(METHOD), "generator": teacher["output_dir"], "output_dir": str(output_dir)}
    return teacher, student, {**student, "num_train_epochs": 0.0, "output_dir": str(output_dir / "untrained")}


def _recipe(name: str) -> dict[str, Any]:
    method = find_method(name)
    recipe = method.recipes / RECIPE
    return {**check_values(read_yaml(recipe), method.dataclasses(), str(recipe)), "save_strategy": "no"}


def _comparison(output_dir: Path) -> str:
    found = [_probe(output_dir / folder) for folder in NETWORKS]
    n = len(found[0][2])
    lines = ["".join([" " * 28, *(f"{name:>28}" for name in NETWORKS.values())])]
    for probe in PROBES:
        lines.append("".join([f"  {probe:<26}", *(f"{percent(shares[probe], n):>28}" for shares, _, _ in found)]))
    difference = paired_accuracy_difference(*(right(logits, labels) for _, logits, labels in found))
    words = f"in words, by all labels\n  {describe_difference(difference, *NETWORKS.values())}"
    return "\n".join([f"\naccuracy on {n:,} test digits, ± standard error", *lines, words, f"  {CAVEAT.format(n)}\n"])


def _probe(folder: Path) -> tuple[dict[str, float], Tensor, Tensor]:
    """The accuracy by each probe; logits (N, C) of the last one on the test images, and their labels (N,).

    The network is saved with the classifier that the last probe has fitted.
    """
    cohort = load_cohort(str(folder), headless=True)
    shares = {}
    for name, (protocol, settings, changes) in PROBES.items():
        (arguments,) = build([DataArguments], {**data_of_run(folder), **changes})
        data = load_image_datasets(arguments)
        result, probed = evaluate(cohort, data, arguments, EvaluateArguments(protocol=protocol), settings)
        shares[name] = result["metrics"]["student_0_accuracy"]
    save_probed(cohort, str(folder), probed, data, str(folder / CLASSIFIER))
    logits, labels = logits_of(cohort, data)
    return shares, logits[:, 0], labels


def _closing(output_dir: Path, seconds: float) -> str:
    return f"""done in {seconds:.0f} s; what lies in {output_dir}:
  .             the student's backbone, its processor, its code, the card README.md, and every option in run.yaml
  {CLASSIFIER}/   the student with the classifier that the probe fitted, for AutoModelForImageClassification
  teacher/      the GAN's generator, and its discriminator; samples.png shows its digits
  untrained/    what the student started from

try next:
  hfkd sample {output_dir}/teacher --output digits.png
  hfkd evaluate {output_dir} --protocol linear-probe --probe sgd
  hfkd train {METHOD} --config {output_dir}/run.yaml --synthetic_share 1 --output_dir runs/no-real-image
  hfkd push {output_dir} YOUR_NAME/digits-squeeze-and-span"""
