"""The model code that goes with the weights, so that a saved cohort loads where hfkd is not installed.

How transformers 5.23 finds the code that a config.json's `auto_map` names, for a folder and for a Hub repo alike:
`from_pretrained(repo, subfolder="student_1", trust_remote_code=True)` and `pipeline(task, model=repo,
model_kwargs={"subfolder": "student_1"}, trust_remote_code=True)` take config, weights and image processor from the
subfolder but the code from the ROOT; `from_pretrained("folder/student_1", ...)` takes the code from `student_1`. So
each network's files go beside its config and to the root. Families differ in their file names, hence can share it.
"""

import filecmp
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from hfkd.errors import InputError


_PEER_FOLDER = re.compile(r"student_[1-9]\d*|generator|discriminator")


def cohort_folders(count: int) -> list[str]:
    """Where the students of a cohort lie: the first at the root, its peers in student_1, student_2, ..."""
    return ["", *(f"student_{index}" for index in range(1, count))]


def student_folder(folder: Path | str, index: int) -> Path:
    """Where student `index` of a cohort lies."""
    return Path(folder) / cohort_folders(index + 1)[index]


def peer_folders(folder: Path | str) -> list[Path]:
    """The subfolders of `folder` named as networks beside the root's: student_1, ..., generator, discriminator."""
    return [path for path in sorted(Path(folder).iterdir()) if path.is_dir() and _PEER_FOLDER.fullmatch(path.name)]


def write_code(
    models: Sequence[PreTrainedModel], folder: Path | str, subfolders: Sequence[str] | None = None
) -> list[Path]:
    """Copy the code of all custom models saved in `folder` to its root and beside each one's config.

    `models` are already saved in `subfolders`, by default those of a cohort. Stock transformers models have no
    code to copy. Returns the files written.

    Raises:
        InputError: two models bring different files of one name, or a config names code that no model brought.
    """
    from hfkd.models import code_files

    root = Path(folder)
    written: list[Path] = []
    for subfolder, model in zip(subfolders or cohort_folders(len(models)), models, strict=True):
        sources = code_files(model)
        for place in dict.fromkeys((root, root / subfolder)):
            written += [_copy(source, place / source.name, written) for source in sources]
        _check_auto_map(root / subfolder, root)
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
