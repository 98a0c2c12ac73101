"""Students that see the same images and learn together: what AFD and its peers have in common."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfkd.data import Augmentation
from hfkd.evaluation.cohort import cohort_metrics
from hfkd.models import ClassifierAdapter, ClassifierFeatures
from hfkd.models.adapter import Tap
from hfkd.models.feature_discriminator import Shape

from .cohort_checks import check_batches, check_images, check_labels, check_networks, check_teacher_sizes
from .config import DistillationConfig
from .feature_maps import full_precision
from .frozen_parents import FrozenParents
from .images import preprocessing_of
from .networks import FrozenTeacher, TrainingNetworks, processor_of_each, teacher_input
from .optimizers import build_main_optimizer, build_main_schedule


@dataclass
class CohortConfig(DistillationConfig):
    """Settings of every method that trains classifiers together; the defaults are those of AFD's CIFAR-100 runs.

    ONE, FFL and many others train by them too, so that methods are compared under one schedule.
    """

    num_train_epochs: float = field(default=300.0, metadata={"help": "Epochs (AFD, ONE, FFL: 300)."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Images per device (128)."})
    learning_rate: float = field(default=0.1, metadata={"help": "Of SGD (0.1)."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Of SGD, on all parameters (1e-4)."})
    lr_milestones: list[float] = field(
        default_factory=lambda: [0.5, 0.75],
        metadata={"help": "Fractions of the run at which SGD's rate falls (epochs 150 and 225 of 300)."},
    )


class CohortTrainer(FrozenParents):
    """Trains classifiers that see the same images by one optimizer over all of them.

    A method defines `losses`, and `build_training_only` where something is trained beside the students.

    Args:
        students: image classifiers of equal or different architecture, `least_students` or more without a teacher.
        args, train_dataset, eval_dataset, processing_class, augmentation, callbacks, dataset_name: as in
            `DistillationTrainer`.
        teachers: trained classifiers of the students' classes, frozen.
        teacher_processing_classes: the image processor of each, or None for it; where the mean or standard deviation
            is not the students', pixel values are re-normalised for this teacher.
        teacher_image_size: side of the images that the teachers see; by default the students', and teachers made for
            another size are refused.

    Attributes:
        adapters: of the students, then of the teachers.
        shapes: (C, H, W) of each one's feature map.

    Raises:
        InputError: for networks that do not fit each other or the data.
    """

    config_class: ClassVar[type[CohortConfig]] = CohortConfig
    parent_role = "teacher"
    least_students: ClassVar[int] = 2
    # What to do about a teacher that was made for images of {own} pixels, where the data has {given}.
    teacher_size_mend: ClassVar[str] = "give a teacher made for {given}, or images of {own} pixels"
    args: CohortConfig

    def __init__(
        self,
        students: Sequence[PreTrainedModel],
        args: CohortConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        augmentation: Augmentation | None = None,
        callbacks: Sequence[Any] | None = None,
        dataset_name: str | None = None,
        *,
        teachers: Sequence[PreTrainedModel] = (),
        teacher_processing_classes: Sequence[Any] = (),
        teacher_image_size: int | None = None,
        tap: Tap = "post_activation",
    ) -> None:
        args = args or self.config_class()
        dtype = check_networks(students, teachers, self.least_students)
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            check_labels(name, dataset, students[0].config.num_labels)
        preprocessing = preprocessing_of(train_dataset, processing_class, students[0].config)
        processors = processor_of_each(teachers, teacher_processing_classes)
        if teacher_image_size is None:
            check_teacher_sizes(teachers, processors, preprocessing.image_size, self.teacher_size_mend)
        sides = [preprocessing.image_size] * len(students)
        sides += [teacher_image_size or preprocessing.image_size] * len(teachers)
        check_images(students, (), preprocessing)
        check_images((), teachers, replace(preprocessing, image_size=sides[-1]))
        frozen = [
            FrozenTeacher(teacher.to(dtype), teacher_input(preprocessing, processor, teacher_image_size))
            for teacher, processor in zip(teachers, processors, strict=True)
        ]
        self.adapters = [ClassifierAdapter(model, tap=tap) for model in (*students, *(t.model for t in frozen))]
        self.shapes: list[Shape] = [
            adapter.feature_shape(side) for adapter, side in zip(self.adapters, sides, strict=True)
        ]
        # From a generator of their own: with or without these modules the students start and go on alike.
        with torch.random.fork_rng():
            torch.manual_seed(args.seed + 1)
            training_only = {name: module.to(dtype) for name, module in self.build_training_only(args).items()}
        networks = TrainingNetworks(students, training_only, frozen)
        check_batches(train_dataset, args, students, networks.training_only)
        super().__init__(
            networks,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            augmentation=augmentation,
            callbacks=callbacks,
            dataset_name=dataset_name,
        )

    # -- what a method defines -----------------------------------------------------------------------------------

    def build_training_only(self, args: Any) -> dict[str, nn.Module]:
        """What is trained beside the students, by name; `adapters` and `shapes` are known. By default nothing."""
        return {}

    def losses(
        self, features: Sequence[ClassifierFeatures], batch: dict[str, Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The losses whose sum is descended, and the parts to log, all 0-dim means over the batch.

        Args:
            features: of the students, then of the teachers; logits may be in half precision, see `logits_of`.
            batch: `pixel_values` (N, C, H, W), `labels` (N,), `index` (N,).
        """
        raise NotImplementedError

    def fingerprints(self) -> list[str]:
        """Of the teachers."""
        return [teacher.fingerprint() for teacher in self.model.frozen()]

    # -- optimizers ----------------------------------------------------------------------------------------------

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """One optimizer for the students and what is trained beside them."""
        parameters = [*self.model.students.parameters(), *self.model.training_only.parameters()]
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        return {"student": build_main_optimizer(trained, self.args)}

    def build_schedules(self, optimizers: dict[str, torch.optim.Optimizer], max_steps: int) -> dict[str, Any]:
        return {"student": build_main_schedule(optimizers["student"], self.args, max_steps)}

    # -- one update ----------------------------------------------------------------------------------------------

    def method_step(self, batch: dict[str, Tensor], share: float, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        losses, parts = self.losses(self.training_features(batch), batch)
        total = torch.stack(losses).sum()
        self.optimizer.backward("student", share * total)
        return total.detach(), {name: value.detach() for name, value in parts.items()}

    def training_features(self, batch: dict[str, Tensor]) -> list[ClassifierFeatures]:
        """What `losses` gets: by default all networks see the same view of the images."""
        return self.features(batch["pixel_values"])

    def features(self, pixel_values: Tensor) -> list[ClassifierFeatures]:
        """One forward pass of every student, then of every teacher, without gradient."""
        count = len(self.model.students)
        with self.autocast():
            features = [adapter(pixel_values) for adapter in self.adapters[:count]]
            for teacher, adapter in zip(self.model.frozen(), self.adapters[count:], strict=True):
                with torch.no_grad():
                    features.append(adapter(teacher.renormalize(pixel_values)))
        return features

    def logits_of(self, features: Sequence[ClassifierFeatures]) -> list[Tensor]:
        """The logits (N, K) of each of the networks, in full precision: losses are not taken in bf16."""
        return [full_precision(one.logits) for one in features]

    # -- evaluation ----------------------------------------------------------------------------------------------

    def evaluation_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        pixel_values = batch["pixel_values"]
        features = [adapter(pixel_values) for adapter in self.adapters[: len(self.model.students)]]
        return {"logits": torch.stack(self.logits_of(features), dim=1)}

    def evaluation_metrics(self, outputs: dict[str, Tensor], labels: Tensor) -> dict[str, float]:
        """`loss` (mean cross-entropy of the students) and the accuracies of `cohort_metrics`."""
        students = list(outputs["logits"].unbind(dim=1))
        loss = torch.stack([F.cross_entropy(logits, labels) for logits in students]).mean().item()
        return {"loss": loss, **cohort_metrics(students, labels)}
