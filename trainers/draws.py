"""Runs without data: the draws-only mode of the base trainer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hfkd.data import Augmentation, KeyedDraws
from hfkd.data.keyed_random import EVALUATION
from hfkd.errors import InputError

from .base import DistillationTrainer
from .config import DistillationConfig
from .networks import TrainingNetworks


@dataclass
class DrawsOnlyConfig(DistillationConfig):
    """Settings of a run that has no data, and so no epochs: an update is the only unit of its length.

    Raises:
        InputError: also for a field that speaks of a dataset.
    """

    max_steps: int = field(default=50_000, metadata={"help": "Updates, >= 1; an epoch is the whole run."})
    per_device_eval_batch_size: int = field(
        default=1024, metadata={"help": "Fixed draws that the data-free criterion is measured on, as one batch."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_steps < 1:
            raise InputError(
                f"max_steps={self.max_steps}: a run without data is as long as max_steps, so give 1 or more"
            )
        self.refuse_changed(("num_train_epochs", "dataloader_drop_last"), "a method without data")


class DrawsOnlyTrainer(DistillationTrainer):
    """The part of a trainer whose runs see no data: a batch is `epoch` and `index` (N,), of which all is drawn.

    Nothing takes a dataset, and what is handed to `evaluate` or `predict` all the same is refused. `evaluate()`
    measures the method's criterion on fixed draws of its own.

    Args:
        networks, args, callbacks: as in `DistillationTrainer`.

    Raises:
        InputError: for anything that can be found wrong before the first step.
    """

    evaluates_labels = False
    sees_images = False

    args: DrawsOnlyConfig
    train_dataset: KeyedDraws

    def __init__(
        self, networks: TrainingNetworks, args: DrawsOnlyConfig, callbacks: Sequence[Any] | None = None
    ) -> None:
        draws = args.max_steps * args.gradient_accumulation_steps * args.train_batch_size * args.world_size
        super().__init__(
            networks,
            args,
            train_dataset=KeyedDraws(draws),
            eval_dataset=KeyedDraws(args.eval_batch_size, epoch=EVALUATION, name="evaluation"),
            callbacks=callbacks,
        )

    def _image_source(self, dataset: Any, name: str, augmentation: Augmentation | None = None) -> Any:
        if not isinstance(dataset, KeyedDraws):
            raise InputError(
                f"the {name} dataset is a {type(dataset).__name__}, and this method sees no data: leave it out, and "
                "compare with images by hfkd evaluate --protocol generation"
            )
        return dataset
