"""What the configurations of our convolutional image classifiers share."""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig


NORMS = ("batch", "group", "none")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Refuse a `value` that is not among `choices`; raises `ValueError`."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(choices)}")


def full_auto_map(config_class: type) -> dict[str, str]:
    """The `auto_map` of a family, whichever of its classes is saved.

    Family `X` keeps `XConfig` in `configuration_<x>.py`, `XModel` and `XForImageClassification` in `modeling_<x>.py`.
    """
    configuration = config_class.__module__.rsplit(".", 1)[-1]
    modeling = configuration.replace("configuration_", "modeling_", 1)
    family = config_class.__name__.removesuffix("Config")
    return {
        "AutoConfig": f"{configuration}.{family}Config",
        "AutoModel": f"{modeling}.{family}Model",
        "AutoModelForImageClassification": f"{modeling}.{family}ForImageClassification",
    }


class ConvNetConfig(PreTrainedConfig):
    """Fields that every convolutional family has.

    Args:
        num_channels: channels of the images the network was built for. With 1, three-channel input is averaged, so
            that pipelines, which always convert to RGB, work on grey images.
        image_size: side of the training images in pixels. Recorded for processors and probes; the networks are fully
            convolutional and take every size down to their total stride, or without padding their receptive field.
        norm: `batch`, `group` (8 groups, or the largest common divisor of 8 and the channels) or `none`, where each
            convolution has a bias and residual branches, if any, are scaled down at initialisation.

    Raises:
        ValueError: a field is outside its choices.
    """

    num_channels: int = 3
    image_size: int = 32
    norm: str = "batch"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_choice("norm", self.norm, NORMS)
        if self.num_channels < 1:
            raise ValueError(f"num_channels={self.num_channels} is below 1: use 3 for colour, 1 for grey images")
        # Set here and not by register_for_auto_class alone: that lists only the class that is being saved.
        self.auto_map = full_auto_map(type(self))
