"""What a probe reads of a frozen network: one vector for each image."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from hfkd.errors import InputError
from hfkd.models import ClassifierAdapter, HfkdGradientFeaturesConfig
from hfkd.models.backbone import pooled_features


Features = Literal["last", "blocks"]


def frozen_features(model: Any, kind: Features = "last", bf16: bool = False) -> Callable[[Tensor], Tensor]:
    """From images (N, C, H, W) to features (N, D) of a network in evaluation mode.

    Of an image classifier they are what its last linear layer reads, of gradient features those of their base, and of
    a network without a classifier those of `pooled_features`. `blocks` are for such a network, a discriminator: the
    average over the positions of each map in its `block_features`, and `pooler_output`, one after the other (the
    "multi feature" of Squeeze and Span, arXiv 2211.03000, Table 1). Averages that `pooler_output` holds count once. A
    discriminator that compares the images of a group sees each batch as one group, as in the paper's probes.

    Args:
        model: any of these.
        kind: `last`, or `blocks`.
        bf16: run the network under bf16 autocast.

    Raises:
        InputError: `blocks` of a network that has none to give.
    """
    function = _function(model, kind)
    if not bf16:
        return function

    def under_autocast(pixel_values: Tensor) -> Tensor:
        with torch.autocast(pixel_values.device.type, torch.bfloat16):
            return function(pixel_values)

    return under_autocast


def has_classifier(model: Any) -> bool:
    """Whether the network is a head on a base model, and no base model itself."""
    return model.base_model is not model


def _function(model: Any, kind: Features) -> Callable[[Tensor], Tensor]:
    for module in model.modules():
        if hasattr(module, "group_size"):
            module.group_size = None
    if kind == "blocks":
        return lambda pixel_values: _all_blocks(model, pixel_values)
    if not has_classifier(model):
        return lambda pixel_values: pooled_features(model, pixel_values)
    if model.config.model_type == HfkdGradientFeaturesConfig.model_type:
        return model.base_model.features
    adapter = ClassifierAdapter(model)
    return lambda pixel_values: adapter(pixel_values).pooled


def _all_blocks(model: Any, pixel_values: Tensor) -> Tensor:
    outputs = model(pixel_values)
    maps, last = getattr(outputs, "block_features", None), getattr(outputs, "pooler_output", None)
    if maps is None or last is None:
        raise InputError(f"features=blocks needs a discriminator, and this is a {type(model).__name__}: use last")
    pooled = torch.cat([feature_map.mean(dim=(2, 3)) for feature_map in maps], dim=1)
    end = pooled[:, -last.shape[1] :]
    held = end.shape == last.shape and torch.allclose(end, last, rtol=1e-3)
    return pooled if held else torch.cat([pooled, last], dim=1)
