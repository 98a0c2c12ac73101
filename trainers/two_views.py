"""Methods that compare two views of each image, real or synthetic: their settings, and where the views come from."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hfkd.errors import InputError

from .self_supervised import SelfSupervisedTrainer
from .self_supervised_config import SelfSupervisedConfig


@dataclass
class TwoViewConfig(SelfSupervisedConfig):
    """Settings that VICReg and SimSiam share, beside those of the family."""

    synthetic_share: float = field(
        default=0.0,
        metadata={"help": "Share of the batch that is synthetic, in [0, 1] (Squeeze-and-Span's Table 2: 0, 1, 0.5)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.augment_synthetic:
            raise InputError(
                "augment_synthetic=False makes the two views of a synthetic image one, and nothing is learned of it: "
                "leave it out"
            )


class TwoViewTrainer(SelfSupervisedTrainer):
    """The part of a trainer that joins synthetic and real samples into one batch.

    Unlike Squeeze-and-Span, whose domains never meet, they share batch norm's statistics and those of the loss, as in
    the code of its comparison.
    """

    args: TwoViewConfig

    def two_views(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Pixel values (N, C, H, W) of two views of each sample, the synthetic ones first."""
        views = [[batch[name]] if name in batch else [] for name in ("pixel_values", "pixel_values_2")]
        if self.args.synthetic_share:
            generated = self.generate(batch)
            for number, parts in enumerate(views):
                parts.insert(0, self.synthetic_view(generated, batch, number))
        first, second = (torch.cat(parts) for parts in views)
        return first, second
