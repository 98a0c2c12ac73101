"""Supervised training: cross-entropy alone, the baseline that every distillation has to beat."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from hfkd.models import ClassifierFeatures

from .cohort import CohortConfig, CohortTrainer


@dataclass
class SupervisedConfig(CohortConfig):
    """Settings of supervised training: those that all methods share."""


class SupervisedTrainer(CohortTrainer):
    """Trains classifiers by cross-entropy. Several of them do not know of each other: they only share the images.

    Args:
        students: one image classifier or more.
        args: the settings.
        train_dataset, eval_dataset, processing_class, augmentation, callbacks, dataset_name: as in
            `DistillationTrainer`.

    Raises:
        InputError: for students that do not fit each other or the data.

    Example:
        >>> student = build_student("resnet20", class_names=names, image_size=32, seed=0)
        >>> SupervisedTrainer([student], args=SupervisedConfig("runs"), train_dataset=train).train()
    """

    _name = "Supervised training"
    # Of no paper of its own; this is where its networks and their schedule on CIFAR come from.
    _paper: ClassVar = {
        "title": "Deep Residual Learning for Image Recognition",
        "id": "1512.03385",
        "citation": (
            "@inproceedings{he2016resnet,\n"
            "  title     = {Deep Residual Learning for Image Recognition},\n"
            "  author    = {He, Kaiming and Zhang, Xiangyu and Ren, Shaoqing and Sun, Jian},\n"
            "  booktitle = {Conference on Computer Vision and Pattern Recognition},\n"
            "  year      = {2016}\n"
            "}"
        ),
    }
    _tag_names: ClassVar = ["hfkd", "supervised"]
    _template_file = "supervised.md"

    least_students = 1
    config_class = SupervisedConfig
    args: SupervisedConfig

    def losses(
        self, features: Sequence[ClassifierFeatures], batch: dict[str, Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """CE(y, softmax(z_k)) of each student."""
        losses = [F.cross_entropy(logits, batch["labels"]) for logits in self.logits_of(features)]
        return losses, {f"student_{k}_ce": loss for k, loss in enumerate(losses)}
