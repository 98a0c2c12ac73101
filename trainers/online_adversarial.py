"""AFD: feature-map-level online adversarial knowledge distillation (Chung et al., ICML 2020, arXiv 2002.01775).

K networks Theta_k = C_k o G_k see one mini-batch. Each learns from the previous one in a cycle (for K = 2 the two
teach each other): its logits by CE + T^2 KL with SGD, its feature map by fooling a discriminator D_k with Adam at a
far smaller learning rate. One forward pass per network and mini-batch serves both.

The paper's symbols: F_k = G_k(x) the feature map, T_k the transfer layer, f_k = T_k(F_k), z_k the logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfkd.data import Augmentation
from hfkd.errors import InputError
from hfkd.evaluation.similarity import map_distances
from hfkd.losses.online_adversarial import (
    GAN_LOSSES,
    GanLoss,
    distillation_kl,
    kl_rampup,
    previous,
)
from hfkd.models import ClassifierFeatures

from .cohort import CohortConfig, CohortTrainer
from .config import check_milestones, check_positive, check_range
from .feature_maps import FeatureMapTeaching
from .networks import frozen_running_statistics
from .optimizers import build_main_optimizer, build_main_schedule, milestone_schedule
from .state import restore_rng_state, rng_state


# A setting, the values of it that leave other fields without effect, and those fields or their prefixes.
_WITHOUT_EFFECT: tuple[tuple[str, tuple[Any, ...], tuple[str, ...]], ...] = (
    ("kl_weight", (0,), ("temperature", "kl_rampup_epochs", "logit_source")),
    (
        "feature_loss",
        ("none",),
        ("feature_loss_weight", "feature_optimizer", "feature_learning_rate", "feature_weight_decay")
        + ("feature_lr_milestones", "feature_start_epoch", "feature_normalize")
        + ("gan_loss", "discriminator_", "transfer_", "update_"),
    ),
    ("feature_loss", ("l1", "l2"), ("gan_loss", "discriminator_", "update_order")),
    ("feature_loss", ("adversarial",), ("feature_normalize",)),
    ("feature_loss_weight", (0,), ("feature_normalize", "gan_loss", "discriminator_", "transfer_", "update_")),
    (
        "feature_optimizer",
        ("main",),
        ("feature_learning_rate", "feature_weight_decay", "feature_lr_milestones", "update_mode"),
    ),
    ("discriminator_layers", (1,), ("discriminator_channels", "discriminator_norm")),
)


@dataclass
class OnlineAdversarialConfig(CohortConfig):
    """Settings of AFD. The defaults are the paper's for CIFAR-100, or inferred where it is silent (each help says so).

    The comparison arms are settings: vanilla (`kl_weight=0, feature_loss=none`), logit only (`feature_loss=none`,
    which is DML with a temperature), adversarial only (`kl_weight=0`), L1 + KD (`feature_loss=l1`), and the control
    whose Adam only shrinks weights (`feature_loss_weight=0`).
    """

    temperature: float = field(default=3.0, metadata={"help": "T of the KL term, > 0 (inferred: 3)."})
    kl_weight: float = field(default=1.0, metadata={"help": "Weight of T^2 KL (paper: 1); 0: cross-entropy alone."})
    kl_rampup_epochs: float = field(default=0.0, metadata={"help": "Epochs of KL ramp-up (inferred: 0, none)."})
    logit_source: Literal["cycle", "all"] = field(
        default="cycle", metadata={"help": "Whose logits teach: cycle (the paper's figure), or all peers' mean."}
    )

    feature_loss: Literal["adversarial", "l1", "l2", "none"] = field(
        default="adversarial", metadata={"help": "On the feature maps: adversarial, l1, l2 (alignment) or none."}
    )
    feature_loss_weight: float = field(
        default=1.0, metadata={"help": "Its weight (paper: 1); 0 leaves Adam's weight decay alone: a control."}
    )
    feature_optimizer: Literal["adam", "adamw", "main"] = field(
        default="adam",
        metadata={"help": "adam (weight decay coupled, the literal reading), adamw, or main: alignment joins SGD."},
    )
    feature_learning_rate: float = field(default=2e-5, metadata={"help": "Of Adam on feature extractors (paper)."})
    feature_weight_decay: float = field(default=0.1, metadata={"help": "Of both Adams (paper: 0.1)."})
    feature_lr_milestones: list[float] = field(
        default_factory=lambda: [0.25, 0.5],
        metadata={"help": "Fractions of the run at which both Adams' rates fall (paper: epochs 75 and 150 of 300)."},
    )
    feature_start_epoch: float = field(default=0.0, metadata={"help": "Epoch the map losses start at (inferred: 0)."})
    feature_normalize: bool = field(
        default=False, metadata={"help": "Divide each map by its l2 norm before alignment (inferred: no)."}
    )
    feature_tap: Literal["post_activation", "pre_activation"] = field(
        default="post_activation", metadata={"help": "The map: post_activation or pre_activation of the last block."}
    )

    gan_loss: GanLoss = field(
        default="lsgan_sigmoid", metadata={"help": f"One of {', '.join(GAN_LOSSES)} (paper: first)."}
    )
    discriminator_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Of Adam on the discriminators; None: feature_learning_rate (paper: the same)."},
    )
    discriminator_norm: Literal["batch", "instance", "none"] = field(
        default="batch", metadata={"help": "In the discriminators: batch, instance or none (inferred: batch)."}
    )
    discriminator_batch: Literal["separate", "joint"] = field(
        default="separate", metadata={"help": "Real and fake maps pass D separate or joint (inferred: separate)."}
    )
    discriminator_channels: int | None = field(default=None, metadata={"help": "Hidden width of D; None: the maps'."})
    discriminator_layers: int = field(default=2, metadata={"help": "Convolutions of D, >= 1 (inferred: 2)."})
    discriminator_patch: bool = field(default=False, metadata={"help": "D scores positions instead of maps."})
    discriminator_spectral_norm: bool = field(default=False, metadata={"help": "Spectral norm in D."})
    transfer_channels: str = field(
        default="min", metadata={"help": "Common width of unequal maps: min, max or a number (inferred: min)."}
    )
    transfer_activation: Literal["relu", "none"] = field(
        default="relu", metadata={"help": "After a transfer layer: relu or none."}
    )
    transfer_always: bool = field(default=False, metadata={"help": "Transfer layers where channels agree, too."})
    update_order: Literal["discriminator_first", "generator_first"] = field(
        default="discriminator_first", metadata={"help": "discriminator_first (inferred) or generator_first."}
    )
    update_mode: Literal["single_forward", "recompute"] = field(
        default="single_forward",
        metadata={"help": "single_forward (the paper's one inference), or recompute: maps again after the SGD step."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("temperature", self.temperature)
        for name in ("kl_weight", "kl_rampup_epochs", "feature_loss_weight", "feature_learning_rate"):
            check_range(name, getattr(self, name), 0)
        for name in ("feature_weight_decay", "feature_start_epoch"):
            check_range(name, getattr(self, name), 0)
        check_range("discriminator_layers", self.discriminator_layers, 1)
        if self.discriminator_channels is not None:
            check_range("discriminator_channels", self.discriminator_channels, 1)
        if self.discriminator_learning_rate is not None:
            check_range("discriminator_learning_rate", self.discriminator_learning_rate, 0)
        check_milestones("feature_lr_milestones", self.feature_lr_milestones)
        self.transfer_channels = str(self.transfer_channels)
        if self.transfer_channels not in ("min", "max") and not self.transfer_channels.lstrip("0").isdecimal():
            raise InputError(f"transfer_channels={self.transfer_channels!r}: choose min, max or a number of channels")
        if self.feature_optimizer == "main" and self.feature_loss not in ("l1", "l2"):
            raise InputError(
                "feature_optimizer=main joins an alignment loss to the logit loss, but "
                f"feature_loss={self.feature_loss}: choose l1 or l2, or feature_optimizer=adam"
            )
        for setting, values, ignored in _WITHOUT_EFFECT:
            if getattr(self, setting) in values:
                self.refuse_changed(ignored, f"{setting}={getattr(self, setting)}")


@dataclass
class _MicroBatch:
    """`generators` is the state before its forward pass, kept where its maps will be needed again."""

    batch: dict[str, Tensor]
    share: float
    generators: dict[str, Any] | None


class OnlineAdversarialTrainer(CohortTrainer):
    """Trains a cohort of students that teach each other logits and the distribution of feature maps.

    Args:
        students: K >= 2 image classifiers of equal or different architecture, in the order of the cycle: the first
            teaches the second, ..., the last teaches the first. K >= 1 with a teacher.
        args: the settings.
        train_dataset, eval_dataset, processing_class, augmentation, callbacks, dataset_name: as in
            `DistillationTrainer`.
        teacher: offline variant: a trained classifier, frozen, that every student learns from instead of its peers.
        teacher_processing_class: the teacher's image processor, where its mean or standard deviation is not the
            students'; pixel values are re-normalised for it.

    Raises:
        InputError: for students that do not fit each other, the teacher or the data.

    Example:
        >>> students = [build_student("resnet20", class_names=names, image_size=32, seed=s) for s in (0, 1)]
        >>> trainer = OnlineAdversarialTrainer(students, args=OnlineAdversarialConfig("runs"), train_dataset=train)
        >>> trainer.train()
    """

    _name = "Online adversarial distillation (AFD)"
    _paper: ClassVar = {
        "title": "Feature-map-level Online Adversarial Knowledge Distillation",
        "id": "2002.01775",
        "citation": (
            "@inproceedings{chung2020afd,\n"
            "  title     = {Feature-map-level Online Adversarial Knowledge Distillation},\n"
            "  author    = {Chung, Inseop and Park, SeongUk and Kim, Jangho and Kwak, Nojun},\n"
            "  booktitle = {International Conference on Machine Learning},\n"
            "  year      = {2020}\n"
            "}"
        ),
    }
    _tag_names: ClassVar = ["hfkd", "knowledge-distillation", "online-distillation", "online-adversarial"]
    _template_file = "online_adversarial.md"

    args: OnlineAdversarialConfig

    def __init__(
        self,
        students: Sequence[PreTrainedModel],
        args: OnlineAdversarialConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        augmentation: Augmentation | None = None,
        teacher: PreTrainedModel | None = None,
        teacher_processing_class: Any = None,
        callbacks: Sequence[Any] | None = None,
        dataset_name: str | None = None,
    ) -> None:
        count = len(students) if isinstance(students, Sequence) else 0  # what is no list is refused below
        # Whom each student learns from: the one before it in the cycle, or the teacher, who comes last.
        self.sources = [count if teacher is not None else previous(k, count) for k in range(count)]
        self.maps: FeatureMapTeaching | None = None
        args = args or OnlineAdversarialConfig()
        super().__init__(
            students,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            augmentation=augmentation,
            callbacks=callbacks,
            dataset_name=dataset_name,
            teachers=[] if teacher is None else [teacher],
            teacher_processing_classes=[] if teacher is None else [teacher_processing_class],
            tap=args.feature_tap,
        )
        self._pending: list[_MicroBatch] = []

    def build_training_only(self, args: OnlineAdversarialConfig) -> dict[str, nn.Module]:
        """T_k and D_k."""
        if args.feature_loss == "none" or args.feature_loss_weight == 0:
            return {}
        self.maps = FeatureMapTeaching(self.shapes, self.sources, args)
        return dict(self.maps.named_children())

    # -- optimizers --------------------------------------------------------------------------------------------------

    @property
    def _map_losses(self) -> bool:
        return self.args.feature_loss != "none" and self.args.feature_optimizer != "main"

    @property
    def _joined(self) -> bool:
        """Alignment is part of the main optimizer's loss."""
        return self.args.feature_optimizer == "main" and self.maps is not None

    @property
    def _adversarial(self) -> bool:
        return self.maps is not None and len(self.maps.discriminators) > 0

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """SGD over all of Theta_k; Adam over G_k and T_k; Adam over D_k (paper, section 4; groups inferred)."""
        args = self.args
        students = [p for p in self.model.students.parameters() if p.requires_grad]
        if self.maps is not None and self._joined:
            students += self.maps.transfer.parameters()
        optimizers = {"student": build_main_optimizer(students, args)}
        if self._map_losses:
            # Coupled: the decay enters Adam's normalised step, so that most of it is a constant-speed shrink.
            adam = torch.optim.AdamW if args.feature_optimizer == "adamw" else torch.optim.Adam
            decay = args.feature_weight_decay
            rate = args.feature_learning_rate
            optimizers["feature"] = adam(self._feature_parameters(), lr=rate, weight_decay=decay, fused=True)
            if self.maps is not None and self._adversarial:
                rate = rate if args.discriminator_learning_rate is None else args.discriminator_learning_rate
                parameters = self.maps.discriminators.parameters()
                optimizers["discriminator"] = adam(parameters, lr=rate, weight_decay=decay, fused=True)
        return optimizers

    def _feature_parameters(self) -> list[nn.Parameter]:
        """Of every G_k and T_k; never of a head C_k or of a frozen teacher."""
        count = len(self.model.students)
        parameters = [p for adapter in self.adapters[:count] for p in adapter.backbone_parameters()]
        if self.maps is not None:
            parameters += [p for layer in self.maps.transfer[:count] for p in layer.parameters()]
        return [p for p in parameters if p.requires_grad]

    def build_schedules(self, optimizers: dict[str, torch.optim.Optimizer], max_steps: int) -> dict[str, Any]:
        args = self.args
        schedules = {
            name: milestone_schedule(
                optimizer, max_steps=max_steps, milestones=args.feature_lr_milestones, gamma=args.lr_gamma
            )
            for name, optimizer in optimizers.items()
            if name != "student"
        }
        return {"student": build_main_schedule(optimizers["student"], args, max_steps), **schedules}

    # -- one update --------------------------------------------------------------------------------------------------

    def method_step(self, batch: dict[str, Tensor], share: float, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits first, then maps (paper, section 3); both gradients are taken before any weight of Theta_k moves.

        A single micro-batch needs one forward pass. Several (gradient accumulation) need the maps again for the
        adversarial loss, because the discriminators step in between; running statistics are updated once.
        """
        started = (self.state.epoch or 0.0) >= self.args.feature_start_epoch
        maps_active = started and self._map_losses
        again = maps_active and (share < 1 or self.args.update_mode == "recompute")
        this = _MicroBatch(batch, share, rng_state() if again else None)
        features = self.features(batch["pixel_values"])
        losses, parts = self._logit_losses(features, batch["labels"])
        if self.maps is not None and started and self._joined:
            aligned = self.maps.extractor_losses(self._maps(features))
            losses = [x + self.args.feature_loss_weight * y for x, y in zip(losses, aligned, strict=True)]
            parts |= {f"student_{k}_feature": loss for k, loss in enumerate(aligned)}
        # Peers are detached, so the gradient of the sum is each network's own.
        total = torch.stack(losses).sum()
        self.optimizer.backward("student", share * total, retain_graph=maps_active and not again)
        if maps_active:
            feature_losses, discriminator_parts = self._map_step(this, features, last)
            parts |= discriminator_parts | {f"student_{k}_feature": loss for k, loss in enumerate(feature_losses)}
            total = total + self.args.feature_loss_weight * sum(feature_losses)
        return total.detach(), {name: value.detach() for name, value in parts.items()}

    def _map_step(
        self, this: "_MicroBatch", features: list[ClassifierFeatures], last: bool
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Discriminators first, then feature extractors through them; returns L_G^k and the discriminators' log."""
        args = self.args
        parts: dict[str, Tensor] = {}
        if self.maps is None:
            if last:  # the control: Adam sees zero gradients and its weight decay
                parameters = self._feature_parameters()
                self.optimizer.accumulate("feature", parameters, [torch.zeros_like(p) for p in parameters])
            return [], parts
        maps = self._maps(features)
        if self._adversarial:
            with self.autocast():
                losses, parts = self.maps.discriminator_losses(maps)
            self.optimizer.backward("discriminator", this.share * torch.stack(losses).sum())
        if last and self._adversarial and args.update_order == "discriminator_first":
            self.optimizer.step_now("discriminator")
        if this.generators is None:
            return self._extractor_step(maps, this.share), parts
        self._pending.append(this)
        if not last:
            return [], parts
        if args.update_mode == "recompute":
            self.optimizer.step_now("student")
        sums = [
            torch.stack(self._extractor_step(self._maps_again(earlier), earlier.share)) * earlier.share
            for earlier in self._pending
        ]
        self._pending.clear()
        # The log weighs this micro-batch by its share, and these losses are of the whole update.
        return list(torch.stack(sums).sum(dim=0) / this.share), parts

    def _extractor_step(self, maps: list[Tensor], share: float) -> list[Tensor]:
        assert self.maps is not None
        with self.autocast():
            losses = self.maps.extractor_losses(maps)
        self.optimizer.backward("feature", share * self.args.feature_loss_weight * torch.stack(losses).sum())
        return [loss.detach() for loss in losses]

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        self._pending.clear()
        return super().create_optimizer(model)

    # -- losses ------------------------------------------------------------------------------------------------------

    def _logit_losses(
        self, features: list[ClassifierFeatures], labels: Tensor
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """L_logit^k = CE(y, softmax(z_k)) + T^2 KL(softmax(z_prev(k) / T) || softmax(z_k / T)) (paper, eq. 13)."""
        args = self.args
        weight = args.kl_weight * kl_rampup(self.state.epoch or 0.0, args.kl_rampup_epochs)
        logits = self.logits_of(features)
        losses, parts = [], {}
        for k, source in enumerate(self.sources):
            loss = parts[f"student_{k}_ce"] = F.cross_entropy(logits[k], labels)
            if weight > 0:
                everyone = args.logit_source == "all" and not len(self.model.teachers)
                sources = [j for j in range(len(self.sources)) if j != k] if everyone else [source]
                divergences = [distillation_kl(logits[k], logits[j], args.temperature) for j in sources]
                kl = parts[f"student_{k}_kl"] = torch.stack(divergences).mean()
                loss = loss + weight * kl
            losses.append(loss)
        return losses, parts

    def _maps(self, features: list[ClassifierFeatures]) -> list[Tensor]:
        """f_k = T_k(F_k), of one shape for all networks; without transfer layers F_k."""
        maps = [f.feature_map for f in features]
        with self.autocast():
            return maps if self.maps is None else self.maps(maps)

    def _maps_again(self, earlier: "_MicroBatch") -> list[Tensor]:
        """The maps of an earlier forward pass, with its dropout and without updating running statistics again."""
        now = rng_state()
        assert earlier.generators is not None
        restore_rng_state(earlier.generators)
        with frozen_running_statistics(self.model):
            maps = self._maps(self.features(earlier.batch["pixel_values"]))
        restore_rng_state(now)
        return maps

    # -- evaluation --------------------------------------------------------------------------------------------------

    def evaluation_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        features = self.features(batch["pixel_values"])
        outputs = {"logits": torch.stack(self.logits_of(features)[: len(self.sources)], dim=1)}
        maps = self._maps(features)
        # In a cohort of two, (0, 1) and (1, 0) are one pair.
        for a, b in sorted({(min(pair), max(pair)) for pair in enumerate(self.sources)}):
            if a != b and maps[a].shape == maps[b].shape:
                outputs[f"maps_{a}_{b}"] = map_distances(maps[a], maps[b])
        if self.maps is not None:
            outputs |= self.maps.judge(maps)
        return outputs

    def evaluation_metrics(self, outputs: dict[str, Tensor], labels: Tensor) -> dict[str, float]:
        """Those of every cohort, map similarities, D accuracies."""
        metrics = super().evaluation_metrics(outputs, labels)
        for name, values in outputs.items():
            if name.startswith("maps_"):
                name = name if len(self.model.teachers) == 0 else name.rpartition("_")[0] + "_teacher"
                l1, l2, cosine = values.mean(dim=0).tolist()
                metrics |= {f"{name}_l1": l1, f"{name}_l2": l2, f"{name}_cosine": cosine}
            elif name.startswith("discriminator_") and not values.isnan().all():
                metrics[f"{name}_accuracy"] = values.nanmean().item()
        return metrics
