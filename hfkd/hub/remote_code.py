"""The model code that goes with the weights, so that a saved cohort loads where hfkd is not installed.

How transformers 5.23 finds the code that a config.json's `auto_map` names, for a folder and for a Hub repo alike:
`from_pretrained(repo, subfolder="student_1", trust_remote_code=True)` and `pipeline(task, model=repo,
model_kwargs={"subfolder": "student_1"}, trust_remote_code=True)` take config, weights and image processor from the
subfolder but the code from the ROOT; `from_pretrained("folder/student_1", ...)` takes the code from `student_1`. So
each network's files go beside its config and to the root. Families differ in their file names, hence can share it.
"""

import filecmp
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from hfkd.errors import InputError


def student_folder(folder: Path | str, index: int) -> Path:
    """Where student `index` of a cohort lies: the first at the root, its peers in student_1, student_2, ..."""
    return Path(folder) if index == 0 else Path(folder) / f"student_{index}"


def write_code(models: Sequence[PreTrainedModel], folder: Path | str) -> list[Path]:
    """Copy the code of all custom models of a saved cohort to the root of `folder` and beside each one's config.

    `models` are in cohort order, and already saved there. Stock transformers models have no code to copy. Returns the
    files written.

    Raises:
        InputError: two models bring different files of one name, or a config names code that no model brought.
    """
    from hfkd.models import code_files

    written: list[Path] = []
    for index, model in enumerate(models):
        sources = code_files(model)
        for place in dict.fromkeys((Path(folder), student_folder(folder, index))):
            written += [_copy(source, place / source.name, written) for source in sources]
        _check_auto_map(student_folder(folder, index), Path(folder))
    return list(dict.fromkeys(written))


def _copy(source: Path, target: Path, written: list[Path]) -> Path:
    if target in written and not filecmp.cmp(source, target, shallow=False):
        raise InputError(f"{target.name}: two students bring different code files of this name; rename one of them")
    if not (target.exists() and target.samefile(source)):
        shutil.copyfile(source, target)
    return target


def _check_auto_map(place: Path, root: Path) -> None:
    auto_map = json.loads((place / "config.json").read_text(encoding="utf-8")).get("auto_map", {})
    for reference in auto_map.values():
        module = reference.split(".")[0]
        if "--" not in reference and not (root / f"{module}.py").is_file():  # REPO--module.Class lies in that repo
            raise InputError(f"{place / 'config.json'}: needs {module}.py, which its model's code does not include")
