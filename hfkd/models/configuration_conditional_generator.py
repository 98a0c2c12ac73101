"""Configuration of class-conditional generators of fully connected layers and transposed convolutions."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedConfig


# By image size. The paper (arXiv 2312.02470) has three fully connected layers and three transposed convolutions; the
# widths are ours. A single position, for points in a plane, takes the fully connected layers alone.
_PLANS: Mapping[int, Mapping[str, Any]] = MappingProxyType(
    {
        1: {"latent_size": 16, "hidden_sizes": (128, 128, 128), "conv_sizes": (), "strides": ()},
        8: {"latent_size": 64, "hidden_sizes": (128, 128, 32 * 2 * 2), "conv_sizes": (32, 16), "strides": (2, 2, 1)},
        28: {"latent_size": 64, "hidden_sizes": (256, 512, 64 * 7 * 7), "conv_sizes": (64, 32), "strides": (2, 2, 1)},
        32: {
            "latent_size": 128,
            "hidden_sizes": (256, 512, 128 * 4 * 4),
            "conv_sizes": (128, 64),
            "strides": (2, 2, 2),
        },
        64: {
            "latent_size": 128,
            "hidden_sizes": (256, 512, 128 * 8 * 8),
            "conv_sizes": (128, 64),
            "strides": (2, 2, 2),
        },
    }
)


class HfkdConditionalGeneratorConfig(PreTrainedConfig):
    """Generator of images of classes, after Yu and Wang (NeurIPS 2023, arXiv 2312.02470); widths and sizes are ours.

    The classes may be those of several classifiers: `id2label` then has the names of all, those of classifier 0 first,
    and a class is named by the classifier's number and by its own number there. `for_images` has tried sizes; the
    defaults are those for 28x28 pixels.

    Args:
        latent_size: random numbers that an image is made of.
        num_channels: channels of the images.
        image_size: side of the images in pixels.
        hidden_sizes: width of each fully connected layer; the last one's is laid out as a map, whose side times all
            strides is `image_size`.
        conv_sizes: output channels of each transposed convolution but the last, which gives the image.
        strides: of each transposed convolution, which enlarges its map so many times. Without any, a linear layer
            makes the image.
        class_counts: classes of each classifier; by default one classifier with all of `id2label`.
        latent_skip: add the first latents to the image before tanh, one for each of its values: fresh weights then
            give images that differ as much as latents do.

    Raises:
        ValueError: fields that do not fit each other or are out of their range.
    """

    model_type = "hfkd_conditional_generator"

    latent_size: int = 64
    num_channels: int = 1
    image_size: int = 28
    hidden_sizes: Sequence[int] = (256, 512, 3136)
    conv_sizes: Sequence[int] = (64, 32)
    strides: Sequence[int] = (2, 2, 1)
    class_counts: Sequence[int] = ()
    latent_skip: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("hidden_sizes", "conv_sizes", "strides"):
            setattr(self, name, list(getattr(self, name)))
        self.class_counts = list(self.class_counts) or [self.num_labels]
        self._check_layers()
        self._check_classes()
        if self.latent_skip and self.latent_size < self.num_values:
            raise ValueError(
                f"latent_skip=True needs a latent for each of the {self.num_values} values of an image, and "
                f"latent_size={self.latent_size}: raise it, or leave latent_skip out"
            )
        self.auto_map = {
            "AutoConfig": "configuration_conditional_generator.HfkdConditionalGeneratorConfig",
            "AutoModel": "modeling_conditional_generator.HfkdConditionalGeneratorModel",
        }

    def _check_layers(self) -> None:
        sizes = (self.latent_size, self.num_channels, self.image_size)
        if not self.hidden_sizes or min(*sizes, *self.hidden_sizes, *self.conv_sizes, *self.strides) < 1:
            raise ValueError(
                f"latent_size, num_channels, image_size={sizes}, hidden_sizes={self.hidden_sizes}, "
                f"conv_sizes={self.conv_sizes} and strides={self.strides} must all be at least 1"
            )
        if len(self.conv_sizes) != max(len(self.strides) - 1, 0):
            raise ValueError(
                f"strides={self.strides} needs one of conv_sizes={self.conv_sizes} for each transposed convolution "
                "but the last"
            )
        if self.strides and (self.image_size % math.prod(self.strides) or self.hidden_sizes[-1] % self.map_size**2):
            raise ValueError(
                f"image_size={self.image_size} must be a map's side times strides={self.strides}, and "
                f"hidden_sizes[-1]={self.hidden_sizes[-1]} a multiple of its positions"
            )

    def _check_classes(self) -> None:
        if min(self.class_counts) < 1 or sum(self.class_counts) != self.num_labels:
            raise ValueError(
                f"class_counts={self.class_counts} must be one positive number a classifier and together the "
                f"{self.num_labels} names of id2label"
            )

    @property
    def num_classifiers(self) -> int:
        """How many classifiers the classes belong to."""
        return len(self.class_counts)

    @property
    def map_size(self) -> int:
        """Side of the map that the transposed convolutions begin with; 1 where there are none."""
        return self.image_size // math.prod(self.strides) if self.strides else 1

    @property
    def num_values(self) -> int:
        """Values of an image: channels times pixels."""
        return self.num_channels * self.image_size**2

    def class_names(self, classifier_index: int = 0) -> list[str]:
        """Names of the classes of one classifier, in the order of its labels."""
        start = sum(self.class_counts[:classifier_index])
        return [self.id2label[start + label] for label in range(self.class_counts[classifier_index])]

    @classmethod
    def for_images(cls, image_size: int, num_channels: int = 1, **settings: Any) -> "HfkdConditionalGeneratorConfig":
        """Sizes for images of 1 (points: (N, C, 1, 1)), 8, 28, 32 or 64 pixels; `settings` go over them.

        Raises:
            ValueError: an image size without such a plan.
        """
        if image_size not in _PLANS:
            raise ValueError(
                f"image_size={image_size} has no generator: resize the images to one of {', '.join(map(str, _PLANS))} "
                "pixels, or build HfkdConditionalGeneratorConfig by hand"
            )
        return cls(image_size=image_size, num_channels=num_channels, **{**_PLANS[image_size], **settings})


HfkdConditionalGeneratorConfig.register_for_auto_class("AutoConfig")
