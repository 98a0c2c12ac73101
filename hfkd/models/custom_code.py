"""Which Python files a checkpoint has to carry so that its model loads without hfkd."""

import sys
from pathlib import Path

from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files


def code_files(model: PreTrainedModel) -> list[Path]:
    """Configuration, modeling file and their one-dot siblings, sorted; empty for classes that transformers ships.

    Works for models of this package and for models that were themselves loaded as remote code.
    """
    if not model.is_remote_code():
        return []
    files: set[Path] = set()
    for owner in (type(model), type(model.config)):
        source = sys.modules[owner.__module__].__file__
        if source is None:
            raise RuntimeError(f"{owner.__name__} was not loaded from a file")
        files.update(Path(file) for file in (source, *get_relative_import_files(source)))
    return sorted(files)
