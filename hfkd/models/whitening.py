"""Whitening of what enters the linearised layers, so that few updates reach what gradient features can give. Ours.

The gradient of a layer's weight is an outer product with the layer's input, and inputs are far from white: after a
ReLU one direction, their mean, has most of the energy, and training along the others is slow. Raw weights R with
W' = R P, P = (S / s + damping)^(-1/2), where S is the second moment of an input's channels over the training images
and s the mean of its eigenvalues, span the same functions; gradients by R see inputs of nearly equal energy in all
directions. It is the input factor of K-FAC (Martens and Grosse, ICML 2015, arXiv 1503.05671) as a parametrisation.
"""

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn


DAMPING = 0.01


def inverse_root(moment: Tensor, damping: float = DAMPING) -> Tensor:
    """P = (S / s + damping I)^(-1/2), symmetric and float64, of S (C, C) or any multiple of it; s as above.

    Inputs that are all zero have nothing to whiten: the identity.
    """
    mean = moment.double().diagonal().mean()
    if mean <= 0:
        return torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    values, axes = torch.linalg.eigh(moment.double() / mean)
    return (axes * (values.clamp(min=0) + damping).rsqrt()) @ axes.T


class InputMoments:
    """In this context, what enters each of `layers` (by name) is summed up: convolutions and linear layers.

    Attributes:
        sums: by name, sum of the outer products of the inputs' channels, (C, C) in float64; none of a layer that was
            not called.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = layers
        self.sums: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> "InputMoments":
        for name, layer in self.layers.items():
            self._hooks.append(layer.register_forward_pre_hook(self._counting(name), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _counting(self, name: str) -> Any:
        def add(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            (given,) = args or kwargs.values()
            inputs = given.detach().float()
            rows = (inputs.movedim(1, -1) if isinstance(layer, nn.Conv2d) else inputs).flatten(0, -2)
            with torch.autocast(rows.device.type, enabled=False):
                moment = (rows.T @ rows).double()
            self.sums[name] = self.sums[name] + moment if name in self.sums else moment

        return add
