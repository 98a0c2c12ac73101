"""Configuration of the wide residual networks of Zagoruyko and Komodakis."""

from typing import Any

from .configuration_convnet import ConvNetConfig


class HfkdWideResNetConfig(ConvNetConfig):
    """Pre-activation wide residual network WRN-d-k (Zagoruyko and Komodakis, BMVC 2016, arXiv 1605.07146).

    Args:
        depth: d = 6n + 4 layers, n blocks in each of three stages.
        widen_factor: k; the stages have 16k, 32k and 64k channels.

    `ConvNetConfig` has the other fields.

    Raises:
        ValueError: `depth` is not 6n + 4, `widen_factor` is below 1, or a common field is outside its choices.
    """

    model_type = "hfkd_wide_resnet"

    depth: int = 16
    widen_factor: int = 2

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.depth < 10 or self.depth % 6 != 4:
            raise ValueError(f"depth={self.depth} is not 6n + 4 with n >= 1: use 10, 16, 22, 28, 34 or 40")
        if self.widen_factor < 1:
            raise ValueError(f"widen_factor={self.widen_factor} is below 1: use 1, 2, 4, ...")

    @property
    def hidden_sizes(self) -> list[int]:
        """Output channels of each stage."""
        return [16 * self.widen_factor, 32 * self.widen_factor, 64 * self.widen_factor]

    @property
    def depths(self) -> list[int]:
        """Blocks in each stage."""
        return [(self.depth - 4) // 6] * 3


HfkdWideResNetConfig.register_for_auto_class("AutoConfig")
