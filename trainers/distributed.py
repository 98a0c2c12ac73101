"""What several ranks must agree on: gradients, finiteness, buffers, and the very same parameters.

Trainable modules are not wrapped in DistributedDataParallel: `torch.autograd.grad`, which methods with several losses
on one graph need, silently skips its all-reduce.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hfkd.errors import InputError, RunError


BUCKET_BYTES = 25 * 2**20  # a size that keeps a collective busy and its copy small


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def average_gradients(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The mean of each gradient over the ranks, reduced in buckets."""
    if world_size() == 1:
        return list(gradients)
    averaged: list[Tensor] = []
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        flat /= world_size()
        parts = flat.split([gradient.numel() for gradient in bucket])
        averaged += [part.view_as(gradient) for part, gradient in zip(parts, bucket, strict=True)]
    return averaged


def gather_with_gradients(tensor: Tensor) -> Tensor:
    """The rows of all ranks, in the order of the ranks: (N, ...) of each to (ranks N, ...).

    A loss of the result is that of the joined batch. Its gradient reaches each rank's own rows from every rank's loss,
    so that `average_gradients` gives what one process with that batch would have. All ranks have N rows.
    """
    return tensor if world_size() == 1 else _Gather.apply(tensor)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[dist.get_rank()]


def _buckets(tensors: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size > BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel() * tensor.element_size()
    if bucket:
        yield bucket


def broadcast_buffers(module: nn.Module) -> None:
    """Give every rank the buffers of rank 0, as a checkpoint holds those: going on then equals resuming."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def broadcast_state(module: nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0, as DistributedDataParallel does at its start."""
    if world_size() > 1:
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor, src=0)


def share_failure(message: str | None, kind: type[Exception]) -> None:
    """Raise `kind(message)` on every rank when one has a message, the first one's; called by all of them.

    A rank that raised by itself would leave the others waiting for it in their next collective call.
    """
    messages: list[str | None] = [message]
    if world_size() > 1:
        messages = [None] * world_size()
        dist.all_gather_object(messages, message)
    shared = next((one for one in messages if one is not None), None)
    if shared is not None:
        raise kind(shared)


@contextmanager
def failing_together(what: str) -> Iterator[None]:
    """What fails inside on one rank fails on all; entered by all of them, and nothing inside waits for another.

    Args:
        what: is done inside, for the message.

    Raises:
        InputError: where a rank raised one, with its message.
        RunError: where a rank raised something else, in one line.
    """
    refused: str | None = None
    failed: str | None = None
    cause: Exception | None = None
    try:
        yield
    except InputError as error:
        refused, cause = str(error), error
    except Exception as error:
        failed, cause = f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}", error
    try:
        share_failure(refused, InputError)
        share_failure(failed, RunError)
    except (InputError, RunError) as shared:
        raise shared from cause


def all_ranks(flag: Tensor) -> bool:
    """True where the 0-dim boolean `flag` is True on every rank."""
    value = flag.to(torch.int32).clone()
    if world_size() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MIN)
    return bool(value.item())


def check_same_parameters(module: nn.Module, step: int) -> None:
    """Compare a hash of all trainable parameters across the ranks.

    Raises:
        RunError: when ranks have drifted apart.
    """
    if world_size() == 1:
        return
    # Weighted by position, so that tensors whose values merely changed places differ too.
    parts = [p.detach().double().reshape(-1) for p in module.parameters() if p.requires_grad]
    digest = torch.stack([(p * torch.arange(1, p.numel() + 1, device=p.device)).sum() for p in parts])
    low, high = digest.clone(), digest.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    if not torch.equal(low, high):
        raise RunError(
            f"step {step}: the ranks' parameters differ, so their gradients were not averaged alike; "
            "use one batch size on all ranks and report this if it persists"
        )
