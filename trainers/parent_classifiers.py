"""A generator's parents: the classifiers that it is born from, and their place in its card."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hfkd.evaluation.image_grid import class_grid
from hfkd.model_cards import Parent, Picture

from .convergence import ConvergenceConditions
from .draws import DrawsOnlyTrainer
from .frozen_parents import FrozenParents


PICTURED_CLASSES, PICTURED_IMAGES = 16, 10  # rows and columns of the card's pictures


class ParentClassifiers(FrozenParents, DrawsOnlyTrainer):
    """The part of a trainer that is about the classifiers: that they are the same always, and stand in the card."""

    parent_role = "classifier"

    @property
    def conditions(self) -> list[ConvergenceConditions]:
        """Those of each classifier, in their order."""
        return list(self.model.teachers)  # type: ignore[arg-type]

    def fingerprints(self) -> list[str]:
        return [one.fingerprint() for one in self.conditions]

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
