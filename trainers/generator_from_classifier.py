"""GBC: a conditional generator from nothing but a trained classifier (Yu and Wang, NeurIPS 2023, arXiv 2312.02470).

Weights that training has brought to convergence are a maximum-margin (KKT) point; the generator is trained until its
images satisfy that point's conditions. That idea, the duality and stationarity losses, the total variation, and one
generator for several classifiers are the paper's. Its formulas could not be obtained: those of
`hfkd.losses.generator_from_classifier`, and all settings but the number of updates, are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hfkd.data import KeyedDraws, keyed_uniform, travelling_normal
from hfkd.data.keyed_random import LATENT_STREAM, MIXING_STREAM
from hfkd.errors import InputError
from hfkd.losses.generator_from_classifier import pixel_mean, total_variation
from hfkd.models.generator import GeneratorPreTrainedModel
from hfkd.models.multiplier_network import learned_multipliers

from .classifier_checks import check_class_counts, check_generator_and_classifiers
from .cohort_checks import check_batches, common_precision
from .config import check_positive, check_range
from .convergence import Convergence, ConvergenceConditions
from .draws import DrawsOnlyConfig
from .feature_maps import full_precision
from .networks import TrainingNetworks
from .optimizers import build_adam, build_main_optimizer, build_main_schedule
from .parent_classifiers import ParentClassifiers


GENERATOR, MULTIPLIERS = "generator", "multipliers"


@dataclass
class GeneratorFromClassifierConfig(DrawsOnlyConfig):
    """Settings of GBC. Only the number of updates is the paper's; each help says where a value comes from."""

    _lower_is_better: ClassVar = ("stationarity", "duality")

    max_steps: int = field(
        default=50_000, metadata={"help": "Updates of the generator (paper: 50,000 'epochs', which have no data)."}
    )
    per_device_train_batch_size: int = field(
        default=256,
        metadata={
            "help": "Images generated in an update, for each classifier (ours; paper: random search). Best at least "
            "as many as the classifier was trained on: a small batch rewards images that are alike."
        },
    )
    optim: str = field(default="adam", metadata={"help": "adam or adamw_torch (ours)."})
    learning_rate: float = field(
        default=2e-3, metadata={"help": "Of the generator (ours; paper: searched at random)."}
    )
    lr_milestones: list[float] = field(
        default_factory=lambda: [0.6],
        metadata={"help": "Fractions of the run at which the learning rates are multiplied by lr_gamma (ours)."},
    )
    lr_gamma: float = field(default=0.2, metadata={"help": "Factor at each milestone (ours)."})
    max_grad_norm: float = field(default=5.0, metadata={"help": "Clip the generator's gradient to this norm (ours)."})

    stationarity_weight: float = field(
        default=1.0, metadata={"help": "Of the stationarity loss (ours; 1 to 10); 0: images on the margin alone."}
    )
    duality_weight: float = field(default=1.0, metadata={"help": "Of the duality loss (ours; 0.3 to 1)."})
    total_variation_weight: float = field(
        default=0.02,
        metadata={"help": "Of the total variation (ours: 0.02, and 0.2 for classifiers with batch norm)."},
    )
    warmup_updates: int = field(
        default=100,
        metadata={
            "help": "First updates with cross-entropy in place of stationarity and duality (ours): they end a dead "
            "start, in which no margin moves, and cost diversity. As many as max_steps: cross-entropy alone."
        },
    )

    pixel_mean_weight: float = field(
        default=0.0,
        metadata={
            "help": "Of the squared mean of each image's normalised pixels (ours), for classifiers whose normaliser "
            "has the statistics of their training images: it rules out inverted and grey images."
        },
    )
    latent_period: int = field(
        default=1,
        metadata={
            "help": "Updates in which the latents of a place in the batch travel to the next draw (ours). 1: fresh "
            "ones in each update, which makes a class's images alike; with more, a batch of as many images as the "
            "classifier was trained on can divide what they have to explain among them."
        },
    )

    multipliers: Literal["ce", "network", "constant"] = field(
        default="ce",
        metadata={
            "help": "Weights of the images: ce (those of cross-entropy, with the best scale in closed form), network "
            "(learned, of latents and class) or constant (one learned number); ours."
        },
    )
    temperature: Literal["exact", "std", "margin"] = field(
        default="std",
        metadata={
            "help": "Of multipliers=ce: exact (1, that of the classifier's training: what weight decay makes exact), "
            "std (the logits' deviation), or margin (margin_scale / margin_temperature); ours."
        },
    )
    margin_temperature: float = field(default=2.0, metadata={"help": "tau of temperature=margin (ours; 1 to 3)."})
    multiplier_learning_rate: float | None = field(
        default=None, metadata={"help": "Of multipliers=network or constant; None: twice learning_rate (ours)."}
    )

    stationarity_set: Literal["core", "all", "lambda_max", "last", "custom"] = field(
        default="core",
        metadata={
            "help": "Parameters that must be stationary, by their scaling exponents: core (of all that are needed, "
            "the fastest to grow), last (the core's last layer), lambda_max (the fastest of all); or all, for "
            "classifiers with weight decay; or custom (ours)."
        },
    )
    custom_set: list[str] = field(
        default_factory=list, metadata={"help": "Of stationarity_set=custom: names (* and ? as in files)."}
    )
    per_group: bool = field(
        default=True, metadata={"help": "Each parameter tensor counts alike; False: by its squared norm (ours)."}
    )
    zero_weight: float = field(
        default=0.0, metadata={"help": "Of the force on parameters that grow slower, which should vanish (ours)."}
    )
    duality: Literal["symmetric", "walls"] = field(
        default="symmetric",
        metadata={
            "help": "U-shaped function of margin / margin_scale: symmetric, or walls, which let images without weight "
            "lie beyond the margin (the shape is the paper's, the functions ours)."
        },
    )
    margin_scale: float | None = field(
        default=None,
        metadata={"help": "Margin of the training images; None: what was stored with each classifier (ours)."},
    )
    gate_sharpness: float = field(
        default=20.0, metadata={"help": "Of ReLU's gates in the backward pass; 0: gates as they are (ours)."}
    )
    batchnorm_statistics: Literal["running", "batch"] = field(
        default="running", metadata={"help": "In the classifier: the stored ones, or those of the images (ours)."}
    )
    classifiers_per_step: Literal["all", "one"] = field(
        default="all", metadata={"help": "Of several: all in each update, or one at random (ours)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_what_a_sum_over_the_batch_cannot_have()
        if self.optim == "sgd":
            raise InputError("optim=sgd is not for GBC, whose learned multipliers need adam's scale: choose adam")
        check_range("latent_period", self.latent_period, 1)
        weights = (
            "stationarity_weight",
            "duality_weight",
            "total_variation_weight",
            "pixel_mean_weight",
            "zero_weight",
        )
        for name in (*weights, "gate_sharpness", "warmup_updates"):
            check_range(name, getattr(self, name), 0)
        for name in ("margin_temperature", "margin_scale"):
            if (value := getattr(self, name)) is not None:
                check_positive(name, value)
        if self.multiplier_learning_rate is not None:
            check_range("multiplier_learning_rate", self.multiplier_learning_rate, 0)
        self._refuse_without_effect()

    def _refuse_what_a_sum_over_the_batch_cannot_have(self) -> None:
        if self.gradient_accumulation_steps > 1:
            raise InputError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} is not supported: stationarity is of "
                "the mean gradient over the whole batch, not a mean over its images; raise per_device_train_batch_size"
            )
        if self.world_size > 1:
            raise InputError(
                f"{self.world_size} processes are not supported: stationarity is of the mean gradient over the whole "
                "batch, which is not gathered over processes; launch one"
            )

    def _refuse_without_effect(self) -> None:
        if not (self.stationarity_weight or self.duality_weight or self.warmup_updates >= self.max_steps):
            raise InputError(
                "stationarity_weight=0 and duality_weight=0 leave nothing that the classifier says: give one of them, "
                "or warmup_updates as large as max_steps for cross-entropy alone"
            )
        if self.multipliers == "ce":
            self.refuse_changed(("multiplier_learning_rate",), "multipliers=ce")
        else:
            self.refuse_changed(("temperature", "margin_temperature"), f"multipliers={self.multipliers}")
        if self.temperature != "margin":
            self.refuse_changed(("margin_temperature",), f"temperature={self.temperature}")
        if self.stationarity_set == "all":
            self.refuse_changed(("zero_weight",), "stationarity_set=all")
        if self.stationarity_set != "custom":
            self.refuse_changed(("custom_set",), f"stationarity_set={self.stationarity_set}")
        elif not self.custom_set:
            raise InputError("stationarity_set=custom needs custom_set: name parameters, such as classifier.weight")


class GeneratorFromClassifierTrainer(ParentClassifiers):
    """Trains a conditional generator on what trained classifiers' weights say of their training images.

    No image is ever seen: nothing here takes one. `evaluate()` gives the data-free criterion on fixed draws:
    `sqrt_stationarity` (0: the weights are explained, 1: not at all), `duality`, `self_accuracy` and `loss`, which is
    stationarity + duality whatever the weights, for a search over settings to minimise. Of several classifiers they
    are means, and `classifier_<k>_sqrt_stationarity` and so on are those of each.

    Args:
        generator: an `HfkdConditionalGeneratorModel`, or a model with its methods and fields, whose `class_counts` are
            the classes of the classifiers. The paper's second algorithm, for several, is the first one for one.
        classifiers: one, or several: any image classifiers whose layers have scaling exponents. They are frozen.
        args: the settings.
        processing_classes: the classifiers' image processors; None for one that takes values in [-1, 1] as they are.
        callbacks: as in `DistillationTrainer`.

    Raises:
        InputError: for networks that do not fit each other.
    """

    _name = "Generator born from classifier (GBC)"
    _paper: ClassVar = {
        "title": "Generator Born from Classifier",
        "id": "2312.02470",
        "citation": (
            "@inproceedings{yu2023gbc,\n"
            "  title     = {Generator Born from Classifier},\n"
            "  author    = {Yu, Runpeng and Wang, Xinchao},\n"
            "  booktitle = {Advances in Neural Information Processing Systems},\n"
            "  year      = {2023}\n"
            "}"
        ),
    }
    _tag_names: ClassVar = ["hfkd", "generator-from-classifier", "data-free", "class-conditional", "maximum-margin"]
    _template_file = "generator_from_classifier.md"
    # The Hub has no task of images by class number. This is the one whose models take neither text nor an image.
    _task = "unconditional-image-generation"

    args: GeneratorFromClassifierConfig

    def __init__(
        self,
        generator: GeneratorPreTrainedModel,
        classifiers: PreTrainedModel | Sequence[PreTrainedModel],
        args: GeneratorFromClassifierConfig | None = None,
        processing_classes: Any = None,
        callbacks: Sequence[Any] | None = None,
    ) -> None:
        args = args or GeneratorFromClassifierConfig()
        found = list(classifiers) if isinstance(classifiers, Sequence) else [classifiers]
        processors = list(processing_classes) if isinstance(processing_classes, Sequence) else [processing_classes]
        check_generator_and_classifiers(generator, found, processors)
        if args.classifiers_per_step == "one" and len(found) == 1:
            raise InputError("classifiers_per_step=one has no effect with one classifier: leave it out")
        dtype = common_precision([generator, *found])
        conditions = [
            ConvergenceConditions(
                classifier,
                processor,
                args,
                generator.config.image_size,
                generator.config.num_channels,
                "the classifier" if len(found) == 1 else f"classifier {k}",
            )
            for k, (classifier, processor) in enumerate(zip(found, processors, strict=True))
        ]
        counts = [one.num_labels for one in conditions]
        check_class_counts(generator, counts)
        self.latent_size = generator.config.latent_size
        with torch.random.fork_rng():
            torch.manual_seed(args.seed + 1)
            learned = learned_multipliers(args.multipliers, self.latent_size, counts)
        networks = TrainingNetworks([generator], {MULTIPLIERS: learned.to(dtype)} if learned else {}, conditions)
        check_batches(KeyedDraws(args.train_batch_size), args, [generator], networks.training_only)
        super().__init__(networks, args, callbacks=callbacks)

    # -- optimizers --------------------------------------------------------------------------------------------------

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """One over the generator and, where multipliers are learned, one over them; none over a classifier."""
        args = self.args
        optimizers = {GENERATOR: build_main_optimizer(list(self.model.students.parameters()), args)}
        if learned := list(self.model.training_only.parameters()):
            rate = args.multiplier_learning_rate
            optimizers[MULTIPLIERS] = build_adam(learned, args, 2 * args.learning_rate if rate is None else rate)
        return optimizers

    def build_schedules(self, optimizers: dict[str, torch.optim.Optimizer], max_steps: int) -> dict[str, Any]:
        return {name: build_main_schedule(one, self.args, max_steps) for name, one in optimizers.items()}

    # -- one update --------------------------------------------------------------------------------------------------

    def method_step(self, batch: dict[str, Tensor], share: float, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean of the chosen classifiers' losses, each on images of its own classes."""
        generated = self._generate(batch)
        found = {k: self._parts_of_loss(k, *generated[k]) for k in self._chosen(self.state.global_step)}
        first, *_ = found.values()
        parts = {name: torch.stack([one[name] for one in found.values()]).mean() for name in first}
        weights = {
            "cross_entropy": 1.0,
            "stationarity": self.args.stationarity_weight,
            "duality": self.args.duality_weight,
            "total_variation": self.args.total_variation_weight,
            "pixel_mean": self.args.pixel_mean_weight,
        }
        loss = torch.stack([weights[name] * value for name, value in parts.items() if name in weights]).sum()
        self.optimizer.backward_once(loss)
        if len(self.conditions) > 1:
            parts |= {f"classifier_{k}_{name}": value for k, one in found.items() for name, value in one.items()}
        return loss.detach(), {name: value.detach() for name, value in parts.items()}

    def _chosen(self, update: int) -> list[int]:
        """The classifiers of an update: all, or one drawn by the update's number."""
        count = len(self.conditions)
        if self.args.classifiers_per_step == "all":
            return list(range(count))
        return [int(count * keyed_uniform(self.data_seed, 0, torch.tensor([update]), MIXING_STREAM, 1))]

    def _parts_of_loss(self, k: int, images: Tensor, latents: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Classifier k's parts of the loss, without their weights, and how often it agrees with the labels."""
        parts = {"total_variation": total_variation(images)}
        if self.args.pixel_mean_weight:
            parts["pixel_mean"] = pixel_mean(self.conditions[k].normalize(images))
        if self.state.global_step < self.args.warmup_updates:
            logits = self.conditions[k].logits(images)
            return {"cross_entropy": F.cross_entropy(logits, labels), **parts}
        found = self._converge(k, images, latents, labels, stationarity=self.args.stationarity_weight > 0)
        if found.stationarity is not None:
            parts["stationarity"] = found.stationarity
        return {**parts, "duality": found.duality.mean(), "self_accuracy": found.agreement.mean()}

    def _draw(self, k: int, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Latents (N, L), keyed by item and classifier, and labels (N,): each class in turn, so that all are alike.

        An item is a place in an update's batch. What is drawn for a place travels from update to update; its class
        stays. An evaluation is one batch.
        """
        size = self.args.train_batch_size if self.model.training else self.args.eval_batch_size
        update, place = batch["index"] // size, batch["index"] % size
        own = place * len(self.conditions) + k
        latents = travelling_normal(
            self.data_seed, batch["epoch"], update, own, self.args.latent_period, LATENT_STREAM, self.latent_size
        )
        dtype = next(self.model.students.parameters()).dtype
        return latents.to(dtype), place % self.conditions[k].num_labels

    def _generate(self, batch: dict[str, Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Images of the classes of each classifier, with the latents and labels that they were made of.

        In one pass for all, also where one of them is chosen: the generator's batch norm takes away what does not vary
        in a batch, and so would keep it from telling the classifiers apart.
        """
        drawn = [self._draw(k, batch) for k in range(len(self.conditions))]
        latents, labels = (torch.cat(kind) for kind in zip(*drawn, strict=True))
        index = torch.arange(len(drawn), device=labels.device).repeat_interleave(len(batch["index"]))
        with self.autocast():
            images = self.model.students[0](latents, labels, classifier_index=index, return_dict=True).images
        return [(own, *made_of) for own, made_of in zip(full_precision(images).chunk(len(drawn)), drawn, strict=True)]

    def _converge(self, k: int, images: Tensor, latents: Tensor, labels: Tensor, *, stationarity: bool) -> Convergence:
        multipliers = None
        if self.args.multipliers != "ce":
            learned: Any = self.model.training_only[MULTIPLIERS]
            multipliers = full_precision(learned[k](latents, labels))
        return self.conditions[k](images, labels, multipliers, stationarity=stationarity)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def evaluation_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """For each of K classifiers, as (N, K): the batch's stationarity at every image, duality, and agreement."""
        generated = enumerate(self._generate(batch))
        found = [self._converge(k, *one, stationarity=True) for k, one in generated]
        stationarity = torch.stack([one.stationarity for one in found if one.stationarity is not None])
        return {
            "stationarity": stationarity.detach().expand(len(batch["index"]), -1),
            "duality": torch.stack([one.duality for one in found], dim=1).detach(),
            "agreement": torch.stack([one.agreement for one in found], dim=1).detach(),
        }

    def evaluation_metrics(self, outputs: dict[str, Tensor], labels: Tensor) -> dict[str, float]:
        """`loss` (stationarity + duality), `sqrt_stationarity`, `duality`, `self_accuracy`; see the class."""
        stationarity, duality, agreement = (
            outputs[name].double().mean(dim=0) for name in ("stationarity", "duality", "agreement")
        )
        each = {"sqrt_stationarity": stationarity.sqrt(), "duality": duality, "self_accuracy": agreement}
        metrics = {"loss": (stationarity + duality).mean().item()}
        metrics |= {name: values.mean().item() for name, values in each.items()}
        if len(self.conditions) > 1:
            for k in range(len(self.conditions)):
                metrics |= {f"classifier_{k}_{name}": values[k].item() for name, values in each.items()}
        return metrics

    def predictions(self, outputs: dict[str, Tensor]) -> Tensor:
        """Whether each classifier agrees with the label of each fixed draw, (N, K)."""
        return outputs["agreement"]
