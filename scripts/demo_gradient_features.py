"""The demo of gradient features: a network that learned the digits 0 to 4 becomes a classifier of all ten."""

import time
from pathlib import Path
from typing import Any

import datasets
from torch import Tensor

from hfkd.data import DataArguments, find_columns, load_image_datasets
from hfkd.evaluation.cohort import accuracy
from hfkd.evaluation.statistics import describe_difference, paired_accuracy_difference
from hfkd.trainers.checkpointing import check_no_other_run

from .demo_parts import logits_on_test, one_thread, reload, right
from .methods import Method, find_method
from .options import check_values, read_yaml, resolved
from .present import percent
from .train import repeats, train


METHOD = "gradient-features"
RECIPE = "digits.yaml"
# What each mode learns on top of the same base; the full model's folder is the demo's own.
MODES = {
    "activation": "logistic regression on its activations",
    "gradient": "linear classifier on its gradients",
    "full": "linear classifier on both (the paper's)",
    "finetune": "fine-tuning of its last block",
}
# A pair of which only the first is kept: AFD wants two or more.
BASE: dict[str, Any] = {
    "students": ["resnet8", "resnet8"],
    "normalization": "digits",
    "horizontal_flip": False,
    "validation_size": 0,
    "num_train_epochs": 15,
    "per_device_train_batch_size": 32,
    "learning_rate": 0.05,
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_strategy": "epoch",
}
KNOWN = 5  # digits that the base learns
CAVEAT = "The error is that of {:,} images and one seed; `hfkd study` measures several."


def demo(output_dir: Path) -> None:
    """Train the base and four classifiers on it, compare them, reload the full one, and say where everything lies."""
    started = time.monotonic()
    method = find_method(METHOD)
    settings = _settings(method, output_dir)
    full = resolved(method.dataclasses(), settings["full"])
    check_no_other_run(output_dir, repeats(output_dir, full))  # before the base takes its time
    with one_thread():
        print(f"1/3  training the base: a pair of ResNets that teach each other the digits 0 to {KNOWN - 1} (AFD)")
        _train_base(output_dir)
        for mode, options in settings.items():
            print(f"2/3  all ten digits from 200 labels: {MODES[mode]}", flush=True)
            train(method, options, show_logs=False)
        print("3/3  measuring on digits that nothing was trained on, and reloading in a new process", flush=True)
        print(_comparison({mode: Path(options["output_dir"]) for mode, options in settings.items()}))
        print(reload(output_dir, "the full model"))
    print(_closing(output_dir, time.monotonic() - started))


def _settings(method: Method, output_dir: Path) -> dict[str, dict[str, Any]]:
    recipe = method.recipes / RECIPE
    common = check_values(read_yaml(recipe), method.dataclasses(), str(recipe))
    common |= {"base": str(output_dir / "base"), "save_strategy": "no"}
    folders = {mode: output_dir if mode == "full" else output_dir / mode for mode in MODES}
    return {mode: {**common, "mode": mode, "output_dir": str(folder)} for mode, folder in folders.items()}


def _train_base(output_dir: Path) -> None:
    """On those of the images that the recipe takes labels from which show a known digit."""
    digits = load_image_datasets(DataArguments(train_split="train[:800]", validation_size=0)).train
    label = find_columns(digits.features).label_column
    names = digits.features[label].names[:KNOWN]
    known = digits.select([row for row, digit in enumerate(digits[label]) if digit < KNOWN])
    folder = output_dir / "known_digits"
    folder.mkdir(parents=True, exist_ok=True)
    known.cast_column(label, datasets.ClassLabel(names=names)).to_parquet(folder / "train.parquet")
    base = {"dataset_name": str(folder), "output_dir": str(output_dir / "base")}
    train(find_method("online-adversarial"), {**BASE, **base}, show_logs=False)


def _comparison(folders: dict[str, Path]) -> str:
    scores: dict[str, Tensor] = {}
    for mode, folder in folders.items():
        logits, labels = logits_on_test(folder)
        scores[mode] = logits[:, 0]
    n = len(labels)
    lines = [f"  {MODES[mode]:<42}{percent(accuracy(found, labels), n)}" for mode, found in scores.items()]
    words = []
    for other in ("activation", "gradient", "finetune"):
        difference = paired_accuracy_difference(right(scores["full"], labels), right(scores[other], labels))
        words.append(f"  {describe_difference(difference, 'the classifier on both', MODES[other])}")
    title = f"\naccuracy on {n:,} test digits, ± standard error; all on one base that never saw a 5, 6, 7, 8 or 9"
    return "\n".join([title, *lines, "\nin words", *words, f"  {CAVEAT.format(n)}\n"])


def _closing(output_dir: Path, seconds: float) -> str:
    base = f"hfkd train {METHOD} --config digits --base {output_dir}/base"
    return f"""done in {seconds:.0f} s; what lies in {output_dir}:
  .             the full model, its processor, its code, the card README.md, and every option of the run in run.yaml
  base/         the base network and its peer, trained on known_digits/
  activation/, gradient/, finetune/   what the full model is compared with

try next:
  hfkd evaluate {output_dir}
  {base} --theta2 2 --output_dir runs/two-blocks
  {base} --gradient_theta1 random --output_dir runs/random-gradients
  hfkd push {output_dir} YOUR_NAME/digits-gradient-features"""
