"""Configuration of the residual networks of He et al."""

from collections.abc import Sequence
from typing import Any

from .configuration_convnet import ConvNetConfig, check_choice


class HfkdResNetConfig(ConvNetConfig):
    """Residual network (He et al., CVPR 2016, arXiv 1512.03385); the defaults are the CIFAR ResNet-20.

    Args:
        embedding_size: channels after the stem.
        hidden_sizes: output channels of each stage (for `bottleneck`, four times the width of its 3x3 convolutions).
        depths: blocks in each stage. The CIFAR network of 6n+2 layers has n blocks in each of three stages.
        layer_type: `basic` (two 3x3 convolutions) or `bottleneck` (1x1, 3x3 with the stride, 1x1).
        stem: `cifar` (3x3 convolution) or `imagenet` (7x7 convolution and max pooling, stride 4 together).
        shortcut: where the shape changes, `A` (every second pixel, new channels zero; no parameters) or `B` (1x1
            convolution and norm).
        zero_init_residual: fresh blocks pass their input on, as the last norm of each branch starts at zero (Goyal et
            al., arXiv 1706.02677, section 5.1).

    `ConvNetConfig` has the other fields.

    Raises:
        ValueError: a field is outside its choices, there is not one depth for each stage, or there is no norm
            to start at zero.
    """

    model_type = "hfkd_resnet"

    embedding_size: int = 16
    hidden_sizes: Sequence[int] = (16, 32, 64)
    depths: Sequence[int] = (3, 3, 3)
    layer_type: str = "basic"
    stem: str = "cifar"
    shortcut: str = "B"
    zero_init_residual: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.hidden_sizes, self.depths = list(self.hidden_sizes), list(self.depths)
        check_choice("layer_type", self.layer_type, ("basic", "bottleneck"))
        check_choice("stem", self.stem, ("cifar", "imagenet"))
        check_choice("shortcut", self.shortcut, ("A", "B"))
        if not self.depths or len(self.depths) != len(self.hidden_sizes) or min(self.depths) < 1:
            raise ValueError(f"depths={self.depths} must give at least 1 for each of hidden_sizes={self.hidden_sizes}")
        if self.zero_init_residual and self.norm == "none":
            raise ValueError("zero_init_residual=True starts norms at zero, and norm='none' has none: choose batch")


HfkdResNetConfig.register_for_auto_class("AutoConfig")
