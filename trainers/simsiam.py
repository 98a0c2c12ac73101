"""SimSiam: a view's prediction is to be the other view's representation, which is held still.

Chen and He, CVPR 2021, arXiv 2011.10566, with the sizes and settings with which Squeeze-and-Span (arXiv 2211.03000,
Table 2) compares with it: on real images, on a generator's, or on both.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfkd.losses.simsiam import simsiam_loss
from hfkd.models.simsiam_parts import SimSiamPredictor, SimSiamProjector

from .config import check_range
from .feature_maps import full_precision
from .frozen_generator import FrozenGenerator
from .optimizers import build_main_optimizer, build_main_schedule, milestone_schedule
from .self_supervised import MAIN
from .two_views import TwoViewConfig, TwoViewTrainer


PREDICTOR = "predictor"


@dataclass
class SimSiamConfig(TwoViewConfig):
    """Settings of SimSiam. The defaults are those of Squeeze-and-Span's code for CIFAR-10 and CIFAR-100."""

    projector_layers: int = field(
        default=2, metadata={"help": "Linear layers of the projector, >= 1 (code: 2 for CIFAR, 3 for STL-10)."}
    )
    predictor_hidden_size: int = field(
        default=512, metadata={"help": "Bottleneck of the predictor, whose rate is learning_rate always (code: 512)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("predictor_hidden_size", self.predictor_hidden_size, 1)
        self.refuse_changed(("gather_statistics",), "SimSiam, whose loss is a mean over images")


class SimSiamTrainer(TwoViewTrainer):
    """Trains a backbone on two views of each image; projector and predictor are training-only.

    `representation_std` is told of representations of length 1, whose dimensions deviate by 1/sqrt(D) where they fill
    the sphere and by 0 where they have collapsed (section 4.1 of the paper).

    Args:
        student: any image model of transformers, or one with a head, which is left out.
        args: the settings.
        generator: of synthetic samples, where `synthetic_share` is above 0.
        train_dataset, eval_dataset, processing_class, augmentation, callbacks, dataset_name: as in
            `SelfSupervisedTrainer`.

    Raises:
        InputError: for networks that do not fit each other, the images, or the settings.
    """

    _name = "SimSiam"
    _paper: ClassVar = {
        "title": "Exploring Simple Siamese Representation Learning",
        "id": "2011.10566",
        "citation": (
            "@inproceedings{chen2021simsiam,\n"
            "  title     = {Exploring Simple Siamese Representation Learning},\n"
            "  author    = {Chen, Xinlei and He, Kaiming},\n"
            "  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},\n"
            "  year      = {2021}\n"
            "}"
        ),
    }
    _tag_names: ClassVar = ["hfkd", "simsiam", "self-supervised"]
    _template_file = "simsiam.md"

    args: SimSiamConfig

    def __init__(self, student: Any, args: SimSiamConfig | None = None, generator: Any = None, **parts: Any) -> None:
        super().__init__(student, generator, args or SimSiamConfig(), **parts)

    def build_heads(
        self, args: SimSiamConfig, width: int, generator: FrozenGenerator | None
    ) -> Mapping[str, nn.Module]:
        """The projector, and the predictor on its outputs."""
        size = args.representation_size
        projector = SimSiamProjector(width, size, args.projector_layers)
        return {"projector": projector, PREDICTOR: SimSiamPredictor(size, args.predictor_hidden_size)}

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """One over the student and the projector, and one over the predictor."""
        learning = [self.model.students, self.model.training_only["projector"]]
        parameters = [p for module in learning for p in module.parameters() if p.requires_grad]
        predicting = list(self.model.training_only[PREDICTOR].parameters())
        return {
            MAIN: build_main_optimizer(parameters, self.args),
            PREDICTOR: build_main_optimizer(predicting, self.args),
        }

    def build_schedules(self, optimizers: dict[str, torch.optim.Optimizer], max_steps: int) -> dict[str, Any]:
        """The predictor keeps its rate (section 3)."""
        still = milestone_schedule(optimizers[PREDICTOR], max_steps=max_steps, milestones=(), gamma=1.0)
        return {MAIN: build_main_schedule(optimizers[MAIN], self.args, max_steps), PREDICTOR: still}

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """D(p, stopgrad(z')) / 2 + D(p', stopgrad(z)) / 2 (eq. 4)."""
        z, other = (self.represent(view) for view in self.two_views(batch))
        directions = F.normalize(z.detach(), dim=1)
        self.watch(directions, gamma=directions.shape[1] ** -0.5)
        loss = simsiam_loss((self.predict(z), self.predict(other)), (z, other))
        return loss, {"cosine_similarity": -loss}

    def predict(self, z: Tensor) -> Tensor:
        """p (N, D) = h(z) of representations (N, D)."""
        with self.autocast():
            return full_precision(self.model.training_only[PREDICTOR](z))
