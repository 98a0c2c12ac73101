"""Loading a saved cohort, from a folder or the Hub."""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedModel,
)
from transformers.utils import logging

import hfkd.models  # noqa: F401  registers the hfkd_* model types
from hfkd.data import Preprocessing
from hfkd.errors import InputError
from hfkd.hub.errors import explain


_PEER = re.compile(r"student_([1-9]\d*)")
_FILES = ["*.json", "model*.safetensors", "*.py", "*.yaml"]
_NETWORKS = ["student_*", "generator", "discriminator"]  # folders beside the root's


@dataclass
class Cohort:
    """The students of a saved run in their order, what they expect of images, and where they lie on this disk.

    `fresh_weights` are those of a classifier that was not saved, as that of an encoder: they are random.
    """

    students: list[PreTrainedModel]
    preprocessing: Preprocessing
    folder: Path
    fresh_weights: list[str] = field(default_factory=list)


def fetch(name: str, revision: str | None = None) -> Path:
    """The folder `name`, or a local copy of the Hub repo `name`. Raises `InputError` where there is neither."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"checkpoint {name!r} is not a folder: give one that holds config.json, or a Hub id")
    try:
        patterns = [*_FILES, *(f"{network}/{pattern}" for network in _NETWORKS for pattern in _FILES)]
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        cause = explain(error, name, huggingface_hub.constants.ENDPOINT)
        raise InputError(f"checkpoint {name!r} is neither a folder nor a repo that can be fetched: {cause}") from error


def load_cohort(
    name: str, *, trust_remote_code: bool = False, revision: str | None = None, headless: bool = False
) -> Cohort:
    """Every student of a saved cohort, in eval mode: the first at the root, its peers in student_1, student_2, ...

    Args:
        name, revision: a folder, or a repo of the Hub.
        trust_remote_code: whether the checkpoint may run its own code.
        headless: take a network whose kind has no image classifier too, a discriminator.

    Raises:
        InputError: nothing there, a generator or no image classifier, weights missing below the classifier, or code
            that needs `trust_remote_code`.
    """
    folder = fetch(name, revision)
    if holds_generator(folder):
        raise InputError(
            f"checkpoint {name!r} is a generator and no classifier: measure it with hfkd evaluate {name} --protocol "
            "generation, or look at its images with hfkd sample"
        )
    peers = [match for match in map(_PEER.fullmatch, (path.name for path in folder.iterdir())) if match]
    subfolders = ["", *(match.group() for match in sorted(peers, key=lambda match: int(match.group(1))))]
    try:
        auto_class = _auto_class(folder, trust_remote_code) if headless else AutoModelForImageClassification
        with _without_load_reports():
            loaded = [
                auto_class.from_pretrained(
                    folder,
                    subfolder=subfolder,
                    trust_remote_code=trust_remote_code,
                    use_safetensors=True,
                    output_loading_info=True,
                )
                for subfolder in subfolders
            ]
        processor: Any = AutoImageProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"checkpoint {name!r} cannot be loaded: {' '.join(str(error).split())}") from error
    students = [student.eval() for student, _ in loaded]
    fresh = [
        weight
        for (student, info), subfolder in zip(loaded, subfolders, strict=True)
        for weight in _fresh_weights(student, info["missing_keys"], str(Path(name, subfolder)))
    ]
    config = students[0].config
    preprocessing = Preprocessing.from_image_processor(processor, num_channels=getattr(config, "num_channels", 3))
    return Cohort(students, preprocessing, folder, fresh)


@contextmanager
def _without_load_reports() -> Iterator[None]:
    """What transformers would print of missing weights is known here: `Cohort.fresh_weights`, or an error."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def holds_generator(folder: Path) -> bool:
    """Whether the configuration in `folder` is that of a network with latents, and has no image classifier."""
    path = folder / "config.json"
    if not path.is_file():
        return False
    config = json.loads(path.read_text(encoding="utf-8"))
    return "latent_size" in config and "AutoModelForImageClassification" not in config.get("auto_map", {})


def _auto_class(folder: Path, trust_remote_code: bool) -> Any:
    """What loads the networks in `folder`, whose kind may have no classifier."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    by_code = "AutoModelForImageClassification" in (getattr(config, "auto_map", None) or {})
    classifies = by_code or type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    return AutoModelForImageClassification if classifies else AutoModel


def _fresh_weights(student: PreTrainedModel, missing: Iterable[str], place: str) -> list[str]:
    """The weights `missing` in the checkpoint `place`. Raises `InputError` unless all are of the classifier."""
    whole = student.base_model is student  # there is no classifier to lack
    below = sorted(name for name in missing if whole or name.startswith(f"{student.base_model_prefix}."))
    if below:
        raise InputError(f"checkpoint {place} lacks weights: {', '.join(below[:3])}: give a whole checkpoint")
    return sorted(missing)
