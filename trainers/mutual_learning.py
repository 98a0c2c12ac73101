"""DML: deep mutual learning (Zhang et al., CVPR 2018, arXiv 1706.00384).

Each of m networks learns from the labels and from what all others predict, by CE + mean KL. In the paper's algorithm
they take turns within a mini-batch: the second learns from what the first predicts after its step. Code of the time
steps all of them at once, which is the default here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hfkd.errors import InputError
from hfkd.losses.mutual_learning import mutual_kl
from hfkd.models import ClassifierFeatures

from .cohort import CohortConfig, CohortTrainer
from .config import check_positive, check_range
from .feature_maps import full_precision
from .networks import frozen_running_statistics
from .optimizers import build_main_optimizer, build_main_schedule


@dataclass
class MutualLearningConfig(CohortConfig):
    """Settings of DML, under the schedule of AFD's comparisons."""

    temperature: float = field(
        default=1.0,
        metadata={"help": "T of the KL term, > 0, with the factor T^2 (paper: 1; AFD's comparison: 3)."},
    )
    kl_weight: float = field(default=1.0, metadata={"help": "Weight of the KL term (paper: 1)."})
    update: Literal["simultaneous", "sequential"] = field(
        default="simultaneous",
        metadata={"help": "All students step at once (common code), or sequential: in turns (the paper's algorithm)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("temperature", self.temperature)
        check_range("kl_weight", self.kl_weight, 0)
        if self.kl_weight == 0:
            self.refuse_changed(("temperature", "update"), "kl_weight=0")
        if self.update == "sequential" and self.gradient_accumulation_steps > 1:
            raise InputError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} with update=sequential: the second "
                "student would learn from a step that the first has not made yet; choose update=simultaneous, or "
                "a larger batch"
            )


class MutualLearningTrainer(CohortTrainer):
    """Trains students that learn from the labels and from each other's predictions.

    Args:
        students: two image classifiers or more, of equal or different architecture.
        args: the settings.
        train_dataset, eval_dataset, processing_class, augmentation, callbacks, dataset_name: as in
            `DistillationTrainer`.

    Raises:
        InputError: for students that do not fit each other or the data.

    Example:
        >>> students = [build_student("resnet20", class_names=names, image_size=32, seed=s) for s in (0, 1)]
        >>> MutualLearningTrainer(students, args=MutualLearningConfig("runs"), train_dataset=train).train()
    """

    _name = "Deep mutual learning (DML)"
    _paper: ClassVar = {
        "title": "Deep Mutual Learning",
        "id": "1706.00384",
        "citation": (
            "@inproceedings{zhang2018dml,\n"
            "  title     = {Deep Mutual Learning},\n"
            "  author    = {Zhang, Ying and Xiang, Tao and Hospedales, Timothy M. and Lu, Huchuan},\n"
            "  booktitle = {Conference on Computer Vision and Pattern Recognition},\n"
            "  year      = {2018}\n"
            "}"
        ),
    }
    _tag_names: ClassVar = ["hfkd", "knowledge-distillation", "online-distillation", "deep-mutual-learning"]
    _template_file = "mutual_learning.md"

    config_class = MutualLearningConfig
    args: MutualLearningConfig

    def losses(
        self, features: Sequence[ClassifierFeatures], batch: dict[str, Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """L_k of each student, all from the predictions before the step."""
        logits = self.logits_of(features)
        losses: list[Tensor] = []
        parts: dict[str, Tensor] = {}
        for k in range(len(logits)):
            loss, own = self._loss(k, logits, batch["labels"])
            losses.append(loss)
            parts |= own
        return losses, parts

    def _loss(self, k: int, logits: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """L_k = CE(y, p_k) + 1/(m-1) sum over j != k of KL(p_j || p_k) (paper, eq. 9)."""
        cross_entropy = F.cross_entropy(logits[k], labels)
        peers = [peer for j, peer in enumerate(logits) if j != k]
        kl = mutual_kl(logits[k], peers, self.args.temperature)
        parts = {f"student_{k}_ce": cross_entropy, f"student_{k}_kl": kl}
        return cross_entropy + self.args.kl_weight * kl, parts

    # -- in turns ------------------------------------------------------------------------------------------------

    @property
    def _in_turns(self) -> bool:
        return self.args.update == "sequential"

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """One for all students or, where they take turns, one for each."""
        if not self._in_turns:
            return super().build_optimizers()
        return {
            self._turn(k): build_main_optimizer([p for p in student.parameters() if p.requires_grad], self.args)
            for k, student in enumerate(self.model.students)
        }

    def build_schedules(self, optimizers: dict[str, torch.optim.Optimizer], max_steps: int) -> dict[str, Any]:
        return {name: build_main_schedule(one, self.args, max_steps) for name, one in optimizers.items()}

    @staticmethod
    def _turn(k: int) -> str:
        return f"student_{k}" if k else "student"

    def method_step(self, batch: dict[str, Tensor], share: float, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """In turns: each student steps on its loss, and predicts again before the next one learns (algorithm 1)."""
        if not self._in_turns:
            return super().method_step(batch, share, last)
        logits = self.logits_of(self.training_features(batch))
        total = torch.zeros_like(logits[0][0, 0])
        parts: dict[str, Tensor] = {}
        for k, adapter in enumerate(self.adapters):
            loss, own = self._loss(k, logits, batch["labels"])
            self.optimizer.backward(self._turn(k), loss)
            self.optimizer.step_now(self._turn(k))
            # Its running statistics have seen this mini-batch.
            if k + 1 < len(logits):
                with torch.no_grad(), self.autocast(), frozen_running_statistics(adapter.model):
                    logits[k] = full_precision(adapter(batch["pixel_values"]).logits)
            total, parts = total + loss.detach(), parts | own
        return total.detach(), {name: value.detach() for name, value in parts.items()}
