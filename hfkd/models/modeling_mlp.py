"""Fully connected classifiers: linear layers, batch norm or none, and ReLU."""

import math
from typing import Any

import torch
from torch import nn

from .configuration_mlp import HfkdMlpConfig
from .modeling_convnet import ConvNetForImageClassification, ConvNetModel, ConvNetPreTrainedModel


def make_linear(config: HfkdMlpConfig, layer: int, in_features: int, out_features: int) -> nn.Linear:
    """Linear layer number `layer`, marked with the factor on its initial weights."""
    linear: Any = nn.Linear(in_features, out_features, bias=config.has_bias(layer))
    linear.initial_gain = config.initial_scales[layer]
    return linear


def make_block(config: HfkdMlpConfig, layer: int, in_features: int) -> nn.Sequential:
    """Linear layer, norm and ReLU."""
    width = config.hidden_sizes[layer]
    norm = nn.BatchNorm1d(width) if config.norm == "batch" else nn.Identity()
    return nn.Sequential(make_linear(config, layer, in_features, width), norm, nn.ReLU())


class HfkdMlpPreTrainedModel(ConvNetPreTrainedModel):
    """Weight initialisation."""

    config_class = HfkdMlpConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Kaiming's normal with fan-in (He et al., ICCV 2015) times the layer's initial scale; biases are zero."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(
                module.weight, std=getattr(module, "initial_gain", 1.0) * math.sqrt(2 / module.in_features)
            )
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class HfkdMlpModel(HfkdMlpPreTrainedModel, ConvNetModel):
    """Hidden layers, one stage of one block each; the last ReLU's output (N, D) is given as a map (N, D, 1, 1).

    `hidden_states`, on request, are (N, C * H * W) and (N, D) of each layer.
    """

    def __init__(self, config: HfkdMlpConfig) -> None:
        super().__init__(config)
        self.stem = nn.Flatten()
        self.stages = nn.ModuleList()
        features = config.num_channels * config.image_size**2
        for layer, width in enumerate(config.hidden_sizes):
            self.stages.append(nn.Sequential(make_block(config, layer, features)))
            features = width
        self.tail = nn.Unflatten(1, (features, 1, 1))
        self.total_stride = config.image_size
        self.post_init()

    def _as_input(self, pixel_values: torch.Tensor) -> torch.Tensor:
        side = self.config.image_size
        if pixel_values.ndim == 4 and tuple(pixel_values.shape[-2:]) != (side, side):
            height, width = pixel_values.shape[-2:]
            raise ValueError(
                f"images of {height}x{width} pixels do not fit {type(self).__name__}, which was built with "
                f"image_size={side}: resize the images or build the network for them"
            )
        return super()._as_input(pixel_values)


class HfkdMlpForImageClassification(HfkdMlpPreTrainedModel, ConvNetForImageClassification):
    """Hidden layers with a linear classifier."""

    backbone_class = HfkdMlpModel

    def make_classifier(self, config: HfkdMlpConfig) -> nn.Linear:
        return make_linear(config, len(config.hidden_sizes), config.hidden_sizes[-1], config.num_labels)


HfkdMlpModel.register_for_auto_class("AutoModel")
HfkdMlpForImageClassification.register_for_auto_class("AutoModelForImageClassification")
