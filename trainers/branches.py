"""Students that are branches of one network, and a teacher made of them that learns with them: ONE, PCL and FFL."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hfkd.evaluation.cohort import accuracy
from hfkd.losses.online_adversarial import kl_rampup
from hfkd.models import ClassifierFeatures
from hfkd.models.shared_trunk import SharedTrunk

from .cohort import CohortConfig, CohortTrainer
from .config import check_positive, check_range


RAMPUP_SHARE = 80 / 300  # of the run, in the code of ONE and FFL


@dataclass
class BranchConfig(CohortConfig):
    """Settings that ONE, PCL and FFL share."""

    temperature: float = field(default=3.0, metadata={"help": "T of the KL terms, > 0 (code of ONE and FFL: 3)."})
    kl_rampup_epochs: float | None = field(
        default=None,
        metadata={
            "help": "Epochs over which the KL terms' weight rises to 1; 0: none (default: in proportion as in code of "
            "ONE and FFL, 80 of 300)."
        },
    )
    shared_trunk: bool = field(
        default=True,
        metadata={
            "help": "The students share all layers below their last stage, which must be alike (code of ONE and FFL); "
            "False: whole networks, of any architecture."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("temperature", self.temperature)
        if self.kl_rampup_epochs is not None:
            check_range("kl_rampup_epochs", self.kl_rampup_epochs, 0)


class BranchTrainer(CohortTrainer):
    """Trains students with a common trunk, or whole networks; a method defines `teacher_logits` and `losses`.

    The students' modules are tied in place. Each is still saved, measured and used as a whole network.
    """

    # What the accuracy of the trained teacher is called among the metrics, without `_accuracy`.
    _teacher_metric: ClassVar[str]

    args: BranchConfig
    trunk: SharedTrunk | None

    def build_training_only(self, args: Any) -> dict[str, nn.Module]:
        """Ties the trunk; a method adds what its teacher is made of."""
        self.trunk = SharedTrunk(self.adapters) if args.shared_trunk else None
        return {}

    def teacher_logits(self, features: Sequence[ClassifierFeatures]) -> Tensor:
        """The teacher's logits (N, K) in full precision, with their graph."""
        raise NotImplementedError

    def kl_weight(self) -> float:
        """Of the KL terms at this point of the run, in (0, 1]."""
        if self.args.kl_rampup_epochs is None:
            return kl_rampup(self.state.global_step / max(self.state.max_steps, 1), RAMPUP_SHARE)
        return kl_rampup(self.state.epoch or 0.0, self.args.kl_rampup_epochs)

    def features(self, pixel_values: Tensor) -> list[ClassifierFeatures]:
        """By one pass through the trunk, where there is one: `BranchFeatures`."""
        if self.trunk is None:
            return super().features(pixel_values)
        with self.autocast():
            return self.trunk(pixel_values)

    def evaluation_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        features = self.features(batch["pixel_values"])
        logits = torch.stack(self.logits_of(features), dim=1)
        return {"logits": logits, "teacher": self.teacher_logits(features)}

    def evaluation_metrics(self, outputs: dict[str, Tensor], labels: Tensor) -> dict[str, float]:
        """Those of every cohort, and the accuracy of the teacher."""
        taught = super().evaluation_metrics(outputs, labels)
        return taught | {f"{self._teacher_metric}_accuracy": accuracy(outputs["teacher"], labels)}
