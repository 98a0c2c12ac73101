"""PCL: peer collaborative learning (Wu and Gong, AAAI 2021, arXiv 2006.04147).

The peers are branches of one network, each with an augmentation of its own. Two kinds of teachers come from them: the
peer ensemble, a linear classifier on all peers' features, and of each peer its mean teacher, the moving average of its
weights, which teaches the other peers.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfkd.evaluation.cohort import accuracy
from hfkd.losses.one import ensemble_losses
from hfkd.losses.pcl import MEAN_TEACHER_DECAY, mean_teacher_decay, mean_teacher_kl
from hfkd.models import ClassifierAdapter, ClassifierFeatures

from .branches import BranchConfig, BranchTrainer
from .config import check_range
from .feature_maps import full_precision
from .own_views import OwnViewsTrainer
from .weight_average import AfterUpdate


@dataclass
class PclConfig(BranchConfig):
    """Settings of PCL. T, the ramp-up and the schedule are those of a public reproduction."""

    mean_teacher_decay: float = field(
        default=MEAN_TEACHER_DECAY,
        metadata={
            "help": "What a mean teacher keeps of itself in an update at most, in [0, 1) (reproduction: 0.999)."
        },
    )
    independent_views: bool = field(
        default=True, metadata={"help": "Each peer sees its own augmentation of each image (paper); False: the same."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("mean_teacher_decay", self.mean_teacher_decay, 0, 1, high_open=True)


class PclTrainer(OwnViewsTrainer, BranchTrainer):
    """Trains peers that are taught by an ensemble of their features and by the mean teachers of the others.

    What is saved are the peers themselves. Evaluation also measures the mean teachers.

    Args:
        students: the peers, two image classifiers or more. With `shared_trunk` they are alike below their last stage,
            and are tied there in place to the first one's layers.
        args: the settings.
        train_dataset, eval_dataset, processing_class, augmentation, callbacks, dataset_name: as in
            `DistillationTrainer`.

    Raises:
        InputError: for students that do not fit each other or the data, or that have no trunk to share.

    Example:
        >>> students = [build_student("resnet32", class_names=names, image_size=32, seed=s) for s in range(3)]
        >>> PclTrainer(students, args=PclConfig("runs"), train_dataset=train).train()
    """

    _name = "Peer collaborative learning (PCL)"
    _paper: ClassVar = {
        "title": "Peer Collaborative Learning for Online Knowledge Distillation",
        "id": "2006.04147",
        "citation": (
            "@inproceedings{wu2021pcl,\n"
            "  title     = {Peer Collaborative Learning for Online Knowledge Distillation},\n"
            "  author    = {Wu, Guile and Gong, Shaogang},\n"
            "  booktitle = {AAAI Conference on Artificial Intelligence},\n"
            "  year      = {2021}\n"
            "}"
        ),
    }
    _tag_names: ClassVar = ["hfkd", "knowledge-distillation", "online-distillation", "pcl"]
    _template_file = "pcl.md"
    _teacher_metric = "peer_ensemble"

    config_class = PclConfig
    args: PclConfig

    def __init__(self, *parts: Any, **named: Any) -> None:
        super().__init__(*parts, **named)
        self.add_callback(AfterUpdate(self._average_weights))

    def build_training_only(self, args: PclConfig) -> dict[str, nn.Module]:
        """The mean teachers, copies of the peers with a trunk in common where the peers have one; the ensemble."""
        modules = super().build_training_only(args)
        peers = nn.ModuleList(adapter.model for adapter in self.adapters)
        means = copy.deepcopy(peers).requires_grad_(False)
        self._mean_adapters = [ClassifierAdapter(mean) for mean in means if isinstance(mean, PreTrainedModel)]
        width = sum(adapter.classifier.in_features for adapter in self.adapters)
        classes = self.adapters[0].classifier.out_features
        return modules | {"mean_teachers": means, "ensemble": nn.Linear(width, classes)}

    def teacher_logits(self, features: Sequence[ClassifierFeatures]) -> Tensor:
        """The peer ensemble: a linear layer on the pooled features of all peers, one after the other."""
        with self.autocast():
            pooled = torch.cat([one.pooled for one in features], dim=1)
            return full_precision(self.model.training_only["ensemble"](pooled))

    @torch.no_grad()
    def mean_logits(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Of each peer's mean teacher, on what its peer sees (inferred)."""
        with self.autocast():
            features = [adapter(seen) for adapter, seen in zip(self._mean_adapters, views, strict=True)]
        return self.logits_of(features)

    def losses(
        self, features: Sequence[ClassifierFeatures], batch: dict[str, Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Of each peer CE + w KL from the ensemble + w mean KL from the others' mean teachers; CE of the ensemble."""
        args, weight, logits = self.args, self.kl_weight(), self.logits_of(features)
        losses, parts = ensemble_losses(
            logits, self.teacher_logits(features), batch["labels"], args.temperature, weight
        )
        means = self.mean_logits(self.views_of(batch))
        for k, kl in enumerate(mean_teacher_kl(logits, means, args.temperature)):
            parts[f"student_{k}_mean_teacher_kl"] = kl
            losses[k] = losses[k] + weight * kl
        return losses, parts

    @torch.no_grad()
    def _average_weights(self) -> None:
        """Of the averages phi(g) is kept. Their batch norms follow the batches by themselves (inferred)."""
        decay = mean_teacher_decay(self.state.global_step + 1, self.args.mean_teacher_decay)
        averages, peers = self.model.training_only["mean_teachers"], self.model.students
        torch._foreach_lerp_(list(averages.parameters()), list(peers.parameters()), 1 - decay)

    def evaluation_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = super().evaluation_step(batch)
        means = self.mean_logits([batch["pixel_values"]] * len(self.adapters))
        return outputs | {"mean_teachers": torch.stack(means, dim=1)}

    def evaluation_metrics(self, outputs: dict[str, Tensor], labels: Tensor) -> dict[str, float]:
        """Those of every cohort, `peer_ensemble_accuracy`, and of the mean teachers `mean_teacher_<k>_accuracy`."""
        metrics = super().evaluation_metrics(outputs, labels)
        for k, logits in enumerate(outputs["mean_teachers"].unbind(dim=1)):
            metrics[f"mean_teacher_{k}_accuracy"] = accuracy(logits, labels)
        return metrics
