"""Gradients as features (Mu, Liang, Li; ICLR 2020, arXiv 2004.05529): linear classifiers on activations and gradients.

The paper's symbols: F(x; theta, omega) = omega^T f_theta(x) is the base network with its classifier, theta_2 its top
layers, J(x) the Jacobian of f by theta_2. The classifier is (equation 2)

    g(x) = w1^T f(x) + b1 + omega^T J(x) w2

with omega and theta frozen, w1 on activations, and ONE w2, as large as theta_2, on gradients. J(x) w2 is a directional
derivative (equation 5): one forward pass carries a pair (value, tangent) from theta_2 upwards, and no gradient of any
image is ever built.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jacrev, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention, ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_gradient_features import HfkdGradientFeaturesConfig
from .linearization import NamedTree, layers_to_whiten, ntk_scale, remove_folded_norms, take_classifier_away
from .modeling_bigan_encoder import HfkdBiganEncoderForImageClassification
from .modeling_mlp import HfkdMlpForImageClassification
from .modeling_resnet import HfkdResNetForImageClassification
from .modeling_vae_encoder import HfkdVaeEncoderForImageClassification
from .modeling_wide_resnet import HfkdWideResNetForImageClassification
from .tangents import FastLayers


OWN_BASE_CLASSES = {
    model.config_class.model_type: model
    for model in (
        HfkdBiganEncoderForImageClassification,
        HfkdMlpForImageClassification,
        HfkdResNetForImageClassification,
        HfkdVaeEncoderForImageClassification,
        HfkdWideResNetForImageClassification,
    )
}


def build_classifier(config: PreTrainedConfig) -> PreTrainedModel:
    """An image classifier of this configuration, its weights fresh."""
    own = OWN_BASE_CLASSES.get(config.model_type)
    return own(config) if own else AutoModelForImageClassification.from_config(config)


@dataclass
class GradientFeaturesOutput(ModelOutput):
    """Attributes:
    pooler_output: f(x), (N, d), what the base's classifier would read.
    tangent: J(x) w2, (N, d); None in the modes without gradients.
    """

    pooler_output: torch.Tensor | None = None
    tangent: torch.Tensor | None = None


class GradientFeaturesPreTrainedModel(PreTrainedModel):
    """Weight initialisation and class facts."""

    config_class = HfkdGradientFeaturesConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """w2 is zero, so that training starts at the classifier on activations; heads are small random numbers."""
        if isinstance(module, HfkdGradientFeaturesForImageClassification):
            for name in ("omega", "activation_weight"):
                if getattr(module, name) is not None:
                    nn.init.normal_(getattr(module, name), std=self.config.feature_size**-0.5)
            for name in ("omega_bias", "activation_bias"):
                if getattr(module, name) is not None:
                    nn.init.zeros_(getattr(module, name))
        else:
            for parameter in module.parameters(recurse=False):
                nn.init.zeros_(parameter)


class HfkdGradientFeaturesModel(GradientFeaturesPreTrainedModel):
    """f(x) and J(x) w2 of a base network that stays in evaluation mode, whatever mode this module is in.

    Attributes:
        base: the network without its classifier; its `logits` are f(x). Frozen, but for theta_2 in `finetune`.
        gradient_base: the gradient branch's own network, where `config.separate_gradient_base`; else None.
        gradient_weights: w2 in raw coordinates, under the names of theta_2; None in the modes without gradients.
        whitening: P (C, C) by the name of its layer's weight, where `config.whiten`; else None. Identities at first.
    """

    def __init__(self, config: HfkdGradientFeaturesConfig) -> None:
        super().__init__(config)
        if not config.theta2:
            raise ValueError("theta2=[] names no parameter: build the model with hfkd.build_gradient_features")
        linearised = config.mode in ("gradient", "full")
        self.base = self.build_base(config)
        self.gradient_base = self.build_base(config) if linearised and config.separate_gradient_base else None
        theta2 = self.theta2()
        raw = {name: nn.Parameter(torch.zeros(parameter.shape)) for name, parameter in theta2.items()}
        self.gradient_weights = NamedTree(raw) if linearised else None
        widths = {name: theta2[name].shape[1] for name in self.whitened_layers()}
        self.whitening = NamedTree({name: torch.eye(width) for name, width in widths.items()}) if widths else None
        self.scales = {name: ntk_scale(parameter.shape, config.ntk) for name, parameter in theta2.items()}
        self.post_init()
        self.train(self.training)

    @staticmethod
    def build_base(config: HfkdGradientFeaturesConfig) -> PreTrainedModel:
        """The base without its classifier and without folded norms, its weights fresh."""
        base = build_classifier(config.base_config)
        take_classifier_away(base, config.classifier)
        remove_folded_norms(base, config.folded)
        return base

    def train(self, mode: bool = True) -> "HfkdGradientFeaturesModel":
        """Bases stay frozen, keep their running statistics and drop nothing: f is one fixed function (section 3.1).

        Only `finetune` trains theta_2. Done here, as `from_pretrained` ends with `eval()` and makes all weights
        trainable before.
        """
        super().train(mode)
        for base in (self.base, self.gradient_base):
            if base is not None:
                base.eval().requires_grad_(False)
        if self.config.mode == "finetune":
            for parameter in self.theta2().values():
                parameter.requires_grad_(True)
        return self

    @property
    def linearised_base(self) -> PreTrainedModel:
        """The network whose gradients are the features."""
        return self.base if self.gradient_base is None else self.gradient_base

    def theta2(self) -> dict[str, nn.Parameter]:
        """The linearised parameters at the point of linearisation, by name."""
        return {name: self.linearised_base.get_parameter(name) for name in self.config.theta2}

    def direction(self) -> dict[str, torch.Tensor]:
        """w2 in the base's own coordinates, by name."""
        if self.gradient_weights is None:
            raise ValueError(f"mode={self.config.mode!r} has no gradient weights")
        return self.in_base_coordinates(dict(self.gradient_weights.named_parameters()))

    def in_base_coordinates(self, raw: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What raw weights stand for: scale times raw weights, times P over input channels where they are whitened."""
        scaled = {name: self.scales[name] * weight for name, weight in raw.items()}
        if self.whitening is not None:
            for name, root in self.whitening.named_buffers():
                scaled[name] = torch.einsum("oi...,ij->oj...", scaled[name], root).to(raw[name].dtype)
        return scaled

    def whitened_layers(self) -> dict[str, Any]:
        """Layers of the linearised base whose inputs are whitened, by the name of their weight."""
        return layers_to_whiten(self.linearised_base, self.config.theta2) if self.config.whiten else {}

    def features_at(self, theta2: dict[str, torch.Tensor], pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """f(x) (N, d) of the linearised base with other values of theta_2, for `torch.func`."""
        inputs = {"pixel_values": pixel_values, "return_dict": True, **kwargs}
        return functional_call(self.linearised_base, theta2, kwargs=inputs).logits

    def features(self, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """f(x) (N, d) of the activation branch."""
        return self.base(pixel_values=pixel_values, return_dict=True, **kwargs).logits

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> GradientFeaturesOutput:
        """Features and tangents of `pixel_values` (N, C, H, W); the base gets what else it is given.

        Raises:
            ValueError: a part of the base was put into training mode.
        """
        bases = [base for base in (self.base, self.gradient_base) if base is not None]
        if any(module.training for base in bases for module in base.modules()):
            raise ValueError(
                "the base network is in training mode, where dropout and batch statistics change f: call .eval() on it"
            )
        if self.config.mode == "finetune":
            return GradientFeaturesOutput(pooler_output=self.features(pixel_values, **kwargs))
        with FastLayers():
            if self.gradient_weights is None:
                return GradientFeaturesOutput(pooler_output=self.features(pixel_values, **kwargs))
            # Fused attention has no forward-mode derivative; the math backend has.
            with sdpa_kernel(SDPBackend.MATH):
                primal, tangent = jvp(
                    lambda theta2: self.features_at(theta2, pixel_values, **kwargs),
                    (self.theta2(),),
                    (self.direction(),),
                )[:2]
            if self.gradient_base is not None and self.config.mode == "full":
                primal = self.features(pixel_values, **kwargs)
        return GradientFeaturesOutput(pooler_output=primal, tangent=tangent)


class HfkdGradientFeaturesForImageClassification(GradientFeaturesPreTrainedModel):
    """g(x) = w1^T f(x) + b1 + omega^T J(x) w2, or the part of it that `config.mode` names.

    Attributes:
        activation_weight, activation_bias: w1 (c, d) and b1 (c,), raw; None in `gradient`.
        omega, omega_bias: the frozen classifier of the target task on f, (c, d) and (c,); None in the modes without
            gradients. The bias is kept for the record: gradients do not see it.
    """

    omega: torch.Tensor | None
    omega_bias: torch.Tensor | None
    activation_weight: nn.Parameter | None
    activation_bias: nn.Parameter | None

    def __init__(self, config: HfkdGradientFeaturesConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.backbone = HfkdGradientFeaturesModel(config)
        shape = (config.num_labels, config.feature_size)
        has_activations, has_gradients = config.mode != "gradient", config.mode in ("gradient", "full")
        self.activation_weight = nn.Parameter(torch.zeros(shape)) if has_activations else None
        self.activation_bias = nn.Parameter(torch.zeros(shape[0])) if has_activations else None
        self.register_buffer("omega", torch.zeros(shape) if has_gradients else None)
        self.register_buffer("omega_bias", torch.zeros(shape[0]) if has_gradients else None)
        head = config.ntk if config.ntk_head else "none"
        self.weight_scale, self.bias_scale = ntk_scale(shape, head), ntk_scale(shape[:1], head)
        self.post_init()

    @torch.no_grad()
    def start_from(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """The state before training: omega and w1 are this classifier on f, w2 is zero (paper, section 3.1).

        Args:
            weight: (c, d). bias: (c,).
        """
        for buffer, value in ((self.omega, weight), (self.omega_bias, bias)):
            if buffer is not None:
                buffer.copy_(value)  # a copy: the authors' code shares memory, so that omega follows w1 on a CPU
        if self.activation_weight is not None and self.activation_bias is not None:
            self.activation_weight.copy_(weight / self.weight_scale)
            self.activation_bias.copy_(bias / self.bias_scale)
        if self.backbone.gradient_weights is not None:
            for parameter in self.backbone.gradient_weights.parameters():
                parameter.zero_()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutputWithNoAttention:
        """Logits (N, c) of `pixel_values` (N, C, H, W), and with `labels` the mean loss.

        Integer labels (N,) give the cross-entropy, float labels (N, c) the binary cross-entropy with logits, unless
        `config.problem_type` says otherwise.

        Raises:
            ValueError: a part of the base was put into training mode.
        """
        features = self.backbone(pixel_values, return_dict=True, **kwargs)
        logits = self.logits_of(features.pooler_output, features.tangent)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)

    def logits_of(self, feature: torch.Tensor, tangent: torch.Tensor | None) -> torch.Tensor:
        """Equation 2 from f (N, d) and J w2 (N, d); without autocast, logits are of the parameters' precision."""
        terms = []
        with torch.autocast(feature.device.type, enabled=False):
            if self.activation_weight is not None and self.activation_bias is not None:
                weight, bias = self.weight_scale * self.activation_weight, self.bias_scale * self.activation_bias
                terms.append(F.linear(feature.to(weight.dtype), weight, bias))
            if self.omega is not None and tangent is not None:
                terms.append(F.linear(tangent.to(self.omega.dtype), self.omega))
            return sum(terms[1:], terms[0])

    # -- for small networks: what the directional derivative avoids --------------------------------------------------

    def explicit_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """G(x) = omega^T J(x), every gradient of every logit: (N, c, |theta_2|), in raw coordinates.

        For tests and tiny networks: memory grows with N * c * |theta_2|. The order is that of
        `backbone.gradient_weights.parameters()`.
        """
        if self.omega is None:
            raise ValueError(f"mode={self.config.mode!r} has no gradient features")
        backbone, omega = self.backbone, self.omega
        theta2 = {name: parameter.detach() for name, parameter in backbone.theta2().items()}

        def logits(raw: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
            steps = backbone.in_base_coordinates(raw)
            moved = {name: theta2[name] + steps[name] for name in theta2}
            return F.linear(backbone.features_at(moved, image[None])[0], omega)

        zeros = {name: torch.zeros_like(value) for name, value in theta2.items()}
        with sdpa_kernel(SDPBackend.MATH):
            rows = [jacrev(logits)(zeros, image) for image in pixel_values]
        return torch.stack([torch.cat([row[name].flatten(1) for name in theta2], dim=1) for row in rows])

    def ntk_matrix(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The kernel K_ij = Tr(G(x_i) G(x_j)^T) of the images, (N, N). For small networks, as `explicit_features`."""
        gradients = self.explicit_features(pixel_values).flatten(1)
        return gradients @ gradients.T


HfkdGradientFeaturesModel.register_for_auto_class("AutoModel")
HfkdGradientFeaturesForImageClassification.register_for_auto_class("AutoModelForImageClassification")
