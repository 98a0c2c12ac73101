"""The base of every method's Trainer: several networks, several optimizers, data as a function of its keys."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerControl
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from hfkd.data import Augmentation, ImageSource, KeyedDraws, collate, set_sampler_epoch
from hfkd.errors import InputError, RunError

from .best_metric import check_metric_for_best_model
from .checkpointing import (
    Checkpointing,
    check_no_other_run,
    check_nothing_later,
    check_output_dir,
    newest_valid_checkpoint,
    set_aside_later_checkpoints,
)
from .config import DistillationConfig
from .distributed import all_ranks, broadcast_buffers, broadcast_state, check_same_parameters, world_size
from .images import ImageLoading, preprocessing_of
from .interrupt import StopOnSignal, TrainingInterrupted
from .memory import keep_freed_memory
from .networks import TrainingNetworks
from .optimizers import NamedOptimizers, NamedSchedules
from .publishing import Publishing


class DistillationTrainer(ImageLoading, Publishing, Checkpointing, Trainer):
    """What every method needs, once.

    A method subclasses this with its facts (`_name`, `_paper`, `_tag_names`, `_template_file`) and four functions:
    `build_optimizers`, `build_schedules`, `method_step` and `evaluation_step`/`evaluation_metrics`.

    Every random draw on data is a function of (seed, epoch, sample index, view), so a resumed run, more workers,
    smaller micro-batches or more ranks see the same images. The loss of an update is the mean over its images: each
    micro-batch counts by its share of them.

    Args:
        networks: the students, the training-only modules and the teachers.
        args: the method's Config.
        train_dataset: an `ImageSource`, or a `datasets.Dataset` with an image column.
        eval_dataset: the same, or a dict of them.
        processing_class: the stock image processor that is saved beside the students and gives size, mean and
            standard deviation.
        augmentation: of the training images; by default a source's own, and none for a `datasets.Dataset`.
        callbacks: as in `transformers.Trainer`.
        dataset_name: what the card calls the data: a Hub id, `digits`, or a folder.

    Raises:
        InputError: for anything that can be found wrong before the first step.
    """

    _name: ClassVar[str]
    _paper: ClassVar[Mapping[str, str]]
    _tag_names: ClassVar[Sequence[str]]
    _template_file: ClassVar[str]
    evaluates_labels: ClassVar[bool] = True  # whether `evaluation_metrics` looks at them
    sees_images: ClassVar[bool] = True  # False: a run on draws alone, see `DrawsOnlyTrainer`
    # The losses are weighted by each micro-batch's share of the update's images.
    loss_is_scaled_for_ga = True

    args: DistillationConfig
    control: TrainerControl
    optimizer: NamedOptimizers
    _finite: Tensor
    lr_scheduler: NamedSchedules

    def __init__(
        self,
        networks: TrainingNetworks,
        args: DistillationConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        augmentation: Augmentation | None = None,
        callbacks: Sequence[Any] | None = None,
        dataset_name: str | None = None,
    ) -> None:
        self.dataset_name = dataset_name
        self.measured = {}
        self._check_distribution(args)
        if eval_dataset is None and args.eval_strategy != "no":
            when = getattr(args.eval_strategy, "value", args.eval_strategy)
            raise InputError(f"eval_strategy={when} needs an eval_dataset: pass one, or choose eval_strategy=no")
        if args.should_save:
            check_output_dir(args.output_dir)
        self.data_seed = args.seed if args.data_seed is None else args.data_seed
        if self.sees_images:
            self.preprocessing = preprocessing_of(train_dataset, processing_class, networks.config)
        if processing_class is None and isinstance(train_dataset, ImageSource):
            processing_class = self.preprocessing.to_image_processor()
        # Trainer's __init__ sets these too, but the datasets are decoded before it starts.
        self.processing_class, self.model = processing_class, networks
        self._stop = StopOnSignal()
        super().__init__(
            model=networks,
            args=args,
            train_dataset=None if train_dataset is None else self._image_source(train_dataset, "train", augmentation),
            eval_dataset=self._eval_sources(eval_dataset),
            processing_class=processing_class,
            data_collator=collate,
            callbacks=[self._stop, *(callbacks or [])],
        )
        if args.channels_last:
            networks.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._reset_accumulators()

    @staticmethod
    def _check_distribution(args: DistillationConfig) -> None:
        if args.sync_batchnorm and args.device.type != "cuda":
            raise InputError("sync_batchnorm=True needs CUDA: leave it out, batch norm is then per rank")
        if args.n_gpu > 1:
            raise InputError(
                f"{args.n_gpu} GPUs in one process are not supported: launch with torchrun, a process each"
            )

    # -- what a method defines -----------------------------------------------------------------------------------

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Named optimizers over explicit parameter groups, the students' main one first, in stepping order."""
        raise NotImplementedError

    def build_schedules(self, optimizers: dict[str, torch.optim.Optimizer], max_steps: int) -> dict[str, Any]:
        """One schedule for each named optimizer."""
        raise NotImplementedError

    def method_step(self, batch: dict[str, Tensor], share: float, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Accumulate the gradients of one micro-batch into `self.optimizer`.

        Args:
            batch: `pixel_values` (N, C, H, W), `labels`, `index`.
            share: this micro-batch's share of the update's images, in (0, 1].
            last: whether it is the update's last, after which all optimizers step.

        Returns:
            The total loss and its parts, all 0-dim means over the micro-batch, detached.
        """
        raise NotImplementedError

    def evaluation_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is measured on each of the N images, as (N, ...): for classifiers `logits` (N, S, K) of S students.

        Called in eval mode, without gradients and under autocast.
        """
        raise NotImplementedError

    def evaluation_metrics(self, outputs: dict[str, Tensor], labels: Tensor) -> dict[str, float]:
        """Metrics, without prefix, of a whole split: what `evaluation_step` gave and labels (N, ...), on the CPU."""
        raise NotImplementedError

    def predictions(self, outputs: dict[str, Tensor]) -> Tensor:
        """What `predict()` gives of what `evaluation_step` gave: by default student 0's logits (N, K)."""
        return outputs["logits"][:, 0]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bf16 for forward passes where `bf16=True`; backward passes and losses stay outside."""
        return self.accelerator.autocast()

    # -- training --------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train, or go on with a checkpoint (True: the newest valid one in `output_dir`), exactly as if never stopped.

        Raises:
            InputError: before the first step; nothing has been overwritten.
            TrainingInterrupted: after SIGINT or SIGTERM, with everything saved.
            RunError: on NaN, ranks that drift apart, a full disk: the last checkpoint is kept.
        """
        check_metric_for_best_model(self)
        output_dir = Path(self.args.output_dir)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(newest_valid_checkpoint(output_dir))
            if self.args.should_save:
                set_aside_later_checkpoints(Path(resume_from_checkpoint))
        elif resume_from_checkpoint and Path(resume_from_checkpoint).parent.resolve() == output_dir.resolve():
            check_nothing_later(Path(resume_from_checkpoint))
        else:
            check_no_other_run(output_dir, self.may_replace_students)
        self._reset_accumulators()
        self._started = None if resume_from_checkpoint else time.monotonic()
        for student in self.model.students:
            vars(student.config).pop("training_facts", None)  # of weights that are about to change
        try:
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self._stop.restore()
        return output

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trainer's, after a last look for a NaN that was not logged and a signal that came after the last save."""
        self.check_finite()
        stopped = self._stop.agreed()
        self._stop.restore()
        if stopped:
            checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            if not checkpoint.exists():
                self._save_checkpoint(self.model, trial=None)
            # Not Trainer's end: it would load the best model, and delete what is to be resumed from.
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            self._finish_current_push()
            self.is_in_train = False
            raise TrainingInterrupted(self._stop.stopped, str(checkpoint))
        return super()._finalize_training(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        optimizers = self.build_optimizers()
        self.optimizer = NamedOptimizers(optimizers, self.args.max_grad_norm)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self.lr_scheduler = NamedSchedules(self.build_schedules(self.optimizer.optimizers, num_training_steps))
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader]:
        """Trainer's own version wraps the model in DDP, which several losses on one graph cannot use."""
        if self.args.device.type == "cpu":
            keep_freed_memory()
        if self.args.sync_batchnorm and world_size() > 1:
            self.model.students = nn.SyncBatchNorm.convert_sync_batchnorm(self.model.students)
        broadcast_state(self.model)
        self.create_optimizer()
        self.create_scheduler(max_steps)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = train_dataloader
        return self.model, train_dataloader

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # accelerate's own set_epoch does not reach a sampler below the wrappers of a resumed multi-process loader.
        set_sampler_epoch(kwargs["train_dataloader"], kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> int:
        """Images of the update on this rank: what each micro-batch's share is a share of."""
        return sum(len(batch.get("key", ())) for batch in batch_samples)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        model.train()
        self.measured.clear()  # it was of other weights than those of this update
        batch = self._materialise(self.train_dataset, inputs)
        share = len(inputs["key"]) / num_items_in_batch
        last = self.accelerator.sync_gradients
        loss, parts = self.method_step(batch, share, last)
        self._finite &= torch.isfinite(loss)
        for name, value in parts.items():
            self._parts[name] = self._parts[name] + share * value if name in self._parts else share * value
            self._updates[name] = self._updates.get(name, 0) + last
        return share * loss

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | None:
        self.optimizer.reduce_and_clip()
        return self.optimizer.gradient_norms.get(self._main_optimizer)

    def _get_learning_rate(self) -> float:
        # Called between an update and the step of the schedules: the rates that the update was made with.
        self._rates = self.lr_scheduler.learning_rates()
        return self._rates[self._main_optimizer]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Trainer skips `_clip_grad_norm` when max_grad_norm is 0, but gradients are averaged over the ranks there.
        return self._clip_grad_norm(model) if self.args.max_grad_norm == 0 else grad_norm

    @property
    def _main_optimizer(self) -> str:
        return next(iter(self.optimizer.optimizers))

    # -- logging, and NaN ------------------------------------------------------------------------------------------

    def _reset_accumulators(self) -> None:
        self._parts: dict[str, Tensor] = {}  # sums over the updates since the last log
        self._updates: dict[str, int] = {}  # how many updates brought each part
        self._finite = torch.ones((), dtype=torch.bool, device=self.args.device)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step == 1:
            check_same_parameters(self.model, step=1)
        if self.control.should_log or self.control.should_evaluate:
            self.check_finite()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._parts:
            logs.update(self._drain_parts())
            norms = self.optimizer.gradient_norms
            for name in list(self.optimizer.optimizers)[1:]:
                logs[f"learning_rate_{name}"] = self._rates[name]
                if name in norms:
                    logs[f"grad_norm_{name}"] = float(norms[name])
        super().log(logs, start_time)

    def _drain_parts(self) -> dict[str, float]:
        """Mean of each part of the loss over the updates since the last log, and over the ranks."""
        if not self._parts:
            return {}
        # Parts that began within the window, or that a micro-batch of an unfinished update brought, count their own.
        values = torch.stack([value.float() / max(self._updates[name], 1) for name, value in self._parts.items()])
        if world_size() > 1:
            dist.all_reduce(values)
            values /= world_size()
        parts = dict(zip(self._parts, values.tolist(), strict=True))
        self._parts, self._updates = {}, {}
        return parts

    def check_finite(self) -> None:
        """Stop on a NaN or infinite loss, on all ranks; called at logging steps, evaluations and before every save.

        Raises:
            RunError: with the step and the parts of the loss.
        """
        if not all_ranks(self._finite):
            parts = ", ".join(f"{name}={value:.4g}" for name, value in self._drain_parts().items())
            detail = f" ({parts})" if parts else ""
            raise RunError(
                f"the loss is not finite by step {self.state.global_step}{detail}: lower the learning rate, "
                f"then resume with --resume_from_checkpoint true if {self.args.output_dir} holds a checkpoint"
            )

    # -- evaluation ------------------------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The method's outputs over a split, then its metrics and predictions."""
        was_training = self.model.training
        self.model.eval()
        broadcast_buffers(self.model)  # what is measured is what a save would hold
        self.callback_handler.eval_dataloader = dataloader
        source = dataloader.dataset
        assert isinstance(source, ImageSource | KeyedDraws)  # get_eval_dataloader makes it one
        parts: list[tuple[dict[str, Tensor], Tensor]] = []
        with torch.no_grad():
            for inputs in dataloader:
                batch = self._materialise(source, inputs)
                if "labels" not in batch:
                    if self.evaluates_labels and description != "Prediction":
                        raise InputError(f"the {source.name} split has no labels to evaluate on: use predict()")
                    batch["labels"] = torch.full_like(batch["index"], -100)
                with self.autocast():
                    outputs = self.evaluation_step(batch)
                # Each image once, though the last batch of several ranks repeats some.
                gathered = self.accelerator.gather_for_metrics((outputs, batch["labels"]))
                parts.append(({name: value.cpu() for name, value in gathered[0].items()}, gathered[1].cpu()))
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        all_outputs = {name: torch.cat([part[name] for part, _ in parts]) for name in parts[0][0]}
        all_labels = torch.cat([labels for _, labels in parts])
        measurable = source.labels is not None or not self.evaluates_labels
        metrics = self.evaluation_metrics(all_outputs, all_labels) if measurable else {}
        self.model.train(was_training)
        self.measured[source.name] = {f"eval_{name}": value for name, value in metrics.items()}
        self.measured[source.name]["images"] = len(all_labels)
        return EvalLoopOutput(
            predictions=self.predictions(all_outputs).float().numpy(),
            label_ids=None if source.labels is None else all_labels.numpy(),
            metrics={f"{metric_key_prefix}_{name}": float(value) for name, value in metrics.items()},
            num_samples=len(all_labels),
        )
