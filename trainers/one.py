"""ONE: knowledge distillation by on-the-fly native ensemble (Lan, Zhu and Gong, NeurIPS 2018, arXiv 1806.04606).

One network with several branches: stem and lower stages are shared, the last stage and the classifier are each
branch's own. A gate on the shared map weighs the branches' logits for each image; that ensemble learns from the labels
and teaches every branch. After training each branch, with the trunk, is an ordinary network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hfkd.losses.one import ensemble_losses, gated_ensemble
from hfkd.models import ClassifierFeatures
from hfkd.models.branch_gate import BranchGate
from hfkd.models.shared_trunk import BranchFeatures
from hfkd.models.squeeze_module import pool_maps

from .branches import BranchConfig, BranchTrainer
from .feature_maps import full_precision


@dataclass
class OneConfig(BranchConfig):
    """Settings of ONE; the defaults are the released code's for CIFAR.

    `shared_trunk=False` is a variant of ours: whole networks, of any architecture, with the gate on all their feature
    maps.
    """


class OneTrainer(BranchTrainer):
    """Trains the branches of one network, taught by their own gated ensemble.

    Args:
        students: two image classifiers or more. With `shared_trunk` they are alike below their last stage, and are
            tied there in place to the first one's layers.
        args: the settings.
        train_dataset, eval_dataset, processing_class, augmentation, callbacks, dataset_name: as in
            `DistillationTrainer`.

    Raises:
        InputError: for students that do not fit each other or the data, or that have no trunk to share.

    Example:
        >>> students = [build_student("resnet32", class_names=names, image_size=32, seed=s) for s in range(3)]
        >>> OneTrainer(students, args=OneConfig("runs"), train_dataset=train).train()
    """

    _name = "On-the-fly native ensemble (ONE)"
    _paper: ClassVar = {
        "title": "Knowledge Distillation by On-the-Fly Native Ensemble",
        "id": "1806.04606",
        "citation": (
            "@inproceedings{lan2018one,\n"
            "  title     = {Knowledge Distillation by On-the-Fly Native Ensemble},\n"
            "  author    = {Lan, Xu and Zhu, Xiatian and Gong, Shaogang},\n"
            "  booktitle = {Advances in Neural Information Processing Systems},\n"
            "  year      = {2018}\n"
            "}"
        ),
    }
    _tag_names: ClassVar = ["hfkd", "knowledge-distillation", "online-distillation", "one"]
    _template_file = "one.md"
    _teacher_metric = "gated_ensemble"

    config_class = OneConfig
    args: OneConfig

    def build_training_only(self, args: OneConfig) -> dict[str, nn.Module]:
        """The gate."""
        modules = super().build_training_only(args)
        channels = sum(shape[0] for shape in self.shapes) if self.trunk is None else self.trunk.channels
        return modules | {"gate": BranchGate(channels, len(self.adapters))}

    def teacher_logits(self, features: Sequence[ClassifierFeatures]) -> Tensor:
        """z_e, the logits of all branches by their gates."""
        maps = [features.trunk] if isinstance(features, BranchFeatures) else [one.feature_map for one in features]
        with self.autocast():
            gates = self.model.training_only["gate"](torch.cat(pool_maps(maps), dim=1))
        return gated_ensemble(torch.stack(self.logits_of(features)), full_precision(gates))

    def losses(
        self, features: Sequence[ClassifierFeatures], batch: dict[str, Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """CE and KL of each branch, CE of the ensemble: see `ensemble_losses`."""
        teacher, logits = self.teacher_logits(features), self.logits_of(features)
        return ensemble_losses(logits, teacher, batch["labels"], self.args.temperature, self.kl_weight())
