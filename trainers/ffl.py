"""FFL: feature fusion for online mutual knowledge distillation (Kim et al., ICPR 2020, arXiv 1904.09058).

A fusion module makes one classifier of all students' feature maps. The mean of the students' logits teaches the fused
classifier, and the fused classifier teaches the students.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hfkd.losses.one import ensemble_losses
from hfkd.losses.online_adversarial import distillation_kl
from hfkd.models import ClassifierFeatures
from hfkd.models.fusion_module import FusionModule

from .branches import BranchConfig, BranchTrainer
from .feature_maps import full_precision


@dataclass
class FflConfig(BranchConfig):
    """Settings of FFL; the defaults are the released code's but for two, so that methods have one schedule.

    That code has Nesterov momentum (`nesterov=True`), and decays the fusion module by 1e-5 instead of 1e-4.
    """


class FflTrainer(BranchTrainer):
    """Trains students and a classifier on their fused feature maps, which teach each other.

    Args:
        students: two image classifiers or more. With `shared_trunk`, as in the released code for equal networks, they
            are alike below their last stage, and are tied there in place to the first one's layers; without it they
            may be of different architecture.
        args: the settings.
        train_dataset, eval_dataset, processing_class, augmentation, callbacks, dataset_name: as in
            `DistillationTrainer`.

    Raises:
        InputError: for students that do not fit each other or the data, or that have no trunk to share.

    Example:
        >>> students = [build_student("resnet32", class_names=names, image_size=32, seed=s) for s in (0, 1)]
        >>> FflTrainer(students, args=FflConfig("runs"), train_dataset=train).train()
    """

    _name = "Feature fusion learning (FFL)"
    _paper: ClassVar = {
        "title": "Feature Fusion for Online Mutual Knowledge Distillation",
        "id": "1904.09058",
        "citation": (
            "@inproceedings{kim2020ffl,\n"
            "  title     = {Feature Fusion for Online Mutual Knowledge Distillation},\n"
            "  author    = {Kim, Jangho and Hyun, Minsung and Chung, Inseop and Kwak, Nojun},\n"
            "  booktitle = {International Conference on Pattern Recognition},\n"
            "  year      = {2020}\n"
            "}"
        ),
    }
    _tag_names: ClassVar = ["hfkd", "knowledge-distillation", "online-distillation", "feature-fusion"]
    _template_file = "ffl.md"
    _teacher_metric = "fused"

    config_class = FflConfig
    args: FflConfig

    def build_training_only(self, args: FflConfig) -> dict[str, nn.Module]:
        """The fusion module with the fused classifier."""
        modules = super().build_training_only(args)
        return modules | {"fusion": FusionModule(self.shapes, self.adapters[0].classifier.out_features)}

    def teacher_logits(self, features: Sequence[ClassifierFeatures]) -> Tensor:
        """Those of the fused classifier."""
        with self.autocast():
            return full_precision(self.model.training_only["fusion"]([one.feature_map for one in features]))

    def losses(
        self, features: Sequence[ClassifierFeatures], batch: dict[str, Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """CE and KL from the fused classifier of each student; CE of that, and w KL from the mean of the logits."""
        temperature, weight, logits = self.args.temperature, self.kl_weight(), self.logits_of(features)
        fused = self.teacher_logits(features)
        losses, parts = ensemble_losses(logits, fused, batch["labels"], temperature, weight)
        kl = parts["teacher_kl"] = distillation_kl(fused, torch.stack(logits).mean(dim=0), temperature)
        return [*losses, weight * kl], parts
