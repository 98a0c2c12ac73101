"""Giving an image classifier another last layer."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfkd.errors import InputError
from hfkd.models.adapter import find_classifier


def put_linear_head(model: PreTrainedModel, weight: Tensor, bias: Tensor, class_names: Sequence[str]) -> None:
    """Replace the last linear layer of `model` by one that was fitted to its pooled features.

    Args:
        model: any transformers image classifier, changed in place: the layer, and the classes in its configuration.
        weight, bias: (C, D) and (C,), in any precision.
        class_names: one for each of the C classes, in their order.

    Raises:
        InputError: no such layer, one without a bias, or one of another width than D.
    """
    old = find_classifier(model)
    classes, width = weight.shape
    if old.bias is None or old.in_features != width or len(class_names) != classes:
        raise InputError(
            f"{type(model).__name__} has a last layer on {old.in_features} features "
            f"{'without' if old.bias is None else 'with'} a bias, and the new one takes {width} for {classes} of "
            f"{len(class_names)} classes: fit it to the features of this network"
        )
    new = nn.utils.skip_init(nn.Linear, width, classes, device=old.weight.device, dtype=old.weight.dtype)
    with torch.no_grad():
        new.weight.copy_(weight)
        new.bias.copy_(bias)
    owner, _, name = next(name for name, module in model.named_modules() if module is old).rpartition(".")
    setattr(model.get_submodule(owner), name, new)
    names = [str(name) for name in class_names]
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: number for number, name in enumerate(names)}
    model.config.problem_type = "single_label_classification"
    model.num_labels = classes
