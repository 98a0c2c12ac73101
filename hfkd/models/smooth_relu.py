"""ReLU networks whose gradient is itself differentiable by the input, for losses on gradients.

The gradient of a ReLU network depends on an image through gates that are 0 or 1, whose derivative is zero wherever it
exists. Here activations keep their value, and the backward pass sees sigmoid(a x) in place of the gate [x > 0], as in
the reconstruction code of Haim et al. (NeurIPS 2022, arXiv 2206.07758).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hfkd.errors import InputError


def smooth_relu_gates(sharpness: float | None) -> AbstractContextManager[Any]:
    """In this context, ReLU and LeakyReLU have smooth gates, in any network and whether module, function or method.

    Values are bit for bit what they were. The gradient of ReLU is sigmoid(a x), that of LeakyReLU with slope s is
    s + (1 - s) sigmoid(a x), and so on for every higher derivative; backward passes may run after the context is left.
    Scripted or compiled networks, whose calls do not pass through Python, keep their gates.

    Args:
        sharpness: a > 0, in units of 1 / pre-activation; None: gates as they are.

    Raises:
        InputError: a sharpness that is not positive.
    """
    if sharpness is None:
        return nullcontext()
    if not sharpness > 0:
        raise InputError(f"sharpness={sharpness} must be positive; None keeps the true gates")
    return _SmoothGates(sharpness)


class _SmoothGates(TorchFunctionMode):
    def __init__(self, sharpness: float) -> None:
        self.sharpness = sharpness

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in SMOOTH:
            return SMOOTH[func](*args, **kwargs, sharpness=self.sharpness)
        return func(*args, **kwargs)


class _Activation(torch.autograd.Function):
    """max(x, s x) for 0 <= s < 1, with a backward pass made of differentiable operations."""

    @staticmethod
    def forward(ctx: Any, pre_activation: Tensor, negative_slope: float, sharpness: float) -> Tensor:
        ctx.save_for_backward(pre_activation)
        ctx.negative_slope, ctx.sharpness = negative_slope, sharpness
        return F.leaky_relu(pre_activation, negative_slope) if negative_slope else torch.relu(pre_activation)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (pre_activation,) = ctx.saved_tensors
        gate = torch.sigmoid(ctx.sharpness * pre_activation)
        if ctx.negative_slope:
            gate = ctx.negative_slope + (1 - ctx.negative_slope) * gate
        return gradients[0] * gate, None, None


def _leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False, *, sharpness: float) -> Tensor:
    if not inplace:
        return _Activation.apply(input, negative_slope, sharpness)
    # The backward pass needs what is overwritten here.
    return input.copy_(_Activation.apply(input.clone(), negative_slope, sharpness))


def _relu(input: Tensor, inplace: bool = False, *, sharpness: float) -> Tensor:
    return _leaky_relu(input, 0.0, inplace, sharpness=sharpness)


SMOOTH: Mapping[Callable[..., Any], Callable[..., Tensor]] = {
    F.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    torch.relu_: partial(_relu, inplace=True),
    Tensor.relu_: partial(_relu, inplace=True),
    F.leaky_relu: _leaky_relu,
    torch._C._nn.leaky_relu: _leaky_relu,
    F.leaky_relu_: partial(_leaky_relu, inplace=True),
}
