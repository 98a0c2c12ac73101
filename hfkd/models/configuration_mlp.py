"""Configuration of fully connected classifiers."""

from collections.abc import Sequence
from typing import Any

from .configuration_convnet import ConvNetConfig, check_choice


BIASES = ("none", "first", "all")
MLP_NORMS = ("batch", "none")


class HfkdMlpConfig(ConvNetConfig):
    """Fully connected layers with ReLU between them, as the classifiers that a generator can be born from.

    Such a network reads images of one size, `image_size`, only.

    Args:
        hidden_sizes: width of each hidden layer.
        bias: of the linear layers: `none`, the `first` one alone (the network is then homogeneous in its weights), or
            `all`. Before a batch norm, which would cancel it, there is none.
        norm: `batch` after each hidden layer, or `none`.
        initial_scales: factors on the Kaiming weights that the layers start from, one for each, the classifier last;
            by default 1.

    `ConvNetConfig` has the other fields.

    Raises:
        ValueError: a field is outside its range, or there is not one initial scale for each layer.
    """

    model_type = "hfkd_mlp"

    norm: str = "none"
    hidden_sizes: Sequence[int] = (512, 512)
    bias: str = "all"
    initial_scales: Sequence[float] = ()

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.hidden_sizes = list(self.hidden_sizes)
        check_choice("norm", self.norm, MLP_NORMS)
        check_choice("bias", self.bias, BIASES)
        if not self.hidden_sizes or min(self.hidden_sizes) < 1:
            raise ValueError(f"hidden_sizes={self.hidden_sizes} must hold one or more widths, each at least 1")
        if self.bias == "first" and self.norm == "batch":
            raise ValueError("bias='first' with norm='batch': batch norm cancels it, so choose 'none' or 'all'")
        layers = len(self.hidden_sizes) + 1
        self.initial_scales = list(self.initial_scales) or [1.0] * layers
        if len(self.initial_scales) != layers or min(self.initial_scales) <= 0:
            raise ValueError(f"initial_scales={self.initial_scales} must be {layers} numbers above 0, one a layer")

    def has_bias(self, layer: int) -> bool:
        """Whether linear layer number `layer`, from 0, has a bias."""
        before_norm = self.norm == "batch" and layer < len(self.hidden_sizes)
        return not before_norm and (self.bias == "all" or (self.bias == "first" and layer == 0))


HfkdMlpConfig.register_for_auto_class("AutoConfig")
