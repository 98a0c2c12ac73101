"""What the demos share: measuring a saved folder on its test images, and loading it in a process of its own."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hfkd.data import DataArguments, ImageDatasets, load_image_datasets, make_source
from hfkd.errors import RunError

from .checkpoint import Cohort, load_cohort
from .evaluate import logits_over
from .measured_data import data_of_run
from .options import build


# A new process: what a user does who has only the folder.
RELOAD = """
import sys
from transformers import pipeline
classifier = pipeline("image-classification", model=sys.argv[1], trust_remote_code=True)
print(classifier(sys.argv[2], top_k=1)[0]["label"])
"""


@contextmanager
def one_thread() -> Iterator[None]:
    """Images of 8x8 are too small to share, and threads of a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def data_of(folder: Path) -> ImageDatasets:
    """The data that the run in `folder` was made with."""
    (arguments,) = build([DataArguments], data_of_run(folder))
    return load_image_datasets(arguments)


def logits_on_test(folder: Path) -> tuple[Tensor, Tensor]:
    """Logits (N, S, K) of the S students in `folder` over the N test images of their run, and the labels (N,)."""
    return logits_of(load_cohort(str(folder)), data_of(folder))


def logits_of(cohort: Cohort, data: ImageDatasets) -> tuple[Tensor, Tensor]:
    """The same of students that are loaded, and of images that are."""
    assert data.test is not None  # the recipes ask for test images
    return logits_over(cohort, make_source(data.test, data.columns, cohort.preprocessing), torch.device("cpu"))


def right(scores: Tensor, labels: Tensor) -> Any:
    """For each row of `scores` (N, K) whether it is highest at its label, as a numpy array (N,)."""
    return (scores.argmax(dim=1) == labels).numpy()


def reload(folder: Path, name: str = "student 0", data: ImageDatasets | None = None) -> str:
    """Classify one test digit with the model in `folder`, called `name`, in a new process; one line on how it went.

    The digit is of `data`, by default of the folder's run.

    Raises:
        RunError: the model does not load there.
    """
    data = data or data_of(folder)
    assert data.test is not None and data.columns.class_names is not None
    example = data.test[0]
    image: Image.Image = example[data.columns.image_column]
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "digit.png"
        image.save(path)
        command = [sys.executable, "-c", RELOAD, str(folder), str(path)]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        last = result.stderr.strip().rpartition("\n")[2]
        raise RunError(f"{folder}: the saved {name} could not be loaded in a new process: {last}")
    truth = data.columns.class_names[example[data.columns.label_column]]
    return f"  a new process loaded {name} from {folder} and read a {truth} as {result.stdout.strip()}\n"
