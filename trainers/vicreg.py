"""VICReg: two views of an image get one representation, whose dimensions vary and do not go together.

Bardes, Ponce and LeCun, ICLR 2022, arXiv 2105.04906, in the form in which Squeeze-and-Span (arXiv 2211.03000, Table 2)
compares with it: on real images, on a generator's, or on both. Its loss is Squeeze-and-Span's span loss.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from hfkd.losses.squeeze_and_span import span_loss
from hfkd.models.squeeze_module import Projector

from .frozen_generator import FrozenGenerator
from .self_supervised_config import VarianceCovarianceConfig
from .two_views import TwoViewConfig, TwoViewTrainer


@dataclass
class VicregConfig(TwoViewConfig, VarianceCovarianceConfig):
    """Settings of VICReg. The defaults are those of Squeeze-and-Span's code for CIFAR-10 and CIFAR-100.

    The code of VICReg's authors halves the variance term, so that `variance_weight` here is half of theirs.
    """


class VicregTrainer(TwoViewTrainer):
    """Trains a backbone on two views of each image; the projector is training-only.

    Args:
        student: any image model of transformers, or one with a head, which is left out.
        args: the settings.
        generator: of synthetic samples, where `synthetic_share` is above 0.
        train_dataset, eval_dataset, processing_class, augmentation, callbacks, dataset_name: as in
            `SelfSupervisedTrainer`.

    Raises:
        InputError: for networks that do not fit each other, the images, or the settings.
    """

    _name = "VICReg"
    _paper: ClassVar = {
        "title": "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning",
        "id": "2105.04906",
        "citation": (
            "@inproceedings{bardes2022vicreg,\n"
            "  title     = {{VICReg}: Variance-Invariance-Covariance Regularization for Self-Supervised Learning},\n"
            "  author    = {Bardes, Adrien and Ponce, Jean and LeCun, Yann},\n"
            "  booktitle = {International Conference on Learning Representations},\n"
            "  year      = {2022}\n"
            "}"
        ),
    }
    _tag_names: ClassVar = ["hfkd", "vicreg", "self-supervised"]
    _template_file = "vicreg.md"

    args: VicregConfig

    def __init__(self, student: Any, args: VicregConfig | None = None, generator: Any = None, **parts: Any) -> None:
        super().__init__(student, generator, args or VicregConfig(), **parts)

    def build_heads(
        self, args: VicregConfig, width: int, generator: FrozenGenerator | None
    ) -> Mapping[str, nn.Module]:
        """The projector."""
        return {"projector": Projector(width, args.representation_size, args.projector_layers)}

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """lambda d(z, z') + mu [var(z) + var(z')] + nu [cov(z) + cov(z')] of the joined batch."""
        z, other = (self.gather(self.represent(view)) for view in self.two_views(batch))
        self.watch(z)
        return span_loss(z, other, self.args.loss_weights)
