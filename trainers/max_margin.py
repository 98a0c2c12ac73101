"""Full-batch descent of a classifier to convergence, so that its weights satisfy maximum-margin conditions.

Gradient descent on cross-entropy, or any descent to a stationary point with weight decay, ends where the weights are a
sum of the gradients of the training images' margins: Lyu and Li (ICLR 2020, arXiv 1906.05890) show it for homogeneous
networks, Kunin et al. (ICLR 2023, arXiv 2210.03820) with biases and batch norm. From such a classifier a generator can
be born (arXiv 2312.02470, whose classifiers were trained in full batches "until the classification loss converges").

Ours, as that paper's text gives no more: momentum; steps scaled by the loss (an idea of Lyu and Li's experiments);
which tensors decay; and what is stored of the training in the configuration, `training_facts`.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from hfkd.data import ImageSource, Preprocessing, collate
from hfkd.errors import InputError
from hfkd.evaluation.classifier import classifier_metrics
from hfkd.evaluation.cohort import accuracy
from hfkd.losses.generator_from_classifier import cross_entropy_potential, margins
from hfkd.models.probing import probe_pixels, undisturbed
from hfkd.models.scaling_exponents import solve_exponents

from .base import DistillationTrainer
from .checkpointing import STATE_FOLDER
from .cohort_checks import check_batches, check_images, check_is_model, check_labels, common_precision
from .config import DistillationConfig, check_range
from .distributed import world_size
from .images import preprocessing_of
from .networks import TrainingNetworks, frozen_running_statistics
from .optimizers import build_main_optimizer, build_main_schedule
from .state import read_state, write_state


logger = logging.get_logger(__name__)

STUDENT = "student"
WIDE_STATE = "double_precision"  # file of the weights as they are, beside those in single precision
STOP_CHECKED_EVERY = 10  # updates: reading the loss waits for the device
_ONE_BATCH = "one full batch is one update"


@dataclass
class MaxMarginConfig(DistillationConfig):
    """Settings of full-batch training. The defaults are for training without weight decay; they are ours.

    With weight decay choose a larger `learning_rate`, such as 0.1: the loss stays where it is, and no step is scaled.
    """

    num_train_epochs: float = field(
        default=10_000, metadata={"help": "Updates at most: each sees all training images, once."}
    )
    per_device_train_batch_size: int = field(
        default=0, metadata={"help": "All training images: 0, or any number that is large enough."}
    )
    learning_rate: float = field(default=0.01, metadata={"help": "Of the classifier; 0.1 with weight decay."})
    save_strategy: str = field(default="steps", metadata={"help": "When to save: no, steps, epoch or best."})
    save_steps: float = field(default=1000, metadata={"help": "Updates between checkpoints of save_strategy=steps."})
    logging_steps: float = field(default=100, metadata={"help": "Updates between logs."})

    loss_scaling_below: float = field(
        default=0.05,
        metadata={
            "help": "Where the mean cross-entropy CE is below this, gradients are multiplied by this / CE, as they "
            "vanish with it; 0: never. Without effect with weight decay, whose stationary point it would move."
        },
    )
    stop_at_loss: float = field(
        default=1e-30, metadata={"help": "Stop where the mean cross-entropy is at most this, in nats; 0: never."}
    )
    decayed: Literal["all", "scale_sensitive"] = field(
        default="all",
        metadata={
            "help": "What weight_decay acts on: all, or the tensors whose scale the logits depend on (of a batch-norm "
            "network: the last norm and the last weight), as decay of the others has no stationary point."
        },
    )
    double_precision: bool = field(
        default=True,
        metadata={"help": "Train in float64, as gradients of a converged classifier are small; float32 is saved."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("per_device_train_batch_size", self.per_device_train_batch_size, 0)
        check_range("loss_scaling_below", self.loss_scaling_below, 0)
        check_range("stop_at_loss", self.stop_at_loss, 0)
        self.refuse_changed(("gradient_accumulation_steps", "dataloader_drop_last"), _ONE_BATCH)
        if getattr(self.optim, "value", self.optim) != "sgd":
            raise InputError(
                f"optim={self.optim}: only gradient descent is known to converge to these margins, use sgd"
            )
        if self.bf16:
            raise InputError("bf16=True rounds away the gradients of a converged classifier: leave it out")
        if self.weight_decay:
            self.refuse_changed(("loss_scaling_below",), f"weight_decay={self.weight_decay}")
        else:
            self.refuse_changed(("decayed",), "weight_decay=0")


class MaxMarginTrainer(DistillationTrainer):
    """Trains a classifier by full-batch descent, and stores what it has reached in `config.training_facts`.

    These are of the training images, measured in evaluation mode: `loss` (mean cross-entropy, nats), `min_margin` and
    `median_margin` (logit of the class less the largest other one), `accuracy` and `num_images`; beside them stand
    `weight_decay` and `updates`. Evaluation gives `loss`, `accuracy` and `top5_accuracy`.

    Args:
        model: any image classifier. With `double_precision` it is itself converted to float64.
        args: the settings.
        train_dataset: not augmented; it has to fit the device as one batch.
        eval_dataset, processing_class, callbacks, dataset_name: as in `DistillationTrainer`.

    Raises:
        InputError: batches smaller than the data, augmented images, several processes, or labels and images that do
            not fit the classifier.
    """

    _name = "Full-batch training to a maximum margin"
    _paper: ClassVar = {
        "title": "Gradient Descent Maximizes the Margin of Homogeneous Neural Networks",
        "id": "1906.05890",
        "citation": (
            "@inproceedings{lyu2020margin,\n"
            "  title     = {Gradient Descent Maximizes the Margin of Homogeneous Neural Networks},\n"
            "  author    = {Lyu, Kaifeng and Li, Jian},\n"
            "  booktitle = {International Conference on Learning Representations},\n"
            "  year      = {2020}\n"
            "}"
        ),
    }
    _tag_names: ClassVar = ["hfkd", "max-margin", "full-batch"]
    _template_file = "max_margin.md"

    args: MaxMarginConfig
    _latest: Tensor  # loss of the last update

    def __init__(
        self,
        model: PreTrainedModel,
        args: MaxMarginConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: Sequence[Any] | None = None,
        dataset_name: str | None = None,
    ) -> None:
        args = args or MaxMarginConfig()
        check_is_model("model", model)
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            check_labels(name, dataset, model.config.num_labels)
        common_precision([model])
        args = _with_full_batches(args, train_dataset)
        preprocessing = preprocessing_of(train_dataset, processing_class, model.config)
        check_images([model], (), preprocessing)
        check_batches(train_dataset, args, [model], nn.ModuleList())
        self._decayed = _decayed(model, args, preprocessing)
        _warn_if_random(model, preprocessing)
        super().__init__(
            TrainingNetworks([model]),
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            callbacks=callbacks,
            dataset_name=dataset_name,
        )
        if args.double_precision:
            self.model.double()  # last: a run that is refused leaves the model as it was

    # -- one update --------------------------------------------------------------------------------------------------

    def _loader(self, source: Any, batch_size: int, *, train: bool) -> Any:
        """All images in their own order, in every update."""
        return super()._loader(source, batch_size, train=False)

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """One, with weight decay on the tensors that `decayed` names."""
        named = {name: p for name, p in self.model.students[0].named_parameters() if p.requires_grad}
        optimizer = build_main_optimizer([p for name, p in named.items() if name in self._decayed], self.args)
        if rest := [p for name, p in named.items() if name not in self._decayed]:
            optimizer.add_param_group({"params": rest, "weight_decay": 0.0})
        return {STUDENT: optimizer}

    def build_schedules(self, optimizers: dict[str, torch.optim.Optimizer], max_steps: int) -> dict[str, Any]:
        return {STUDENT: build_main_schedule(optimizers[STUDENT], self.args, max_steps)}

    def method_step(self, batch: dict[str, Tensor], share: float, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient of CE, or, below the threshold c, of c log CE: as long at any loss."""
        loss = _cross_entropy(self.model(batch["pixel_values"]).logits, batch["labels"])
        value = loss.detach()
        threshold = 0.0 if self.args.weight_decay else self.args.loss_scaling_below
        scale = (threshold / value.clamp(min=torch.finfo(value.dtype).tiny)).clamp(min=1.0)
        self.optimizer.backward(STUDENT, share * scale * loss)
        self._latest = value
        return value, {"gradient_scale": scale}

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        due = self.args.stop_at_loss > 0 and self.state.global_step % STOP_CHECKED_EVERY == 0
        if due and self._latest.item() <= self.args.stop_at_loss:
            self.control.should_training_stop = True
            self.control.should_save |= self.args.save_strategy == SaveStrategy.STEPS  # as at the end of a whole run
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # -- saving ------------------------------------------------------------------------------------------------------

    def students_to_save(self) -> list[Any]:
        """The classifier in single precision, with the facts of its training."""
        self._record_facts()
        model = self.model.students[0]
        return [copy.deepcopy(model).float() if self.args.double_precision else model]

    def _record_facts(self) -> None:
        source: ImageSource | None = self.train_dataset
        if source is None:
            return
        student: Any = self.model.students[0]
        batch = self._materialise(source, collate(source.__getitems__([(0, row) for row in range(len(source))])))
        with undisturbed(student):
            logits, labels = student(batch["pixel_values"]).logits, batch["labels"]
            found = margins(logits, labels)
        facts = {"min_margin": found.min().item(), "median_margin": found.median().item()}
        student.config.training_facts = {
            "loss": _cross_entropy(logits, labels).item(),
            **facts,
            "accuracy": accuracy(logits, labels),
            "num_images": len(source),
            "weight_decay": self.args.weight_decay,
            "updates": self.state.global_step,
        }
        self.measured["train"] = {f"eval_{name}": value for name, value in facts.items()} | {"images": len(source)}

    def _save_training_state(self, folder: Path, generators: list[dict[str, Any]]) -> None:
        super()._save_training_state(folder, generators)
        if self.args.double_precision:
            write_state(folder / STATE_FOLDER, WIDE_STATE, self.model.students.state_dict())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.args.double_precision:
            folder = Path(resume_from_checkpoint) / STATE_FOLDER
            self.model.students.load_state_dict(read_state(folder, WIDE_STATE))

    # -- evaluation --------------------------------------------------------------------------------------------------

    def evaluation_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": self.model(batch["pixel_values"]).logits}

    def evaluation_metrics(self, outputs: dict[str, Tensor], labels: Tensor) -> dict[str, float]:
        """`loss`, `accuracy` and of more than five classes `top5_accuracy`."""
        return classifier_metrics(outputs["logits"], labels)

    def predictions(self, outputs: dict[str, Tensor]) -> Tensor:
        return outputs["logits"]


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy, precise down to the smallest numbers, where log-softmax gives zero."""
    return -cross_entropy_potential(logits, labels, temperature=1.0)


def _with_full_batches(args: MaxMarginConfig, dataset: Any) -> MaxMarginConfig:
    """The settings with a batch of all images. Raises InputError where that is not what was asked for."""
    if world_size() > 1:
        raise InputError(f"{world_size()} processes: {_ONE_BATCH}, so launch one process")
    if dataset is None:
        return args
    count, given = len(dataset), args.per_device_train_batch_size
    if 0 < given < count:
        raise InputError(
            f"per_device_train_batch_size={given} is smaller than the {count} training images: the conditions of "
            "convergence are of full batches, so leave it out, or train on fewer images (train_per_class)"
        )
    if isinstance(dataset, ImageSource) and dataset.augmentation:
        raise InputError(
            "the training images are augmented, and convergence is to the margins of a fixed set of images: "
            "choose augmentation=none"
        )
    args = copy.copy(args)
    args.per_device_train_batch_size = count
    return args


def _decayed(model: PreTrainedModel, args: MaxMarginConfig, preprocessing: Preprocessing) -> frozenset[str]:
    """Names of the parameters that decay; of `scale_sensitive` the core set of the scaling exponents."""
    if args.decayed == "all":
        return frozenset(name for name, _ in model.named_parameters())
    pixels = probe_pixels(model, preprocessing.image_size, preprocessing.num_channels)
    return frozenset(solve_exponents(model, pixels).core)


def _warn_if_random(model: PreTrainedModel, preprocessing: Preprocessing) -> None:
    """Warn of dropout, stochastic depth and the like: descent of a random loss does not come to rest."""
    pixels = probe_pixels(model, preprocessing.image_size, preprocessing.num_channels).expand(2, -1, -1, -1)
    modes = {module: module.training for module in model.modules()}
    with torch.random.fork_rng(), frozen_running_statistics(model), torch.no_grad():
        model.train()
        first, second = (model(pixel_values=pixels).logits for _ in range(2))
    for module, mode in modes.items():
        module.training = mode
    if not torch.equal(first, second):
        logger.warning(
            f"{type(model).__name__} is random in training (dropout, stochastic depth): full-batch descent will not "
            "converge to a margin; set its dropout to 0"
        )
