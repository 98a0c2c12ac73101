"""A generator's parents: classifiers that its training must not change, and that no checkpoint holds."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import TrainOutput

from hfkd.errors import InputError, RunError
from hfkd.evaluation.image_grid import class_grid
from hfkd.model_cards import Parent, Picture

from .checkpointing import STATE_FOLDER
from .convergence import ConvergenceConditions
from .draws import DrawsOnlyTrainer


FINGERPRINTS = "classifiers.json"  # in a checkpoint's training state
PICTURED_CLASSES, PICTURED_IMAGES = 16, 10  # rows and columns of the card's pictures


class ParentClassifiers(DrawsOnlyTrainer):
    """The part of a trainer that is about the classifiers: that they are the same always, and stand in the card."""

    @property
    def conditions(self) -> list[ConvergenceConditions]:
        """Those of each classifier, in their order."""
        return list(self.model.teachers)  # type: ignore[arg-type]

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `DistillationTrainer`.

        Raises:
            RunError: also where a classifier has changed on the way, as nothing may do that.
        """
        before = self._fingerprints()
        output = super().train(*args, **kwargs)
        if before != self._fingerprints():
            raise RunError("a classifier's weights or statistics changed during training: a callback must not do that")
        return output

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _fingerprints(self) -> list[str]:
        return [one.fingerprint() for one in self.conditions]

    def _save_training_state(self, folder: Path, generators: list[dict[str, Any]]) -> None:
        super()._save_training_state(folder, generators)
        (folder / STATE_FOLDER / FINGERPRINTS).write_text(json.dumps(self._fingerprints()), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As in `Checkpointing`.

        Raises:
            InputError: also where the checkpoint is of a run with other classifiers.
        """
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = Path(resume_from_checkpoint) / STATE_FOLDER / FINGERPRINTS
        if not file.is_file():
            raise InputError(f"{file} is missing: this checkpoint cannot be resumed, choose another one")
        saved = json.loads(file.read_text(encoding="utf-8"))
        # As many as there are classes for in the generator's configuration, which has been compared.
        for number, (before, now) in enumerate(zip(saved, self._fingerprints(), strict=True)):
            if before != now:
                raise InputError(
                    f"classifier {number} is not the one that {resume_from_checkpoint} was trained on (its weights, "
                    "statistics, or its processor's mean and deviation differ): resume with that one, or start anew"
                )

    # -- the card ----------------------------------------------------------------------------------------------------

    def _parents(self) -> Iterator[Parent]:
        for one in self.conditions:
            if name := getattr(one.classifier.config, "_name_or_path", ""):
                yield Parent.of("classifier", name)

    def card_settings(self) -> dict[str, Any]:
        """What was found in the classifiers comes first: the margin's scale, and which parameters are stationary."""
        found: dict[str, Any] = {}
        for k, one in enumerate(self.conditions):
            place = "" if len(self.conditions) == 1 else f" of classifier {k}"
            found[f"margin{place}"] = round(one.margin_scale, 4)
            found[f"stationary parameters{place}"] = ", ".join(one.stationary)
        return found | super().card_settings()

    def draw_pictures(self, folder: Path) -> Iterator[Picture]:
        """Samples of each class, a row each, and the same latents in every card; points in a plane have no picture."""
        generator: Any = self.model.students[0]
        if generator.config.image_size == 1:
            return
        for k, one in enumerate(self.conditions):
            count = min(one.num_labels, PICTURED_CLASSES)
            labels = torch.arange(count).repeat_interleave(PICTURED_IMAGES)
            images = generator.sample(len(labels), labels=labels, seed=0, classifier_index=k)
            name = f"samples_{k}.png" if k else "samples.png"
            class_grid(images.cpu(), labels).save(folder / name)
            of = f" of classifier {k}" if len(self.conditions) > 1 else ""
            yield Picture(name, f"Images drawn at random, a row for each class{of}")
