"""Offline distillation: a student learns from the labels and from trained teachers, which stay as they are.

The loss is CE plus a weighted sum of terms, each chosen by name: Hinton's KD and its successors on logits, hints,
attention, relations, contrast and review on features. `distillation_terms.LOSSES` lists them, `hfkd.losses` and
`hfkd.models.distillation_layers` hold the formulas.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import datasets
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfkd.data import Augmentation, ImageSource
from hfkd.data.columns import find_columns, read_labels
from hfkd.errors import InputError
from hfkd.losses.logit_distillation import joint_logits
from hfkd.models import ClassifierFeatures
from hfkd.models.tapped_adapter import TappedAdapter, TappedFeatures

from .cached_teacher import CachedTeacher, CachedTeacherConfig
from .cohort_checks import check_is_model
from .config import check_positive, check_range
from .distillation_papers import PAPERS
from .distillation_terms import LOSSES, Given, Seen, build_feature_terms
from .feature_maps import full_precision
from .images import preprocessing_of


@dataclass
class OfflineDistillationConfig(CachedTeacherConfig):
    """Settings of offline distillation. The schedule is that of AFD's comparisons, weights those of released code."""

    loss: list[str] = field(
        default_factory=lambda: ["kd"],
        metadata={"help": f"One or several, which are added: {', '.join(LOSSES)}."},
    )
    loss_weights: list[float] = field(
        default_factory=list,
        metadata={
            "help": "One for each loss, > 0; by default those of released code ("
            + ", ".join(f"{name} {kind.weight:g}" for name, kind in LOSSES.items())
            + ")."
        },
    )
    ce_weight: float = field(default=1.0, metadata={"help": "Weight of the cross-entropy with the labels, >= 0."})
    kd_alpha: float | None = field(
        default=None,
        metadata={
            "help": "The convex form (1 - a) CE + a (weighted losses), a in (0, 1] (CRD's benchmark: KD with 0.9); "
            "default: the sum ce_weight CE + (weighted losses)."
        },
    )
    distillation_warmup_epochs: float = field(
        default=0.0,
        metadata={"help": "Epochs over which the losses' weights rise from 0 (code of DKD and ReviewKD: 20)."},
    )
    temperature: float = field(
        default=4.0,
        metadata={"help": "T of losses on logits, > 0 (DKD, DIST, KD on CIFAR: 4; logit_standardised: 2; AFD: 3)."},
    )
    dkd_target_weight: float = field(default=1.0, metadata={"help": "alpha, of TCKD (paper: 1)."})
    dkd_nontarget_weight: float = field(
        default=8.0, metadata={"help": "beta, of NCKD (paper: 8; code: 2 for ResNet-56 to ResNet-20)."}
    )
    dist_inter_weight: float = field(default=2.0, metadata={"help": "beta, between an image's classes (paper: 2)."})
    dist_intra_weight: float = field(default=2.0, metadata={"help": "gamma, between a class's images (paper: 2)."})
    rkd_distance_weight: float = field(default=25.0, metadata={"help": "Of distances of pairs (paper: 25)."})
    rkd_angle_weight: float = field(default=50.0, metadata={"help": "Of angles of triplets (paper: 50)."})
    crd_negatives: int = field(default=16384, metadata={"help": "Negatives of each image, >= 1 (paper: 16384)."})
    crd_temperature: float = field(default=0.07, metadata={"help": "Of similarities, > 0 (code: 0.07)."})
    crd_momentum: float = field(default=0.5, metadata={"help": "Of the memory, in [0, 1) (paper: 0.5)."})
    crd_embedding_size: int = field(default=128, metadata={"help": "Width of the embeddings (paper: 128)."})
    student_layers: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Layers that fitnets, attention and review compare, shallow first: numbers of stages (1, 2, ..., "
            "-1 the last), module paths, or pooled; default: the middle stage for fitnets, all stages for attention, "
            "and with pooled for review."
        },
    )
    teacher_layers: list[str] = field(
        default_factory=list, metadata={"help": "The teachers' layers that they are compared with, as many."}
    )
    teacher_image_size: int | None = field(
        default=None,
        metadata={
            "help": "Side of the images that the teachers see, by bilinear interpolation of the student's; default: "
            "the student's, and teachers made for another size are refused."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.student_layers, self.teacher_layers = (
            [str(layer) for layer in layers] for layers in (self.student_layers, self.teacher_layers)
        )
        self._check_losses()
        for name in ("ce_weight", "distillation_warmup_epochs", "dkd_target_weight", "dkd_nontarget_weight"):
            check_range(name, getattr(self, name), 0)
        for name in ("dist_inter_weight", "dist_intra_weight", "rkd_distance_weight", "rkd_angle_weight"):
            check_range(name, getattr(self, name), 0)
        for name in ("crd_negatives", "crd_embedding_size"):
            check_range(name, getattr(self, name), 1)
        check_range("crd_momentum", self.crd_momentum, 0, 1, high_open=True)
        for name in ("temperature", "crd_temperature", "kd_alpha", "teacher_image_size"):
            if (value := getattr(self, name)) is not None:
                check_positive(name, value)
        if self.kd_alpha is not None:
            check_range("kd_alpha", self.kd_alpha, 0, 1)
            self.refuse_changed(["ce_weight"], f"kd_alpha={self.kd_alpha}")
        self._check_what_losses_need()

    def _check_losses(self) -> None:
        for name in self.loss:
            if name not in LOSSES:
                near = difflib.get_close_matches(name, LOSSES, n=1, cutoff=0.0)[0]
                raise InputError(f"loss {name!r} is unknown (nearest: {near}): choose of {', '.join(LOSSES)}")
        if not self.loss or len(set(self.loss)) < len(self.loss):
            raise InputError(f"loss={self.loss}: name one loss, or several different ones")
        if self.loss_weights and (len(self.loss_weights) != len(self.loss) or min(self.loss_weights) <= 0):
            raise InputError(
                f"loss_weights={self.loss_weights}: give {len(self.loss)} above 0, for {', '.join(self.loss)}"
            )

    def _check_what_losses_need(self) -> None:
        """Refuse what no loss looks at, and what one cannot work with."""
        named = f"loss={','.join(self.loss)}"
        self.refuse_changed([f"{name}_" for name in ("dkd", "dist", "rkd", "crd") if name not in self.loss], named)
        kinds = {name: LOSSES[name] for name in self.loss}
        if not any(kind.logits for kind in kinds.values()):
            self.refuse_changed(["temperature"], named)
        if not any(kind.layers for kind in kinds.values()):
            self.refuse_changed(["student_layers", "teacher_layers"], named)
        if len(self.student_layers) != len(self.teacher_layers):
            raise InputError(
                f"student_layers={self.student_layers} and teacher_layers={self.teacher_layers} are compared one by "
                "one: name as many of each"
            )
        for name, kind in kinds.items():
            if kind.relates and self.gradient_accumulation_steps > 1:
                raise InputError(
                    f"gradient_accumulation_steps={self.gradient_accumulation_steps} with loss={name}, which compares "
                    "the images of a whole batch: choose a larger per_device_train_batch_size instead"
                )
            if self.teacher_cache_top_k is not None and name != "kd":
                raise InputError(
                    f"teacher_cache_top_k={self.teacher_cache_top_k} knows the largest logits alone, and loss={name} "
                    "looks at all of them: leave it out, or choose kd"
                )
            if kind.features and self.teacher_cache_dir is not None:
                raise InputError(
                    f"teacher_cache_dir={self.teacher_cache_dir} keeps logits, and loss={name} needs the teachers' "
                    "features: leave it out, or choose a loss on logits"
                )

    @property
    def weights(self) -> dict[str, float]:
        """What each loss is multiplied by."""
        given = self.loss_weights or [LOSSES[name].weight for name in self.loss]
        return dict(zip(self.loss, given, strict=True))


class OfflineDistillationTrainer(CachedTeacher):
    """Trains a student by labels and trained teachers.

    Losses on logits learn from the mean of the teachers' probabilities at T; losses on features are averaged over the
    teachers. What a loss trains beside the student (regressors, memories, fusions) is training-only. Where a loss
    compares the images of a batch, it is the batch of all processes.

    Args:
        student: an image classifier.
        teachers: a trained image classifier of the same classes in the same order (`hfkd.models.class_names` brings
            one there), or several; frozen.
        args: the settings.
        train_dataset, eval_dataset, processing_class, augmentation, callbacks, dataset_name: as in
            `DistillationTrainer`.
        teacher_processing_classes: the image processor of each teacher, or None; by default the student's
            statistics are theirs.

    Raises:
        InputError: for networks that do not fit each other, the images, or the settings.

    Example:
        >>> student = build_student("resnet20", class_names=names, image_size=32)
        >>> args = OfflineDistillationConfig("runs", loss=["kd", "attention"])
        >>> OfflineDistillationTrainer(student, teacher, args, train_dataset=train).train()
    """

    _name = "Offline distillation"
    _paper: ClassVar = PAPERS["kd"]  # of a run, that of its first loss
    _tag_names: ClassVar = ["hfkd", "knowledge-distillation", "offline-distillation"]
    _template_file = "distillation.md"

    least_students = 1
    teacher_size_mend = (
        "set teacher_image_size={own} to have them resized for it, or {given} to leave them as they are"
    )
    args: OfflineDistillationConfig

    def __init__(
        self,
        student: PreTrainedModel,
        teachers: PreTrainedModel | Sequence[PreTrainedModel],
        args: OfflineDistillationConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        augmentation: Augmentation | None = None,
        callbacks: Sequence[Any] | None = None,
        dataset_name: str | None = None,
        *,
        teacher_processing_classes: Sequence[Any] = (),
    ) -> None:
        args = args or OfflineDistillationConfig()
        teachers = [teachers] if isinstance(teachers, nn.Module) else list(teachers)
        check_is_model("student", student)
        if not teachers:
            raise InputError("teachers=[]: give one trained classifier or more, or train by method supervised")
        self._image_size = preprocessing_of(train_dataset, processing_class, student.config).image_size
        self._training_images = train_dataset
        self.__dict__["_paper"] = PAPERS[args.loss[0]]  # what this run's card cites
        super().__init__(
            [student],
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            augmentation=augmentation,
            callbacks=callbacks,
            dataset_name=dataset_name,
            teachers=teachers,
            teacher_processing_classes=teacher_processing_classes,
            teacher_image_size=args.teacher_image_size,
        )

    def build_training_only(self, args: OfflineDistillationConfig) -> dict[str, nn.Module]:
        """Of each loss on features its terms, one for each teacher."""
        if not any(LOSSES[name].features for name in args.loss):
            return {}
        tapped = [TappedAdapter(adapter.model) for adapter in self.adapters]
        self.adapters = list(tapped)
        sides = [self._image_size] + [args.teacher_image_size or self._image_size] * (len(tapped) - 1)
        labels = _labels_of(self._training_images) if "crd" in args.loss else None
        return dict(build_feature_terms(tapped, args, sides, labels))

    # -- the loss ------------------------------------------------------------------------------------------------

    def losses(
        self, features: Sequence[ClassifierFeatures], batch: dict[str, Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """CE + sum of w_i L_i, or its convex form; the parts are logged without their weights."""
        args, labels = self.args, batch["labels"]
        logits, *taught = self.logits_of(features)
        kept = self.teacher_logits(batch)
        target = self.combine_teachers(taught) if kept is None else kept
        student, *teachers = [_seen(one) for one in features]
        key = (self.data_seed, self.state.global_step)
        given = Given(logits, target, student, teachers, labels, batch["index"], *key)
        terms = {name: self._term(name, given) for name in args.loss}
        cross_entropy = F.cross_entropy(logits, labels)
        weights = args.weights
        distilled = self._warmth * torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        if args.kd_alpha is None:
            loss = args.ce_weight * cross_entropy + distilled
        else:
            loss = (1 - args.kd_alpha) * cross_entropy + args.kd_alpha * distilled
        parts = {"student_0_ce": cross_entropy} | {f"student_0_{name}": term for name, term in terms.items()}
        return [loss], parts

    def _term(self, name: str, given: Given) -> Tensor:
        kind = LOSSES[name]
        if kind.relates:
            given = given.gathered()
        if kind.logits is not None:
            return kind.logits(given.logits, given.target, given.labels, self.args)
        terms: Any = self.model.training_only[name]
        return torch.stack([term(given, k) for k, term in enumerate(terms)]).mean()

    @property
    def _warmth(self) -> float:
        """What the losses' weights are multiplied by, in [0, 1]: linear in the epoch."""
        epochs = self.args.distillation_warmup_epochs
        return min(1.0, (self.state.epoch or 0.0) / epochs) if epochs else 1.0

    # -- the teachers --------------------------------------------------------------------------------------------

    def combine_teachers(self, logits: Sequence[Tensor]) -> Tensor:
        """Logits whose softmax at T is the mean of the teachers' at T."""
        return joint_logits(logits, self.args.temperature)

    def combination(self) -> str:
        alone = len(self.model.teachers) == 1
        return "one teacher" if alone else f"mean of probabilities at T={self.args.temperature:g}"

    # -- the card ------------------------------------------------------------------------------------------------

    def card_settings(self) -> dict[str, Any]:
        """The loss comes first, then the layers that it compares."""
        weighted = " + ".join(f"{weight:g} {name}" for name, weight in self.args.weights.items())
        share = self.args.kd_alpha
        whole = f"{self.args.ce_weight:g} CE + {weighted}"
        found = {"loss": whole if share is None else f"{1 - share:g} CE + {share:g} ({weighted})"}
        modules: Any = self.model.training_only
        for name, terms in modules.items():
            for k, term in enumerate(terms):
                of = f" of teacher {k}" if len(terms) > 1 else ""
                if pairs := ", ".join(f"{own} - {other}" for own, other in term.pairs):
                    found[f"layers of {name}, student - teacher{of}"] = pairs
        settings = super().card_settings()
        return found | {name: value for name, value in settings.items() if name not in ("loss", "loss_weights")}


def _labels_of(dataset: Any) -> Tensor | None:
    """(M,) class numbers of the training images."""
    if isinstance(dataset, datasets.Dataset):
        return read_labels(dataset, find_columns(dataset.features), "train")
    return dataset.labels if isinstance(dataset, ImageSource) else None


def _seen(features: ClassifierFeatures) -> Seen:
    layers = features.layers if isinstance(features, TappedFeatures) else {}
    return Seen(full_precision(features.pooled), {name: full_precision(layer) for name, layer in layers.items()})
