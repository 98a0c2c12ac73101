"""Several optimizers and their schedules behind the one pair that `transformers.Trainer` drives."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from .config import DistillationConfig
from .distributed import average_gradients


class NamedOptimizers:
    """Named optimizers, each with gradients of its own, even where they share parameters.

    A parameter has a single `.grad`, but AFD steps the same weights by SGD with one gradient and by Adam with another.
    Every optimizer therefore owns its gradients: `accumulate` adds to them, and a step lends them to `.grad` for just
    that step. Trainer's calls (`step`, `zero_grad`, `state_dict`, `param_groups`) act on all of them, in the order
    they were given; `step_now` lets one go earlier, through the same averaging, clipping and logging.

    The first optimizer is the main one: its learning rate and gradient norm are the run's.
    """

    def __init__(self, optimizers: dict[str, torch.optim.Optimizer], max_grad_norm: float) -> None:
        self.optimizers = optimizers
        self.max_grad_norm = max_grad_norm
        self.gradient_norms: dict[str, Tensor] = {}  # of the current update, or of the last one that was finished
        self._finished = False  # the update that the norms are of
        self._gradients: dict[str, dict[nn.Parameter, Tensor]] = {name: {} for name in optimizers}

    def parameters(self, name: str) -> list[nn.Parameter]:
        return [parameter for group in self.optimizers[name].param_groups for parameter in group["params"]]

    def accumulate(self, name: str, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
        """Add to the gradients of optimizer `name`; None (a parameter that the loss does not reach) adds nothing."""
        own = self._gradients[name]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                own[parameter] = own[parameter] + gradient if parameter in own else gradient

    def backward(self, name: str, loss: Tensor, retain_graph: bool = False) -> None:
        """Add the gradients of `loss` with respect to optimizer `name`'s own parameters, and of no others."""
        parameters = self.parameters(name)
        gradients = torch.autograd.grad(loss, parameters, retain_graph=retain_graph, allow_unused=True)
        self.accumulate(name, parameters, gradients)

    def backward_once(self, loss: Tensor) -> None:
        """Add the gradients of one loss to every optimizer by a single backward pass."""
        owned = {name: self.parameters(name) for name in self.optimizers}
        everything = [parameter for parameters in owned.values() for parameter in parameters]
        gradients = iter(torch.autograd.grad(loss, everything, allow_unused=True))
        for name, parameters in owned.items():
            self.accumulate(name, parameters, [next(gradients) for _ in parameters])

    def gradients(self, name: str) -> dict[nn.Parameter, Tensor]:
        """What optimizer `name` has accumulated since its last step."""
        return self._gradients[name]

    def reduce_and_clip(self, names: Iterable[str] | None = None) -> None:
        """Average each named optimizer's gradients over the ranks, then clip them to `max_grad_norm` (0: never)."""
        if self._finished:
            self.gradient_norms.clear()
            self._finished = False
        for name in names or self.optimizers:
            own = self._gradients[name]
            if not own:
                continue
            gradients = average_gradients(list(own.values()))
            norm = nn.utils.get_total_norm(gradients)
            self.gradient_norms[name] = norm
            if self.max_grad_norm > 0:
                # Not in place: autograd may hand out one tensor as the gradient of two parameters.
                gradients = list(torch._foreach_mul(gradients, (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)))
            own.update(zip(own, gradients, strict=True))

    def step_now(self, name: str) -> None:
        """Average, clip and step one optimizer ahead of the others (a discriminator before its generator)."""
        self.reduce_and_clip([name])
        self._step(name)

    def step(self) -> None:
        """Step every optimizer that still holds gradients: the end of an update."""
        for name in self.optimizers:
            self._step(name)
        self._finished = True

    def _step(self, name: str) -> None:
        gradients = self._gradients[name]
        if not gradients:
            return
        for parameter, gradient in gradients.items():
            parameter.grad = _laid_out_as(parameter, gradient)
        self.optimizers[name].step()
        for parameter in gradients:
            parameter.grad = None
        gradients.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for name, optimizer in self.optimizers.items():
            optimizer.zero_grad(set_to_none=set_to_none)
            self._gradients[name].clear()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Strict in names; moments and counts are the checkpoint's, settings (weight decay, ...) are this run's."""
        _check_names("optimizer", self.optimizers, state)
        for name, optimizer in self.optimizers.items():
            own = optimizer.state_dict()["param_groups"]
            sizes = [[len(group["params"]) for group in groups] for groups in (own, state[name]["param_groups"])]
            if sizes[0] != sizes[1]:
                raise ValueError(f"optimizer {name}: {sizes[1]} parameters in the checkpoint, {sizes[0]} in this run")
            optimizer.load_state_dict({"state": state[name]["state"], "param_groups": own})
            for parameter, entries in optimizer.state.items():
                entries.update({key: _laid_out_as(parameter, value) for key, value in entries.items()})


class NamedSchedules:
    """The learning-rate schedules of `NamedOptimizers`, stepped together once per update."""

    def __init__(self, schedules: dict[str, LambdaLR]) -> None:
        self.schedules = schedules

    def step(self) -> None:
        for schedule in self.schedules.values():
            schedule.step()

    def get_last_lr(self) -> list[float]:
        """One rate per parameter group, those of the main optimizer first."""
        return [float(rate) for schedule in self.schedules.values() for rate in schedule.get_last_lr()]

    def learning_rates(self) -> dict[str, float]:
        return {name: float(schedule.get_last_lr()[0]) for name, schedule in self.schedules.items()}

    def state_dict(self) -> dict[str, Any]:
        return {name: schedule.state_dict() for name, schedule in self.schedules.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _check_names("schedule", self.schedules, state)
        for name, schedule in self.schedules.items():
            # Where the run is comes from the checkpoint, which rate that means from this run's settings.
            schedule.load_state_dict(state[name] | {"base_lrs": schedule.base_lrs})
            rates = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
            schedule._last_lr = [base * factor(schedule.last_epoch) for base, factor in rates]
            for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
                group["lr"] = rate


def _laid_out_as(parameter: Tensor, value: Any) -> Any:
    """`value` in the memory layout of `parameter`, where it is a tensor of its shape.

    Fused optimizers go through memory without a look at strides: with a channels_last weight and a contiguous gradient
    or moment (as a checkpoint or an average over ranks has it) they would silently mix up the entries.
    """
    if not isinstance(value, Tensor) or value.shape != parameter.shape or value.stride() == parameter.stride():
        return value
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def build_main_optimizer(parameters: Sequence[nn.Parameter], args: DistillationConfig) -> torch.optim.Optimizer:
    """The students' main optimizer by the Config's `optim`; weight decay on all parameters, as the papers have it.

    Fused, which is three times as fast as a Python loop over small tensors on a CPU.
    """
    if args.optim == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=args.learning_rate,
            momentum=args.momentum,
            weight_decay=args.weight_decay,
            nesterov=args.nesterov,
            fused=True,
        )
    return build_adam(parameters, args, args.learning_rate)


def build_adam(parameters: Sequence[nn.Parameter], args: DistillationConfig, rate: float) -> torch.optim.Optimizer:
    """Adam with the Config's betas, epsilon and weight decay: decoupled where `optim` is adamw_torch, else coupled."""
    kind = torch.optim.AdamW if args.optim == "adamw_torch" else torch.optim.Adam
    return kind(
        parameters,
        lr=rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
        fused=True,
    )


def milestone_schedule(
    optimizer: torch.optim.Optimizer,
    *,
    max_steps: int,
    milestones: Sequence[float],
    gamma: float,
    kind: str = "constant",
    warmup_steps: int = 0,
) -> LambdaLR:
    """A transformers schedule, multiplied by `gamma` at each milestone passed.

    Args:
        milestones: fractions of the run in (0, 1); 0.5 of 300 epochs is the paper's epoch 150, at any budget.
        kind: `constant`, `constant_with_warmup`, `linear` or `cosine`.
        warmup_steps: updates of linear warm-up, for the kinds that have one.
    """
    schedule = get_scheduler(kind, optimizer, num_warmup_steps=warmup_steps, num_training_steps=max_steps)
    steps = sorted(round(fraction * max_steps) for fraction in milestones)

    def with_milestones(base: Any) -> Any:
        return lambda step: base(step) * gamma ** bisect_right(steps, step)

    schedule.lr_lambdas = [with_milestones(base) for base in schedule.lr_lambdas]
    # An optimizer that waits for its first gradients while its schedule runs on is no mistake to be warned of.
    optimizer._opt_called = True  # type: ignore[attr-defined]
    return schedule


def build_main_schedule(optimizer: torch.optim.Optimizer, args: DistillationConfig, max_steps: int) -> LambdaLR:
    """The schedule of the students' main optimizer, by the Config's fields without prefix."""
    return milestone_schedule(
        optimizer,
        max_steps=max_steps,
        milestones=args.lr_milestones,
        gamma=args.lr_gamma,
        kind=args.lr_scheduler_type,
        warmup_steps=args.get_warmup_steps(max_steps),
    )


def build_discriminator_schedule(optimizer: torch.optim.Optimizer, args: Any, max_steps: int) -> LambdaLR:
    """A constant rate, multiplied by `lr_gamma` at each of `discriminator_lr_milestones`."""
    milestones = args.discriminator_lr_milestones
    return milestone_schedule(optimizer, max_steps=max_steps, milestones=milestones, gamma=args.lr_gamma)


def _check_names(what: str, own: dict[str, Any], state: dict[str, Any]) -> None:
    if own.keys() != state.keys():
        raise KeyError(f"the checkpoint has {what}s {sorted(state)}, this run has {sorted(own)}")
