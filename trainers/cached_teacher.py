"""Distilling from logits that the teachers gave once for all epochs: for losses that need no more of a teacher."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hfkd.data.row_store import check_unchanging
from hfkd.data.teacher_cache import TeacherCache, open_teacher_cache
from hfkd.errors import InputError
from hfkd.models import ClassifierFeatures
from hfkd.models.activation_cut import IRRELEVANT_SETTINGS

from .cohort import CohortConfig, CohortTrainer
from .config import check_range
from .feature_maps import full_precision
from .networks import state_fingerprint
from .shared_store import shared_store


@dataclass
class CachedTeacherConfig(CohortConfig):
    """The settings of `CachedTeacher`."""

    teacher_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the teachers' logits of all training images, computed once and used again by later "
            "runs; needs augmentation=none (default: computed at each step)."
        },
    )
    teacher_cache_top_k: int | None = field(
        default=None,
        metadata={
            "help": "Classes of an image whose logits are kept, 4 bytes each; the others share what is left, which is "
            "for kd alone (default: all classes)."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_cache_dir is None:
            self.refuse_changed(["teacher_cache_top_k"], "teacher_cache_dir=None")
        if self.teacher_cache_top_k is not None:
            check_range("teacher_cache_top_k", self.teacher_cache_top_k, 1)


class CachedTeacher(CohortTrainer):
    """The part of a trainer that keeps what its teachers say of the training images.

    With `teacher_cache_dir` no step runs a teacher: `losses` gets the features of the students alone, and
    `teacher_logits` gives what the teachers gave. Without it `losses` gets the teachers' features, as in
    `CohortTrainer`.

    Raises:
        InputError: augmented training images, or no teacher.
    """

    args: CachedTeacherConfig
    train_dataset: Any
    _cache: TeacherCache | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._cached and self.train_dataset is not None:
            check_unchanging(self.train_dataset, TeacherCache.setting)
        if self._cached and not self.model.frozen():
            raise InputError(f"{TeacherCache.setting}={self.args.teacher_cache_dir} needs a teacher: pass one or more")

    @property
    def _cached(self) -> bool:
        return self.args.teacher_cache_dir is not None

    # -- what a method may define ------------------------------------------------------------------------------------

    def combine_teachers(self, logits: Sequence[Tensor]) -> Tensor:
        """The logits (N, K) that teach, of those (N, K) of each teacher: by default their mean.

        One that does otherwise also says so by `combination`.
        """
        return torch.stack(list(logits)).mean(dim=0)

    def combination(self) -> str:
        """What `combine_teachers` does, with the settings that it depends on: part of a cache's identity."""
        return "mean of logits"

    # -- what a method asks ------------------------------------------------------------------------------------------

    def teacher_logits(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """The kept logits (N, K) that teach, in full precision; None where teachers are run at each step.

        `losses` then has their features, and `combine_teachers` of their `logits_of` is the same to float rounding.
        """
        return None if self._cache is None else self._cache.gather(batch["index"])

    def training_features(self, batch: dict[str, Tensor]) -> list[ClassifierFeatures]:
        if self._cache is None:
            return super().training_features(batch)
        with self.autocast():
            return [adapter(batch["pixel_values"]) for adapter in self.adapters[: len(self.model.students)]]

    # -- the cache ---------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        if self._cached:
            self._open_cache(str(self.args.teacher_cache_dir))
        return super().get_train_dataloader()

    def _open_cache(self, folder: str) -> None:
        """Rank 0 fills the cache where there is none; then the others open it."""
        if self._cache is not None:
            return
        source = self.train_dataset

        def encode(inputs: Mapping[str, Any]) -> Tensor:
            pixel_values = self._materialise(source, dict(inputs))["pixel_values"]
            with self.autocast():
                logits = [teacher(pixel_values).logits for teacher in self.model.frozen()]
            return self.combine_teachers([full_precision(one) for one in logits])

        def fill() -> TeacherCache:
            return open_teacher_cache(
                folder,
                source,
                encode,
                self._teacher_identity(),
                top_k=self.args.teacher_cache_top_k,
                batch_size=self.args.eval_batch_size,
                workers=self.args.dataloader_num_workers,
            )

        first = self.is_world_process_zero()
        self._cache = shared_store(TeacherCache.setting, first, fill, lambda: TeacherCache(folder))

    def _teacher_identity(self) -> dict[str, str]:
        """What the kept logits depend on besides the images, each part with a text that is equal for equal parts."""
        teachers = self.model.frozen()
        models: list[Any] = [teacher.model for teacher in teachers]
        settings = [
            {key: value for key, value in model.config.to_dict().items() if key not in IRRELEVANT_SETTINGS}
            for model in models
        ]
        parameter = next(self.model.students.parameters())
        return {
            "teacher weights": ", ".join(state_fingerprint(model) for model in models),
            "teacher configuration": json.dumps(settings, sort_keys=True, default=str),
            "renormalisation": ", ".join(state_fingerprint(teacher.renormalize) for teacher in teachers),
            "precision": f"{parameter.dtype} {self.args.mixed_precision}",
            "combination of teachers": self.combination(),
        }
