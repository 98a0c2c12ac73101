"""What a linearised network is made of: scales of raw weights, weights named like those of a base, folded norms."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn


BIAS_SCALE = math.sqrt(0.1)  # of the authors' code; Jacot et al. have 0.1


def ntk_scale(shape: Sequence[int], kind: str) -> float:
    """s of the NTK parametrisation: a layer stores raw weights v and uses s * v.

    Matrices and convolutions have 1/sqrt(outputs) (`fan_out`, the authors' code, without the kernel's area) or
    1/sqrt(inputs * kernel area) (`fan_in`, Jacot et al.). Biases and other vectors have sqrt(0.1).
    """
    if kind == "none":
        return 1.0
    if len(shape) < 2:
        return BIAS_SCALE
    return shape[0] ** -0.5 if kind == "fan_out" else math.prod(shape[1:]) ** -0.5


class NamedTree(nn.Module):
    """Tensors under the dotted names of a base's parameters: `named_parameters()`, say, reads like that of the base.

    Args:
        tensors: by name; an `nn.Parameter` becomes one, another tensor a buffer.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *path, leaf = name.split(".")
            node: nn.Module = self
            for part in path:
                if part not in node._modules:
                    node.add_module(part, nn.Module())
                node = node.get_submodule(part)
            if isinstance(tensor, nn.Parameter):
                node.register_parameter(leaf, tensor)
            else:
                node.register_buffer(leaf, tensor)


def layers_to_whiten(base: nn.Module, names: Iterable[str]) -> dict[str, nn.Conv2d | nn.Linear]:
    """By parameter, the layers whose weight is among `names` and multiplies all channels of their input."""
    layers: dict[str, nn.Conv2d | nn.Linear] = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        layer = base.get_submodule(owner)
        dense = isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
        if leaf == "weight" and dense:
            layers[name] = layer  # type: ignore[assignment]
    return layers


def take_classifier_away(base: nn.Module, classifier: str) -> None:
    """Let the base's `logits` be what its last linear layer read, f(x)."""
    base.set_submodule(classifier, nn.Identity())


def remove_folded_norms(base: nn.Module, folded: Iterable[Sequence[str]]) -> None:
    """Give each convolution of (convolution, norm) a bias and remove the norm: a place for folded weights."""
    for convolution, norm in folded:
        layer = base.get_submodule(convolution)
        if layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(layer.weight.shape[0]))
        base.set_submodule(norm, nn.Identity())
