"""Students that each see an augmented version of their own of every image."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hfkd.data import ImageSource, view_name
from hfkd.models import ClassifierFeatures

from .cohort import CohortTrainer


class OwnViewsTrainer(CohortTrainer):
    """The part of a trainer that follows the setting `independent_views` of its Config.

    Student k sees view k of each image; without the setting, and in evaluation, all see the same.
    """

    args: Any

    def __init__(self, students: Sequence[PreTrainedModel], args: Any = None, *parts: Any, **named: Any) -> None:
        args = args or self.config_class()
        several = args.independent_views and isinstance(students, Sequence)  # what is no list is refused below
        self.views = len(students) if several else 1
        super().__init__(students, args, *parts, **named)

    def views_of(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """The pixel values (N, C, H, W) that each student sees."""
        count = len(self.model.students)
        return [batch[view_name("pixel_values", k if self.views > 1 else 0)] for k in range(count)]

    def training_features(self, batch: dict[str, Tensor]) -> list[ClassifierFeatures]:
        if self.views == 1:
            return super().training_features(batch)
        with self.autocast():
            return [adapter(seen) for adapter, seen in zip(self.adapters, self.views_of(batch), strict=True)]

    def _eval_source(self, dataset: Any, name: str = "eval") -> ImageSource:
        return super()._eval_source(dataset, name).variant(views=1)
