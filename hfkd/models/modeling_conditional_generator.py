"""Class-conditional generator of fully connected layers and transposed convolutions (arXiv 2312.02470; sizes ours)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils.generic import can_return_tuple

from .configuration_conditional_generator import HfkdConditionalGeneratorConfig
from .generator import GeneratorOutput, GeneratorPreTrainedModel, class_numbers


START_CONTRAST = 0.1  # of the images that `start_at` leaves, before tanh, against those of Kaiming's weights


def make_upsampling(in_channels: int, out_channels: int, stride: int, *, bias: bool) -> nn.ConvTranspose2d:
    """Transposed convolution that makes a map exactly `stride` times as large."""
    return nn.ConvTranspose2d(in_channels, out_channels, stride + 2, stride, padding=1, bias=bias)


class HfkdConditionalGeneratorModel(GeneratorPreTrainedModel):
    """Latents and class to an image: fully connected layers, then transposed convolutions, with batch norm and ReLU.

    The class is given as one-hot numbers beside the latents: [latents, label], or of several classifiers [latents,
    classifier, label]. The last layer has no norm; tanh gives images in [-1, 1].
    """

    config_class = HfkdConditionalGeneratorConfig

    def __init__(self, config: HfkdConditionalGeneratorConfig) -> None:
        super().__init__(config)
        features = config.latent_size + max(config.class_counts)
        if config.num_classifiers > 1:
            features += config.num_classifiers
        self.layers = nn.Sequential()
        for width in config.hidden_sizes:
            self.layers.append(nn.Sequential(nn.Linear(features, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()))
            features = width
        channels = features // config.map_size**2
        self.blocks = nn.ModuleList()
        for width, stride in zip(config.conv_sizes, config.strides, strict=False):  # the last one gives the image
            conv = make_upsampling(channels, width, stride, bias=False)
            self.blocks.append(nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU()))
            channels = width
        self.to_image: nn.Module
        if config.strides:
            self.to_image = make_upsampling(channels, config.num_channels, config.strides[-1], bias=True)
        else:
            self.to_image = nn.Sequential(nn.Flatten(), nn.Linear(channels, config.num_values))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Kaiming's normal (He et al., ICCV 2015): variance 2 / number of inputs that an output is a sum of."""
        if isinstance(module, nn.Linear | nn.ConvTranspose2d):
            if isinstance(module, nn.Linear):
                fan_in: float = module.in_features
            else:
                fan_in = module.in_channels * math.prod(module.kernel_size) / math.prod(module.stride)
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_in))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @torch.no_grad()
    def start_at(self, mean: torch.Tensor) -> None:
        """Make fresh weights give nearly uniform images of colour `mean` (C,) in [-1, 1].

        The mean pixel of a classifier's training images is in its normaliser. Images that start there are on its side
        of grey, and the losses on its gradients tell them apart; from random images they may run into inverted ones.
        """
        layers: Any = self.to_image
        layer = layers if self.config.strides else layers[1]
        values = mean.double().clamp(1e-6 - 1, 1 - 1e-6).atanh()
        layer.bias.copy_(values.repeat_interleave(len(layer.bias) // len(values)))
        layer.weight.mul_(START_CONTRAST)

    def conditions(
        self,
        n: int,
        labels: Sequence[int] | torch.Tensor | None = None,
        classifier_index: int = 0,
    ) -> dict[str, torch.Tensor]:
        """`labels` (n,), by default 0, 1, 2, ... in turn, and `classifier_index` (n,), on the CPU.

        Raises:
            ValueError: another number of labels, a label outside the classes, or no such classifier.
        """
        counts = self.config.class_counts
        if not 0 <= classifier_index < len(counts):
            raise ValueError(f"classifier_index={classifier_index} is unknown: there are {len(counts)} classifiers")
        numbers = class_numbers(n, labels, counts[classifier_index])
        return {"labels": numbers, "classifier_index": torch.full((n,), classifier_index)}

    @can_return_tuple
    def forward(
        self,
        latents: torch.Tensor,
        labels: torch.Tensor | None = None,
        classifier_index: torch.Tensor | int | None = None,
    ) -> GeneratorOutput:
        """Images of `latents` (N, latent_size) and int64 `labels` (N,).

        Args:
            latents: from N(0, I) in training.
            labels: class of each image, counted within its classifier. They are taken as they are: `conditions`
                checks those of a user.
            classifier_index: of all images, or int64 (N,); may be left out where there is one classifier.

        Raises:
            ValueError: labels are missing, or with several classifiers the classifier's number is.
        """
        condition = self._condition(latents, labels, classifier_index)
        hidden = self.layers(torch.cat([latents, condition], dim=1))
        maps = [hidden.unflatten(1, (-1, self.config.map_size, self.config.map_size))]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        shape = (-1, self.config.num_channels, self.config.image_size, self.config.image_size)
        pre_activation = self.to_image(maps[-1]).view(shape)
        if self.config.latent_skip:
            pre_activation = pre_activation + latents[:, : self.config.num_values].view(shape)
        return GeneratorOutput(images=torch.tanh(pre_activation), block_features=tuple(maps), latents=latents)

    def _condition(
        self, latents: torch.Tensor, labels: torch.Tensor | None, classifier_index: torch.Tensor | int | None
    ) -> torch.Tensor:
        """One-hot label, after a one-hot classifier where there are several: (N, K + largest number of classes)."""
        if labels is None:
            raise ValueError(f"{type(self).__name__} makes images of classes: give labels")
        parts = [F.one_hot(labels, max(self.config.class_counts))]
        if self.config.num_classifiers > 1:
            if classifier_index is None:
                raise ValueError(
                    f"{type(self).__name__} knows {self.config.num_classifiers} classifiers: give classifier_index"
                )
            index = torch.as_tensor(classifier_index, device=labels.device).expand(len(labels))
            parts.insert(0, F.one_hot(index, self.config.num_classifiers))
        return torch.cat(parts, dim=1).to(latents.dtype)


HfkdConditionalGeneratorModel.register_for_auto_class("AutoModel")
