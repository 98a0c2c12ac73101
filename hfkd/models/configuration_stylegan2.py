"""What the configurations of StyleGAN2's generator and discriminator share."""

from typing import Any

from transformers import PreTrainedConfig


class StyleGan2Config(PreTrainedConfig):
    """Sizes that both networks have.

    Args:
        image_size: side of the images in pixels, a power of two from 4 on.
        num_channels: channels of the images.
        channel_base: channels of the maps of r x r positions are min(channel_base / r, channel_max).
        channel_max: most channels that a map has.
        num_classes: classes whose number (as one-hot) is given beside latents or images, 0 for none. `id2label` has
            their names.
        mapping_layers: fully connected layers of the mapping network; a discriminator without classes has none.
        conv_clamp: largest magnitude after a convolution (a measure of StyleGAN2-ADA against overflow in float16), or
            None.

    Raises:
        ValueError: a field is outside its range, or `id2label` has other than `num_classes` names.
    """

    image_size: int = 32
    num_channels: int = 3
    channel_base: int = 32768
    channel_max: int = 512
    num_classes: int = 0
    mapping_layers: int = 8
    conv_clamp: float | None = 256.0

    def __post_init__(self, **kwargs: Any) -> None:
        named = self.id2label is not None or "num_labels" in kwargs
        super().__post_init__(**kwargs)
        size = self.image_size
        if size < 4 or size & (size - 1):
            raise ValueError(f"image_size={size} must be a power of two from 4 on: resize the images")
        for name in ("num_channels", "channel_max", "mapping_layers"):
            self._check_least(name, 1)
        self._check_least("num_classes", 0)
        self._check_least("channel_base", size)
        if self.conv_clamp is not None and self.conv_clamp <= 0:
            raise ValueError(f"conv_clamp={self.conv_clamp} must be above 0, or None")
        if self.num_classes:
            self._name_classes(named)

    def _name_classes(self, named: bool) -> None:
        """Classes without names are LABEL_0 and so on; without being asked, transformers has two of them."""
        names: Any = self
        if named and names.num_labels != self.num_classes:
            raise ValueError(
                f"num_classes={self.num_classes} and the {names.num_labels} names of id2label do not fit each other"
            )
        if names.num_labels != self.num_classes:
            names.num_labels = self.num_classes

    def _check_least(self, name: str, least: int) -> None:
        if getattr(self, name) < least:
            raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")

    @property
    def resolutions(self) -> list[int]:
        """Sides of the maps, from 4 up to `image_size`."""
        return [2**power for power in range(2, self.image_size.bit_length())]

    def channels(self, resolution: int) -> int:
        """Channels of the maps with this side."""
        return min(self.channel_base // resolution, self.channel_max)
