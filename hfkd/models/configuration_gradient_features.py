"""Configuration of linear classifiers on activations and gradients of a base network."""

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .configuration_bigan_encoder import HfkdBiganEncoderConfig
from .configuration_convnet import check_choice, full_auto_map
from .configuration_mlp import HfkdMlpConfig
from .configuration_resnet import HfkdResNetConfig
from .configuration_vae_encoder import HfkdVaeEncoderConfig
from .configuration_wide_resnet import HfkdWideResNetConfig


MODES = ("activation", "gradient", "full", "finetune")
NTK_SCALES = ("fan_out", "fan_in", "none")

# Bases of this package's own: where it is not installed, transformers does not know their model types.
OWN_BASES = {
    config.model_type: config
    for config in (HfkdBiganEncoderConfig, HfkdMlpConfig, HfkdResNetConfig, HfkdVaeEncoderConfig, HfkdWideResNetConfig)
}


def base_config_from(content: dict[str, Any]) -> PreTrainedConfig:
    """The configuration that `content`, a configuration's `to_dict()`, describes."""
    settings = {key: value for key, value in content.items() if key not in ("model_type", "auto_map")}
    if content["model_type"] in OWN_BASES:
        return OWN_BASES[content["model_type"]](**settings)
    return AutoConfig.for_model(content["model_type"], **settings)


class HfkdGradientFeaturesConfig(PreTrainedConfig):
    """A base network, the part of it that is linearised, and how (Mu, Liang, Li; ICLR 2020, arXiv 2004.05529).

    `hfkd.build_gradient_features` fills this in from a base network; few will write it by hand.

    Args:
        base_config: configuration of the base, an image classifier whose last linear layer is taken away.
        classifier: name of that layer in the base.
        feature_size: d, the size of the feature f(x) that it read.
        theta2: names of the base's parameters that are linearised (theta_2), after folding.
        folded: (convolution, batch norm) pairs, by name, where the norm is folded into the convolution.
        mode: `full` (activations and gradients), `activation`, `gradient`, or `finetune` (theta_2 itself is trained).
        ntk: scale of the raw weights, by `fan_out` (the authors' code), `fan_in`, or `none`. It says what the saved
            weights mean: a trained model under another scale is another function.
        ntk_head: whether w1 and b1 are scaled too (in the authors' code they are, the paper speaks of theta_2 only).
        whiten: whether raw weights on gradients are those of whitened layer inputs (ours; `hfkd.models.whitening`).
        separate_gradient_base: whether the gradient branch has a base of its own (the paper's ablation).

    Raises:
        ValueError: a field is outside its choices.
    """

    model_type = "hfkd_gradient_features"
    sub_configs = {"base_config": AutoConfig}

    base_config: dict[str, Any] | PreTrainedConfig | None = None
    classifier: str = "classifier"
    feature_size: int = 64
    theta2: Sequence[str] = ()
    folded: Sequence[Sequence[str]] = ()
    mode: str = "full"
    ntk: str = "fan_out"
    ntk_head: bool = True
    whiten: bool = False
    separate_gradient_base: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        # Before the rest: transformers sets the attention of sub-configurations there.
        if self.base_config is None:
            self.base_config = HfkdResNetConfig()
        elif isinstance(self.base_config, dict):
            self.base_config = base_config_from(self.base_config)
        super().__post_init__(**kwargs)
        self.theta2 = list(self.theta2)
        self.folded = [list(pair) for pair in self.folded]
        check_choice("mode", self.mode, MODES)
        check_choice("ntk", self.ntk, NTK_SCALES)
        if self.whiten and self.mode not in ("full", "gradient"):
            raise ValueError(
                f"whiten=True has no effect with mode={self.mode!r}, which has no gradients: leave it out"
            )
        self.auto_map = full_auto_map(type(self))

    # Processors, probes and pipelines read the images' shape here.
    @property
    def image_size(self) -> Any:
        """Side of the base's images in pixels, where its configuration says one."""
        return getattr(self.base_config, "image_size", None)

    @property
    def num_channels(self) -> int:
        """Channels of the base's images."""
        return getattr(self.base_config, "num_channels", 3)


HfkdGradientFeaturesConfig.register_for_auto_class("AutoConfig")
