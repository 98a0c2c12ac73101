"""The moving average of a generator's weights, which is what is saved and sampled."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def average_decay(images: int, seen: int, half_life: float, ramp_up: float) -> float:
    """How much of the average is kept in an update, in [0, 1]: 0.5^(images / h) (Karras et al., arXiv 2006.06676).

    Args:
        images: of the update, over all ranks.
        seen: before it.
        half_life: h, in images; 0 keeps nothing, so that the average is the generator itself.
        ramp_up: h is at most this fraction of `seen`, so that an early average is short; 0 for no such limit.
    """
    h = min(half_life, ramp_up * seen) if ramp_up else half_life
    return 0.5 ** (images / h) if h > 0 else 0.0


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Move the parameters of `average` towards those of `network`, of the same shape, and copy its buffers."""
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
    for own, new in zip(average.buffers(), network.buffers(), strict=True):
        own.copy_(new)


class AfterUpdate(TrainerCallback):
    """Calls a function when all optimizers have moved, before anything is logged, saved or evaluated."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.function()
