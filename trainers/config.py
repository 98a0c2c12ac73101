"""What every method's Config shares: the base dataclass, its checks, and the `TrainingArguments` that are refused."""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import torch
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from hfkd.errors import InputError


OPTIMIZERS = ("sgd", "adam", "adamw_torch")
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")

_SEVERAL_OPTIMIZERS = "it cannot shard several networks with several optimizers; launch with torchrun instead"
_LABELS = "the losses of these methods are written for the labels as they are"
_NOT_COMPILED = "compiled students are not verified here yet"
_ONE_PASS = "feature maps are taken during the one forward pass"
_NO_WRAPPER = "this package averages gradients itself, without DistributedDataParallel"
# Fields of TrainingArguments that would be ignored or would break a method: refused with the reason, never skipped.
_REFUSED = {
    "fp16": "gradient scaling is not written for several optimizers; use bf16",
    "fp16_full_eval": "use bf16_full_eval=False, fp16_full_eval=False: evaluation runs in the training precision",
    "bf16_full_eval": "evaluation runs in the training precision; use bf16",
    "fsdp": _SEVERAL_OPTIMIZERS,
    "fsdp_config": _SEVERAL_OPTIMIZERS,
    "deepspeed": _SEVERAL_OPTIMIZERS,
    "parallelism_config": _SEVERAL_OPTIMIZERS,
    "torch_compile": _NOT_COMPILED,
    "torch_compile_backend": _NOT_COMPILED,
    "torch_compile_mode": _NOT_COMPILED,
    "optim_args": "set momentum, nesterov, adam_beta1, adam_beta2, adam_epsilon or weight_decay",
    "optim_target_modules": "parameter groups are the method's",
    "lr_scheduler_kwargs": "the schedule is lr_scheduler_type with lr_milestones and lr_gamma",
    "label_smoothing_factor": _LABELS,
    "label_names": _LABELS,
    "neftune_noise_alpha": "it is for text embeddings",
    "use_cache": "image classifiers keep no cache",
    "use_liger_kernel": "its kernels are for language models",
    "liger_kernel_config": "its kernels are for language models",
    "activation_checkpointing": _ONE_PASS,
    "activation_checkpointing_kwargs": _ONE_PASS,
    "gradient_checkpointing": _ONE_PASS,
    "gradient_checkpointing_kwargs": _ONE_PASS,
    "auto_find_batch_size": "the batch size is part of what a run must repeat",
    "average_tokens_across_devices": "a loss is the mean over the images of the update",
    "train_sampling_strategy": "the order is a function of (seed, epoch)",
    "length_column_name": "images have no length to group them by",
    "dataloader_in_order": "the order is a function of (seed, epoch)",
    "ddp_find_unused_parameters": _NO_WRAPPER,
    "ddp_bucket_cap_mb": _NO_WRAPPER,
    "ddp_broadcast_buffers": _NO_WRAPPER,
    "ddp_static_graph": _NO_WRAPPER,
    "torch_empty_cache_steps": "nothing here fragments the cache",
    "include_num_input_tokens_seen": "images have no tokens",
    "include_for_metrics": "metrics come from logits, labels and feature maps",
    "batch_eval_metrics": "metrics are already accumulated batch by batch",
    "do_train": "call train(), or hfkd train",
    "do_eval": "evaluation follows eval_strategy",
    "do_predict": "call predict(), or hfkd evaluate",
    "prediction_loss_only": "evaluation always reports its metrics",
    "eval_do_concat_batches": "evaluation always concatenates",
    "eval_accumulation_steps": "only logits and labels are kept, on the CPU",
    "eval_use_gather_object": "evaluation gathers tensors",
    "ignore_data_skip": "resuming is exact",
    "enable_jit_checkpoint": "SIGINT and SIGTERM already save",
    "save_only_model": "a checkpoint that cannot be resumed is a saved model: use save_strategy='no'",
    "save_on_each_node": "checkpoints live in one folder, which all nodes must see",
    "logging_nan_inf_filter": "it hides NaN; training stops there instead",
    "hub_always_push": "a push that is still running is waited for",
    "accelerator_config": "batches are sharded and seeded by this package",
    "dataloader_persistent_workers": "workers are started for each epoch",
    "remove_unused_columns": "it would drop the image column",
}


@dataclass
class DistillationConfig(TrainingArguments):
    """Arguments of every method: `transformers.TrainingArguments` plus what several optimizers need.

    `learning_rate`, `weight_decay`, `lr_scheduler_type`, `warmup_steps` and `max_grad_norm` mean the students' main
    optimizer (the last one clips each optimizer by itself); further optimizers have fields with a prefix.

    Raises:
        InputError: for a value out of its range, or a `TrainingArguments` field that the method would ignore.
    """

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS
    # Endings of the metrics that are better when smaller, beside `loss`: what greater_is_better=None goes by.
    _lower_is_better: ClassVar[tuple[str, ...]] = ()

    # TrainingArguments whose defaults do not fit: the reason stands in each help.
    output_dir: str = field(default="runs", metadata={"help": "Folder for checkpoints and the final students."})
    optim: str = field(
        default="sgd",
        metadata={"help": "Main optimizer of the students: sgd, adam (weight decay coupled) or adamw_torch."},
    )
    max_grad_norm: float = field(
        default=0.0, metadata={"help": "Clip each optimizer's gradients to this norm; 0 (the papers): never."}
    )
    lr_scheduler_type: str = field(
        default="constant", metadata={"help": "constant, constant_with_warmup, linear or cosine."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: it drops the image column."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Must stay off: it hides NaN."})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "Pin host memory for copies to the GPU."})
    eval_strategy: str = field(default="no", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save: no, steps, epoch or best."})
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Checkpoints kept beside the best one; a cohort has many networks."}
    )
    greater_is_better: bool | None = field(
        default=None,
        metadata={"help": "Whether the best metric_for_best_model is the greatest; None: not of losses and errors."},
    )
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Images per device in evaluation."})
    # Kept out of the repr, which dataclasses write anew for each subclass, over the one that hides it.
    hub_token: str | None = field(
        default=None, repr=False, metadata={"help": "Token for the Hub; by default that of `hf auth login`."}
    )
    report_to: None | str | list[str] = field(default="none", metadata={"help": "Trackers, as in transformers."})
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Callbacks go on from the checkpoint's state: resuming is exact."}
    )

    momentum: float = field(default=0.9, metadata={"help": "Momentum of optim=sgd, in [0, 1)."})
    nesterov: bool = field(default=False, metadata={"help": "Nesterov momentum of optim=sgd (inferred: off)."})
    lr_milestones: list[float] = field(
        default_factory=list,
        metadata={
            "help": "Fractions of the run, in (0, 1), at which the main learning rate is multiplied by lr_gamma."
        },
    )
    lr_gamma: float = field(default=0.1, metadata={"help": "Factor at each milestone, of every optimizer."})
    channels_last: bool = field(
        default=False,
        metadata={"help": "NHWC memory layout: with bf16 about twice as fast where the CPU or GPU has it."},
    )
    license: str | None = field(
        default="apache-2.0", metadata={"help": "Licence of the weights, for the card: an identifier of the Hub."}
    )
    sync_batchnorm: bool = field(
        default=False, metadata={"help": "Batch statistics over all ranks instead of per rank; CUDA only."}
    )

    def __post_init__(self) -> None:
        self._refuse_ignored_fields()
        _refuse_sharding_launchers()
        self.use_cpu: bool = self.use_cpu or not _has_usable_accelerator()
        self.lr_scheduler_type = _choice("lr_scheduler_type", self.lr_scheduler_type, SCHEDULES)
        self.optim = _choice("optim", self.optim, OPTIMIZERS)
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith(self._lower_is_better):
            self.greater_is_better = False
        # TrainingArguments has no name for Adam.
        optim, self.optim = self.optim, "adamw_torch" if self.optim == "adam" else self.optim
        super().__post_init__()
        self.optim = optim
        # `accelerate launch` sets it by an environment variable, past the fields.
        if self.mixed_precision not in ("no", "bf16"):
            raise InputError(
                f"ACCELERATE_MIXED_PRECISION={self.mixed_precision} is not supported: {_REFUSED['fp16']}, or no"
            )
        self.bf16: bool = self.mixed_precision == "bf16"
        self._check_choices()
        self._check_optimizer_fields()
        check_range("momentum", self.momentum, 0, 1, high_open=True)
        check_range("lr_gamma", self.lr_gamma, 0, 1)
        check_range("learning_rate", self.learning_rate, 0)
        check_range("weight_decay", self.weight_decay, 0)
        check_range("max_grad_norm", self.max_grad_norm, 0)
        check_milestones("lr_milestones", self.lr_milestones)
        if self.save_strategy == "best" and self.metric_for_best_model is None:
            raise InputError("save_strategy=best needs metric_for_best_model: student_0_accuracy, loss or another")
        strategy = str(getattr(self.hub_strategy, "value", self.hub_strategy))
        if strategy not in ("every_save", "end"):
            raise InputError(f"hub_strategy={strategy} would push optimizer states: use every_save or end")
        if self.push_to_hub and not self.hub_model_id:
            raise InputError("push_to_hub needs hub_model_id: give --hub_model_id USER/NAME")

    def _refuse_ignored_fields(self) -> None:
        defaults = {f.name: _default(f) for f in fields(type(self))}
        for name, reason in _REFUSED.items():
            value = getattr(self, name, None)
            if isinstance(value, AcceleratorConfig) and value == AcceleratorConfig():
                continue  # what TrainingArguments makes of the default; seen again by dataclasses.replace
            if name == "do_eval" and self.eval_strategy != "no":
                continue  # so does it here
            # TrainingArguments normalises empty values of some fields (None, "", False, []).
            if name in defaults and value != defaults[name] and (value or defaults[name]):
                raise InputError(f"{name}={value!r} is not supported: {reason}")

    def _check_choices(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal:
                check_choice(name, getattr(self, name), get_args(hint))

    def refuse_changed(self, prefixes: Sequence[str], setting: str) -> None:
        """Raise InputError where a field that begins so was changed, though `setting` leaves it without effect."""
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name.startswith(tuple(prefixes)) and value != _default(item):
                raise InputError(f"{item.name}={value} has no effect with {setting}: leave it out")

    def _check_optimizer_fields(self) -> None:
        ignored = ("momentum", "nesterov") if self.optim != "sgd" else ("adam_beta1", "adam_beta2", "adam_epsilon")
        self.refuse_changed(ignored, f"optim={getattr(self.optim, 'value', self.optim)}")
        if self.lr_scheduler_type == "constant" and self.warmup_steps:
            raise InputError(
                f"warmup_steps={self.warmup_steps} has no effect with lr_scheduler_type=constant: "
                "use constant_with_warmup"
            )


def _has_usable_accelerator() -> bool:
    """Without one, TrainingArguments takes bf16 only with use_cpu; and MPS lacks the float64 that draws need."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator is not None and accelerator.type != "mps"


def _refuse_sharding_launchers() -> None:
    for launcher in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if parse_flag_from_env(f"ACCELERATE_USE_{launcher}"):
            raise InputError(f"ACCELERATE_USE_{launcher}=true is not supported: {_SEVERAL_OPTIMIZERS}")


def check_range(name: str, value: float, low: float, high: float | None = None, *, high_open: bool = False) -> None:
    """Raise InputError unless low <= value <= high (value < high where `high_open`)."""
    above = high is not None and (value >= high if high_open else value > high)
    if not value >= low or above:
        upper = "" if high is None else f" and {'below' if high_open else 'at most'} {high}"
        raise InputError(f"{name}={value} is out of range: it must be at least {low}{upper}")


def check_positive(name: str, value: float) -> None:
    """Raise InputError unless value > 0."""
    if not value > 0:
        raise InputError(f"{name}={value} is out of range: it must be above 0")


def check_milestones(name: str, milestones: list[float]) -> None:
    """Raise InputError unless all milestones are fractions of the run."""
    for milestone in milestones:
        if not 0 < milestone < 1:
            raise InputError(
                f"{name} holds {milestone}: milestones are fractions of the run between 0 and 1, "
                "such as 0.5 for half of the steps"
            )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise InputError unless `value` is one of `choices`."""
    if value not in choices:
        raise InputError(f"{name}={value!r} is unknown: choose one of {', '.join(choices)}")


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> Any:
    check_choice(name, str(getattr(value, "value", value)), choices)
    return value


def _default(item: Any) -> Any:
    return item.default_factory() if item.default is MISSING and item.default_factory is not MISSING else item.default
