"""Folding batch norms in evaluation mode into the convolutions before them, for any network."""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


class _CountReaders(TorchFunctionMode):
    """Counts the operations that make a tensor of each tensor that was handed out by `watch`."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: Counter[int] = Counter()
        self._watched: dict[int, Tensor] = {}  # held, so that no two tensors have one id

    def watch(self, tensor: Tensor) -> None:
        self._watched[id(tensor)] = tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor | tuple | list):
            self.readers.update({id(arg) for arg in tree_leaves((args, kwargs)) if id(arg) in self._watched})
        return result


def find_foldable(model: nn.Module, pixel_values: Tensor) -> list[tuple[str, str]]:
    """(convolution, batch norm) pairs, by name, where nothing but the norm reads the convolution's output.

    Seen in one forward pass of `pixel_values` (N, C, H, W). The norms of pre-activation networks have no pair where a
    shortcut reads their input too.
    """
    counter = _CountReaders()
    made: dict[int, nn.Module] = {}
    pairs: dict[nn.Module, tuple[nn.Module, int]] = {}
    calls: Counter[nn.Module] = Counter()

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls[module] += 1
        if isinstance(module, nn.Conv2d):
            counter.watch(output)
            made[id(output)] = module
        elif id(args[0]) in made:
            pairs[made[id(args[0])]] = (module, id(args[0]))

    with ExitStack() as stack:
        for module in model.modules():
            # Subclasses of batch norm may do more than normalise.
            if isinstance(module, nn.Conv2d) or (type(module) is nn.BatchNorm2d and module.track_running_stats):
                stack.callback(module.register_forward_hook(keep).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(counter)
        model(pixel_values)
    names = {module: name for name, module in model.named_modules()}
    return [
        (names[convolution], names[norm])
        for convolution, (norm, output) in pairs.items()
        if calls[convolution] == calls[norm] == counter.readers[output] == 1
    ]


def folded_state(model: nn.Module, pairs: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    """The state of `model` with each norm's statistics, scale and shift in its convolution's weight and bias.

    With sigma = sqrt(running_var + eps): W' = (gamma / sigma) W and b' = (b - mean) gamma / sigma + beta, per output
    channel. Computed in float64; the norms' own entries are left out.
    """
    state = dict(model.state_dict())
    for convolution, norm in pairs:
        layer = model.get_submodule(norm)
        assert isinstance(layer, nn.BatchNorm2d)
        entries = {n: state.pop(f"{norm}.{n}") for n in layer.state_dict()}
        weight = state[f"{convolution}.weight"]
        mean, variance = entries["running_mean"].double(), entries["running_var"].double()
        factor = entries.get("weight", torch.ones_like(mean)).double() / (variance + layer.eps).sqrt()
        bias = state.get(f"{convolution}.bias", torch.zeros_like(mean)).double()
        shift = entries.get("bias", torch.zeros_like(mean)).double()
        state[f"{convolution}.weight"] = (factor[:, None, None, None] * weight.double()).to(weight.dtype)
        state[f"{convolution}.bias"] = ((bias - mean) * factor + shift).to(weight.dtype)
    return state
