"""Forward passes that our convolutional families share: pixels -> stem -> stages -> tail -> pooling -> logits."""

import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.utils.generic import can_return_tuple

from .configuration_convnet import ConvNetConfig


class ConvNetPreTrainedModel(PreTrainedModel):
    """Weight initialisation and class facts."""

    config_class = ConvNetConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    # The loss below is a mean over the batch: Trainer has to divide it by the accumulation steps itself.
    accepts_loss_kwargs = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal of `initial_std` for convolutions, PyTorch's uniform for linear layers, 1 and 0 for norms."""
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=self.initial_std(module))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.uniform_(module.bias, -bound, bound)
        else:
            super()._init_weights(module)
            if (gain := getattr(module, "initial_gain", None)) is not None:
                nn.init.constant_(module.get_parameter("weight"), gain)

    def initial_std(self, conv: nn.Conv2d) -> float:
        """Standard deviation of a fresh convolution's weights: He's, with fan-out."""
        fan_out = conv.out_channels * math.prod(conv.kernel_size)
        return getattr(conv, "initial_gain", 1.0) * math.sqrt(2.0 / fan_out)


class ConvNetModel(ConvNetPreTrainedModel):
    """Backbone. A family's `__init__` sets the four attributes below, then calls `post_init`.

    `stem` and `tail` are modules, `stages` is a `ModuleList` of `Sequential`s of blocks, and `total_stride` is
    how many pixels one position of the last feature map stands for.
    """

    stem: nn.Module
    stages: nn.ModuleList
    tail: nn.Module
    total_stride: int

    def _as_input(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Refuse images the network cannot take; average three channels into the one of a grey network."""
        if pixel_values.ndim != 4:
            raise ValueError(f"pixel_values has shape {tuple(pixel_values.shape)}: expected (N, C, H, W)")
        channels, height, width = pixel_values.shape[1:]
        if min(height, width) < self.total_stride:
            raise ValueError(
                f"images of {height}x{width} pixels are smaller than the total stride {self.total_stride} of "
                f"{type(self).__name__}: use larger images or a network with fewer strides"
            )
        if channels == self.config.num_channels:
            return pixel_values
        if self.config.num_channels == 1 and channels == 3:
            return pixel_values.mean(dim=1, keepdim=True)
        raise ValueError(
            f"images have {channels} channels, but {type(self).__name__} has num_channels={self.config.num_channels}: "
            "convert the images or build the network for them"
        )

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        """Feature maps of `pixel_values` (N, C, H, W).

        Returns:
            `last_hidden_state` (N, C', H', W'), after the last activation; `pooler_output` (N, C'), its average over
            the positions; on request `hidden_states`, the outputs of the stem and of each stage.

        Raises:
            ValueError: the images have the wrong number of channels or are too small: for the total stride, or for the
                receptive field of convolutions without padding.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states = [self.stem(self._as_input(pixel_values))]
        for stage in self.stages:
            hidden_states.append(stage(hidden_states[-1]))
        last_hidden_state = self.tail(hidden_states[-1])
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=last_hidden_state,
            pooler_output=last_hidden_state.mean(dim=(2, 3)),
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
        )


class ConvNetForImageClassification(ConvNetPreTrainedModel):
    """Backbone, global average pooling and one linear layer. A family sets `backbone_class`."""

    backbone_class: type[ConvNetModel]

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.backbone = self.backbone_class(config)
        self.classifier = self.make_classifier(config)
        self.post_init()

    def make_classifier(self, config: ConvNetConfig) -> nn.Linear:
        """The layer from the pooled feature to the logits."""
        return nn.Linear(config.hidden_sizes[-1], config.num_labels)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutputWithNoAttention:
        """Logits (N, K) of `pixel_values` (N, C, H, W), and with `labels` the mean loss.

        Integer labels (N,) give the cross-entropy, float labels (N, K) the binary cross-entropy with logits, unless
        `config.problem_type` says otherwise.

        Raises:
            ValueError: as the backbone's forward.
        """
        # return_dict is spelled out: with config.return_dict=False the backbone would give a tuple.
        outputs = self.backbone(pixel_values, output_hidden_states=output_hidden_states, return_dict=True)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=outputs.hidden_states)
