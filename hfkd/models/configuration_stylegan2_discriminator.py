"""Configuration of StyleGAN2's discriminator."""

from typing import Any

from .configuration_convnet import check_choice
from .configuration_stylegan2 import StyleGan2Config


ARCHITECTURES = ("resnet", "orig")
FEATURES = ("single", "multi")


class HfkdStyleGan2DiscriminatorConfig(StyleGan2Config):
    """StyleGAN2's discriminator (Karras et al., CVPR 2020, arXiv 1912.04958).

    Args:
        architecture: `resnet` has a shortcut around each block, `orig` has none.
        mbstd_group_size: images whose standard deviation the last block sees, or None for the whole batch. Groups are
            of equal size: the largest number up to this one that divides the batch. Logits and features of an image
            therefore depend on its group: 4 is for training; the squeeze-and-span paper's probes of discriminators
            (arXiv 2211.03000) have the whole batch; 1 makes each image count by itself.
        features: what `pooler_output` is: `single`, the last hidden layer; or `multi`, before it the mean over
            positions of each block's map, as in the squeeze-and-span paper's comparison.

    Further arguments and errors are those of `StyleGan2Config`; images smaller than 8x8 pixels and unknown choices
    raise `ValueError` too.
    """

    model_type = "hfkd_stylegan2_discriminator"

    architecture: str = "resnet"
    mbstd_group_size: int | None = 4
    features: str = "single"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self._check_least("image_size", 8)
        check_choice("architecture", self.architecture, ARCHITECTURES)
        check_choice("features", self.features, FEATURES)
        if self.mbstd_group_size is not None:
            self._check_least("mbstd_group_size", 1)
        self.auto_map = {
            "AutoConfig": "configuration_stylegan2_discriminator.HfkdStyleGan2DiscriminatorConfig",
            "AutoModel": "modeling_stylegan2_discriminator.HfkdStyleGan2DiscriminatorModel",
        }

    @classmethod
    def cifar(cls, **settings: Any) -> "HfkdStyleGan2DiscriminatorConfig":
        """StyleGAN2-ADA's for CIFAR (arXiv 2006.06676): 32x32 pixels, no shortcuts, groups of 32."""
        return cls(**{"image_size": 32, "architecture": "orig", "mbstd_group_size": 32, **settings})


HfkdStyleGan2DiscriminatorConfig.register_for_auto_class("AutoConfig")
