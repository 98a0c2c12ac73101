"""KDCL: online knowledge distillation via collaborative learning (Guo et al., CVPR 2020).

Each student learns from the labels and from one teacher, an ensemble of all students' logits that is made anew in
every mini-batch: `hfkd.losses.kdcl` has its variants. The students see differently augmented versions of the same
images, so that what they agree on does not depend on the augmentation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.trainer_utils import TrainOutput

from hfkd.data import ImageSource
from hfkd.errors import InputError
from hfkd.losses.kdcl import KdclVariant, ensemble_teacher, error_covariance, general_weights
from hfkd.losses.online_adversarial import distillation_kl
from hfkd.models import ClassifierFeatures
from hfkd.models.probing import undisturbed

from .cohort import CohortConfig
from .config import check_positive, check_range
from .own_views import OwnViewsTrainer
from .state import restore_rng_state, rng_state


@dataclass
class KdclConfig(CohortConfig):
    """Settings of KDCL, under the schedule of AFD's comparisons."""

    variant: KdclVariant = field(
        default="minlogit",
        metadata={
            "help": "The teacher: naive, linear, minlogit, general (weights measured on the evaluation images before "
            "each epoch) or mean, a control of ours (inferred: minlogit)."
        },
    )
    temperature: float = field(
        default=2.0, metadata={"help": "T of the KL term, > 0, with the factor T^2 (paper: 2)."}
    )
    kl_weight: float = field(default=1.0, metadata={"help": "lambda, weight of the KL term (paper: 1 on CIFAR)."})
    independent_views: bool = field(
        default=True,
        metadata={"help": "Each student sees its own augmentation of each image (paper); False: the same."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("temperature", self.temperature)
        check_range("kl_weight", self.kl_weight, 0)
        if self.kl_weight == 0:
            self.refuse_changed(("variant", "temperature"), "kl_weight=0")


class EnsembleWeights(nn.Module):
    """`weights` (S,) of the students in the general teacher, and the epoch before which they were measured."""

    weights: Tensor
    epoch: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("weights", torch.full((count,), 1 / count))
        self.register_buffer("epoch", torch.tensor(-1))


class KdclTrainer(OwnViewsTrainer):
    """Trains students that learn from the labels and from an ensemble of themselves.

    Args:
        students: two image classifiers or more, of equal or different architecture.
        args: the settings.
        train_dataset, processing_class, augmentation, callbacks, dataset_name: as in `DistillationTrainer`.
        eval_dataset: as there. The variant `general` measures its weights on it, so that it is held-out data of the
            training and no test set.

    Raises:
        InputError: for students that do not fit each other or the data; `general` without one eval_dataset.

    Example:
        >>> students = [build_student("resnet20", class_names=names, image_size=32, seed=s) for s in (0, 1)]
        >>> KdclTrainer(students, args=KdclConfig("runs"), train_dataset=train).train()
    """

    _name = "Collaborative learning (KDCL)"
    # It is in the conference's open library alone.
    _paper: ClassVar = {
        "title": "Online Knowledge Distillation via Collaborative Learning",
        "id": "",
        "url": "https://openaccess.thecvf.com/content_CVPR_2020/html/"
        "Guo_Online_Knowledge_Distillation_via_Collaborative_Learning_CVPR_2020_paper.html",
        "citation": (
            "@inproceedings{guo2020kdcl,\n"
            "  title     = {Online Knowledge Distillation via Collaborative Learning},\n"
            "  author    = {Guo, Qiushan and Wang, Xinjiang and Wu, Yichao and Yu, Zhipeng and Liang, Ding and "
            "Hu, Xiaolin and Luo, Ping},\n"
            "  booktitle = {Conference on Computer Vision and Pattern Recognition},\n"
            "  year      = {2020}\n"
            "}"
        ),
    }
    _tag_names: ClassVar = ["hfkd", "knowledge-distillation", "online-distillation", "kdcl"]
    _template_file = "kdcl.md"

    config_class = KdclConfig
    args: KdclConfig

    def __init__(self, *parts: Any, **named: Any) -> None:
        super().__init__(*parts, **named)
        if self._measures and not isinstance(self.eval_dataset, ImageSource):
            raise InputError(
                "variant=general measures its weights on held-out images: pass one eval_dataset (validation_size "
                "above 0), or choose linear or minlogit"
            )

    @property
    def _measures(self) -> bool:
        return self.args.variant == "general"

    def build_training_only(self, args: KdclConfig) -> dict[str, nn.Module]:
        """The weights of the variant `general`, which a run that is resumed within an epoch goes on with."""
        return {"ensemble": EnsembleWeights(len(self.adapters))} if args.variant == "general" else {}

    def losses(
        self, features: Sequence[ClassifierFeatures], batch: dict[str, Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """CE(z_i) + lambda T^2 KL(softmax(z_t / T) || softmax(z_i / T)) of each student."""
        args, labels, logits = self.args, batch["labels"], self.logits_of(features)
        weights: Any = self.model.training_only["ensemble"].weights if self._measures else None
        teacher = ensemble_teacher(torch.stack(logits), labels, args.variant, weights)
        losses: list[Tensor] = []
        parts = {"teacher_ce": F.cross_entropy(teacher, labels)}
        for k, own in enumerate(logits):
            cross_entropy = parts[f"student_{k}_ce"] = F.cross_entropy(own, labels)
            kl = parts[f"student_{k}_kl"] = distillation_kl(own, teacher, args.temperature)
            losses.append(cross_entropy + args.kl_weight * kl)
        return losses, parts

    # -- the general teacher's weights ---------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        if self._measures:
            ensemble: Any = self.model.training_only["ensemble"]
            ensemble.epoch.fill_(-1)  # that of a run before this; a checkpoint brings its own
        return super().train(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run that goes on within this epoch has measured them before.
        if self._measures and self.model.training_only["ensemble"].epoch != kwargs["epoch"]:
            self._measure_weights(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def _measure_weights(self, epoch: int) -> None:
        generators = rng_state()
        found: list[tuple[Tensor, Tensor]] = []
        loader = self.get_eval_dataloader()
        with undisturbed(self.model):
            for inputs in loader:
                batch = self._materialise(self.eval_dataset, inputs)
                with self.autocast():
                    logits = self.evaluation_step(batch)["logits"]
                found.append(self.accelerator.gather_for_metrics((logits, batch["labels"])))
        restore_rng_state(generators)  # as in a run that did not measure here
        logits, labels = (torch.cat(part) for part in zip(*found, strict=True))
        ensemble: Any = self.model.training_only["ensemble"]
        ensemble.weights.copy_(general_weights(error_covariance(logits.movedim(1, 0), labels)))
        ensemble.epoch.fill_(epoch)
