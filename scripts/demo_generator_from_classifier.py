"""The demo of GBC: digits out of the weights of a classifier, by a generator that has seen no digit."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hfkd.errors import RunError
from hfkd.trainers.checkpointing import check_no_other_run

from .demo_parts import one_thread
from .evaluate_generation import GenerationArguments, describe_generation, evaluate_generation
from .generation_card import PICTURE
from .methods import find_method
from .options import check_values, read_yaml, resolved
from .train import repeats, train


METHOD, CLASSIFIER = "generator-from-classifier", "max-margin"
RECIPE = "digits.yaml"
IMAGES = 1000
# A new process: what a user does who has only the folder.
RELOAD = """
import sys
from transformers import AutoModel
generator = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
print(*generator.sample(1, labels=[7], seed=0).shape[1:], sep=" x ")
"""
READING = """  sqrt stationarity: how far images are from explaining the classifier's weights; 0: fully, 1: not at all.
  Correlations are with real digits of the class, and diversity is the spread within a class against theirs.
  Judge: {judge}. One seed; `hfkd study` measures several."""


def demo(output_dir: Path) -> None:
    """Train the classifier and, from its weights alone, the generator; measure it, reload it, say where all lies."""
    started = time.monotonic()
    runs = {CLASSIFIER: output_dir / "classifier", METHOD: output_dir}
    settings = {name: _settings(name, folder) for name, folder in runs.items()}
    settings[METHOD]["classifiers"] = [str(runs[CLASSIFIER])]
    options = resolved(find_method(METHOD).dataclasses(), settings[METHOD])
    check_no_other_run(output_dir, repeats(output_dir, options))  # before the classifier takes its time
    with one_thread():
        print("1/3  training a classifier on 100 digits, in full batches with weight decay", flush=True)
        train(find_method(CLASSIFIER), settings[CLASSIFIER], show_logs=False)
        print("2/3  training a generator from the classifier's weights; it sees no image", flush=True)
        train(find_method(METHOD), settings[METHOD], show_logs=False)
        print("3/3  comparing its images with digits that nothing was trained on, and reloading it", flush=True)
        print(_comparison(output_dir))
        print(_reload(output_dir))
    print(_closing(output_dir, time.monotonic() - started))


def _settings(name: str, folder: Path) -> dict[str, Any]:
    method = find_method(name)
    recipe = method.recipes / RECIPE
    values = check_values(read_yaml(recipe), method.dataclasses(), str(recipe))
    return {**values, "save_strategy": "no", "output_dir": str(folder)}


def _comparison(folder: Path) -> str:
    arguments = GenerationArguments(num_images=IMAGES, update_card=True)
    result = evaluate_generation(str(folder), {}, arguments)
    title = f"\n{IMAGES:,} generated digits; the same measures of other images beside them"
    return "\n".join([title, describe_generation(result), READING.format(judge=result["settings"]["judge"]), ""])


def _reload(folder: Path) -> str:
    """Draw a digit in a new process; one line on how it went. Raises `RunError` where the folder does not load."""
    result = subprocess.run([sys.executable, "-c", RELOAD, str(folder)], capture_output=True, text=True)
    if result.returncode:
        last = result.stderr.strip().rpartition("\n")[2]
        raise RunError(f"{folder}: the saved generator could not be loaded in a new process: {last}")
    return f"  a new process loaded the generator from {folder} and drew a 7 of {result.stdout.strip()} values\n"


def _closing(output_dir: Path, seconds: float) -> str:
    return f"""done in {seconds:.0f} s; what lies in {output_dir}:
  .             the generator, its code, the card README.md, and every option of the run in run.yaml
  samples.png   its images, a row for each class
  {PICTURE}   an image of each class, and on its right the classifier's training images that are most like it
  classifier/   what it was born from: the only one that saw digits

try next:
  hfkd sample {output_dir} --labels 3 8 --output digits.png
  hfkd evaluate {output_dir} --protocol generation
  hfkd demo {METHOD} --toy
  hfkd push {output_dir} YOUR_NAME/digits-born-from-a-classifier"""
