"""Networks that a training learns from and must not change, and that no checkpoint holds."""

import json
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from transformers.trainer_utils import TrainOutput

from hfkd.errors import InputError, RunError

from .base import DistillationTrainer
from .checkpointing import STATE_FOLDER


class FrozenParents(DistillationTrainer):
    """The part of a trainer that sees to it that its parents are the same always, also in a resumed run."""

    parent_role: ClassVar[str]  # what a message calls one of them

    def fingerprints(self) -> list[str]:
        """A digest of each parent's state, in their order."""
        raise NotImplementedError

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `DistillationTrainer`.

        Raises:
            RunError: also where a parent has changed on the way, as nothing may do that.
        """
        before = self.fingerprints()
        output = super().train(*args, **kwargs)
        if before != self.fingerprints():
            raise RunError(
                f"a {self.parent_role}'s weights or statistics changed during training: a callback must not do that"
            )
        return output

    @property
    def _fingerprint_file(self) -> str:
        return f"{STATE_FOLDER}/{self.parent_role}s.json"

    def _save_training_state(self, folder: Path, generators: list[dict[str, Any]]) -> None:
        super()._save_training_state(folder, generators)
        if fingerprints := self.fingerprints():
            (folder / self._fingerprint_file).write_text(json.dumps(fingerprints), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As in `Checkpointing`.

        Raises:
            InputError: also where the checkpoint is of a run with other parents.
        """
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        file, found = Path(resume_from_checkpoint) / self._fingerprint_file, self.fingerprints()
        if found and not file.is_file():
            raise InputError(f"{file} is missing: this checkpoint cannot be resumed, choose another one")
        saved = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        if len(saved) != len(found):
            raise InputError(
                f"{resume_from_checkpoint} was trained on {len(saved)} {self.parent_role}(s) and this run has "
                f"{len(found)}: resume with those, or start anew"
            )
        for number, (before, now) in enumerate(zip(saved, found, strict=True)):
            if before != now:
                raise InputError(
                    f"{self.parent_role} {number} is not the one that {resume_from_checkpoint} was trained on (its "
                    "weights, statistics, or how its input is normalised differ): resume with that one, or start anew"
                )
