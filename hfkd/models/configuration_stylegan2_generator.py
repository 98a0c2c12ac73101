"""Configuration of StyleGAN2's generator."""

from typing import Any

from .configuration_stylegan2 import StyleGan2Config


class HfkdStyleGan2GeneratorConfig(StyleGan2Config):
    """StyleGAN2's generator with skip connections (Karras et al., CVPR 2020, arXiv 1912.04958).

    Args:
        latent_size: numbers that an image is made of.
        w_dim: width of the intermediate latents, which the mapping network makes of the latents.

    Further arguments and errors are those of `StyleGan2Config`.
    """

    model_type = "hfkd_stylegan2_generator"

    latent_size: int = 512
    w_dim: int = 512

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("latent_size", "w_dim"):
            self._check_least(name, 1)
        self.auto_map = {
            "AutoConfig": "configuration_stylegan2_generator.HfkdStyleGan2GeneratorConfig",
            "AutoModel": "modeling_stylegan2_generator.HfkdStyleGan2GeneratorModel",
        }

    @property
    def num_ws(self) -> int:
        """Intermediate latents that an image takes: one for each convolution, and one for the last colours."""
        return 2 * len(self.resolutions)

    @property
    def noise_size(self) -> int:
        """Positions of all maps that noise is added to: one map of 4x4, and two of each larger side."""
        return 2 * sum(resolution**2 for resolution in self.resolutions) - 4**2

    @classmethod
    def cifar(cls, **settings: Any) -> "HfkdStyleGan2GeneratorConfig":
        """StyleGAN2-ADA's for CIFAR (arXiv 2006.06676): 32x32 pixels, two mapping layers; `settings` go over them."""
        return cls(**{"image_size": 32, "mapping_layers": 2, **settings})


HfkdStyleGan2GeneratorConfig.register_for_auto_class("AutoConfig")
