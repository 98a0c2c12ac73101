"""Training the top of a network on activations that were computed once: for losses that need no more of an image."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader
from transformers.modeling_outputs import ModelOutput

from hfkd.data import ImageSource
from hfkd.data.activation_cache import ActivationCache, CachedImages, open_activation_cache
from hfkd.models.activation_cut import ActivationCut

from .base import DistillationTrainer
from .config import DistillationConfig
from .distributed import broadcast_state
from .shared_store import shared_store


@dataclass
class CachedActivationsConfig(DistillationConfig):
    """The setting of `CachedActivations`."""

    activation_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the activations below theta_2 of all training images, computed once and used again by "
            "later runs; needs augmentation=none (default: computed at each step)."
        },
    )


class CachedActivations(DistillationTrainer):
    """The part of a trainer that keeps what its backbone computes below theta_2.

    Student 0 has a `base_model` that `ActivationCut` takes, frozen below theta_2. With `activation_cache_dir` the
    training batches' `pixel_values` are activations, which `training_outputs` takes; evaluation sees images.

    Raises:
        InputError: augmented training images, or a network that cannot be cut.
    """

    args: CachedActivationsConfig
    train_dataset: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._cut: ActivationCut | None = None
        if self.args.activation_cache_dir is not None and self.train_dataset is not None:
            self.train_dataset = CachedImages(self.train_dataset)
            self._cut = ActivationCut(self._backbone)

    @property
    def _backbone(self) -> Any:
        student: Any = self.model.students[0]
        return student.base_model

    def get_train_dataloader(self) -> DataLoader:
        if self._cut is not None:
            self._open_cache(self._cut)
        return super().get_train_dataloader()

    def training_outputs(self, pixel_values: Tensor) -> ModelOutput:
        """The backbone's outputs for a training batch's `pixel_values`."""
        return self._backbone(pixel_values) if self._cut is None else self._cut.above(pixel_values)

    def images_seen_in_training(self) -> ImageSource:
        """The training images without augmentation; their batches' `pixel_values` are for `training_features`."""
        if self._cut is None:
            return super()._eval_source(self.train_dataset, "train")  # a method may evaluate on crops
        if self.train_dataset.cache is None:
            self._open_cache(self._cut)
        return self.train_dataset

    def training_features(self, pixel_values: Tensor) -> Tensor:
        """f(x) (N, d) of a training batch's `pixel_values`, without its tangent."""
        return self._backbone.features(pixel_values) if self._cut is None else self._cut.features_above(pixel_values)

    def _open_cache(self, cut: ActivationCut) -> None:
        """Rank 0 fills the cache where there is none; then the others open it."""
        broadcast_state(self.model)  # all ranks see the training images through one base
        images: CachedImages = self.train_dataset
        folder = str(self.args.activation_cache_dir)

        def encode(inputs: Mapping[str, Any]) -> Tensor:
            with self.autocast():
                return cut.below(self._materialise(images.source, dict(inputs))["pixel_values"])

        def fill() -> ActivationCache:
            return open_activation_cache(
                folder,
                images.source,
                encode,
                {**cut.identity(), "precision": str(self.args.mixed_precision)},
                batch_size=self.args.eval_batch_size,
                workers=self.args.dataloader_num_workers,
            )

        first = self.is_world_process_zero()
        images.cache = shared_store(ActivationCache.setting, first, fill, lambda: ActivationCache(folder))
