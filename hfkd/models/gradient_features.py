"""From a base network to a classifier on its activations and gradients: what is linearised, folded and refused."""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hfkd.errors import InputError
from hfkd.models.adapter import PROBE_SIZE, find_classifier, find_top_blocks
from hfkd.models.configuration_gradient_features import OWN_BASES, HfkdGradientFeaturesConfig
from hfkd.models.folding import find_foldable, folded_state
from hfkd.models.modeling_gradient_features import (
    HfkdGradientFeaturesForImageClassification,
    HfkdGradientFeaturesModel,
    build_classifier,
)
from hfkd.models.probing import image_errors, one_line, probe_pixels, undisturbed


# Learned tokens and positions are inputs, not layers.
NEVER_LINEARISED = (
    "cls_token",
    "distillation_token",
    "mask_token",
    "register_tokens",
    "position_embeddings",
    "pos_embed",
)


@torch.inference_mode(False)
@torch.enable_grad()
def build_gradient_features(
    base: PreTrainedModel,
    theta2: int | str | Sequence[str] = 1,
    *,
    class_names: Sequence[str],
    mode: str = "full",
    ntk: str | None = None,
    ntk_head: bool = True,
    whiten: bool = False,
    fold_batch_norm: bool = True,
    gradient_base: PreTrainedModel | None = None,
) -> HfkdGradientFeaturesForImageClassification:
    """A linear classifier on the activations and gradients of `base`, whose weights are copied.

    It starts from small random weights: give `start_from` a classifier that fits the target task (the paper's omega),
    as `GradientFeaturesTrainer` does.

    Args:
        base: an image classifier, or a backbone that has a classifier class; its own classifier is dropped.
        theta2: what is linearised: the last `k` blocks, or names of modules or parameters (`*` and `?` as in files).
        class_names: of the target task, in the order of the label ids.
        mode: `full`, `activation`, `gradient` or `finetune`.
        ntk: scale of the raw weights: `fan_out`, `fan_in` or `none`. By default, as in the authors' code, `fan_out`
            where there are gradients, and `none` in the modes `activation` and `finetune`.
        ntk_head: whether w1 and b1 are scaled too.
        whiten: raw weights on gradients are those of whitened layer inputs (ours), which spans the same functions and
            needs far fewer updates; `GradientFeaturesTrainer` measures the inputs when it fits omega.
        fold_batch_norm: fold batch norms into the convolutions before them (paper, section 3.3). A norm that is not
            folded is linearised like any layer.
        gradient_base: a network of the same architecture for the gradient branch alone (the paper's ablation).

    Raises:
        InputError: a base that is no image classifier, has third-party remote code or operations without a
            forward-mode derivative; names that match nothing or overlap; a gradient base of another architecture.
    """
    names = _checked_names(class_names)
    classifier = as_classifier(base)
    last = find_classifier(classifier)
    channels = getattr(classifier.config, "num_channels", 3)
    pixels = probe_pixels(classifier, getattr(classifier.config, "image_size", None) or PROBE_SIZE, channels)
    with undisturbed(classifier), image_errors(classifier, pixels):
        folded = find_foldable(classifier, pixels) if fold_batch_norm else []
    config = HfkdGradientFeaturesConfig(
        base_config={**classifier.config.to_dict(), "_name_or_path": ""},
        classifier=next(name for name, module in classifier.named_modules() if module is last),
        feature_size=last.in_features,
        folded=folded,
        mode=mode,
        ntk=ntk or ("fan_out" if mode in ("full", "gradient") else "none"),
        ntk_head=ntk_head,
        whiten=whiten,
        separate_gradient_base=gradient_base is not None,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
    # `to_dict` leaves it out.
    config._attn_implementation = {"base_config": classifier.config._attn_implementation}
    config.theta2 = select_theta2(_parameter_names(config), _wanted(classifier, theta2))
    with torch.random.fork_rng(devices=[]):
        model = HfkdGradientFeaturesForImageClassification(config)
    if whiten and model.backbone.whitening is None:
        raise InputError("whiten=True, but theta2 has no linear layer or ungrouped convolution: leave whiten out")
    model.to(dtype=pixels.dtype, device=pixels.device).eval()
    _copy_weights(classifier, model.backbone.base, config, pixels)
    if gradient_base is not None and model.backbone.gradient_base is not None:
        other = as_classifier(gradient_base)
        if _architecture(other, config) != _architecture(classifier, config):
            raise InputError(f"gradient_base is a {type(other).__name__} of another architecture than the base")
        _copy_weights(other, model.backbone.gradient_base, config, pixels)
    _check_derivatives(model, pixels)
    model.config._name_or_path = getattr(base.config, "_name_or_path", "")
    return model


def _checked_names(class_names: Sequence[str]) -> list[str]:
    names = [str(name) for name in class_names]
    if len(set(names)) != len(names) or len(names) < 2:
        raise InputError(f"class_names has {len(names)} names: a classifier needs two or more different ones")
    return names


def _wanted(classifier: PreTrainedModel, theta2: int | str | Sequence[str]) -> Sequence[str]:
    """Names of modules or parameters, from these or from a number of blocks."""
    if isinstance(theta2, str):
        return [theta2]
    if isinstance(theta2, Integral):
        return [name for name, _ in find_top_blocks(classifier, int(theta2))]
    return theta2  # type: ignore[return-value]  # mypy takes an int for no Integral


def as_classifier(base: PreTrainedModel) -> PreTrainedModel:
    """`base` itself if it is an image classifier, else the classifier of its family with the weights of `base`.

    Raises:
        InputError: it has third-party remote code, or no classifier.
    """
    config = base.config
    if config.model_type not in OWN_BASES and (base.is_remote_code() or config.model_type not in CONFIG_MAPPING):
        raise InputError(
            f"{type(base).__name__} is third-party remote code, which a saved model cannot carry along: use a network "
            "of transformers or of hfkd"
        )
    if getattr(base, "base_model", base) is not base:
        return base
    if config.model_type not in OWN_BASES and type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise InputError(f"{type(base).__name__} has no image classifier: use a base that has one")
    with torch.random.fork_rng(devices=[]):
        classifier = build_classifier(config).to(base.device, base.dtype)
    missing = classifier.base_model.load_state_dict(base.state_dict(), strict=False).missing_keys
    if missing:
        raise InputError(f"{type(base).__name__} lacks {', '.join(missing[:3])}, which its classifier needs")
    return classifier


def select_theta2(parameters: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The names among `parameters` that `wanted` (modules, parameters or patterns of them) names, in their order.

    Learned tokens and positions are never selected.

    Raises:
        InputError: an item that matches nothing, or two that overlap.
    """
    chosen: dict[str, str] = {}
    for item in wanted:
        matched = [
            name
            for name in parameters
            if fnmatchcase(name, item) or fnmatchcase(name, f"{item}.*")
            if name.rpartition(".")[2] not in NEVER_LINEARISED
        ]
        if not matched:
            raise InputError(f"theta2: {item!r} names no parameter of the base; the last one is {parameters[-1]!r}")
        for name in matched:
            if name in chosen:
                raise InputError(f"theta2: {chosen[name]!r} and {item!r} overlap in {name!r}: name each part once")
            chosen[name] = item
    if not chosen:
        raise InputError("theta2 is empty: name the layers to linearise, or give a number of blocks")
    return [name for name in parameters if name in chosen]


def _parameter_names(config: HfkdGradientFeaturesConfig) -> list[str]:
    """Of the base as it will be: without its classifier and without folded norms."""
    with torch.device("meta"):
        return [name for name, _ in HfkdGradientFeaturesModel.build_base(config).named_parameters()]


def _copy_weights(
    source: PreTrainedModel, target: nn.Module, config: HfkdGradientFeaturesConfig, pixels: torch.Tensor
) -> None:
    """Weights of a base into the network that was built anew from its configuration, and proof that f is the same."""
    state = folded_state(source, config.folded)
    target.load_state_dict({n: value for n, value in state.items() if not n.startswith(f"{config.classifier}.")})
    seen: list[torch.Tensor] = []
    hook = source.get_submodule(config.classifier).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        with undisturbed(source), sdpa_kernel(SDPBackend.MATH):
            source(pixel_values=pixels, return_dict=True)
            ours = target(pixel_values=pixels, return_dict=True).logits
    finally:
        hook.remove()
    if (ours - seen[0]).abs().max() > math.sqrt(torch.finfo(ours.dtype).eps) * seen[0].abs().max():
        raise InputError(
            f"{type(source).__name__} computes other features than a network of its configuration, so it was changed "
            "in code: use it as its configuration says it is"
        )


def _architecture(network: PreTrainedModel, config: HfkdGradientFeaturesConfig) -> dict[str, torch.Size]:
    """Shapes by name, without the classifier."""
    state = network.state_dict()
    return {name: v.shape for name, v in state.items() if not name.startswith(f"{config.classifier}.")}


def _check_derivatives(model: HfkdGradientFeaturesForImageClassification, pixels: torch.Tensor) -> None:
    """Whether J w2 can be computed, and its gradient by w2: a `no_grad` inside the base gives the first alone.

    The derivative is linear in w2, so with g the gradient of u^T J w2 by w2, u^T J w2 = <g, w2>.
    """
    weights = model.backbone.gradient_weights
    if weights is None:
        return
    generator = torch.Generator().manual_seed(0)
    parameters = list(weights.parameters())
    drawn = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, drawn, strict=True):
            parameter.copy_(value)
    try:
        tangent = model.backbone(pixels).tangent
    except (NotImplementedError, RuntimeError) as error:
        raise InputError(
            f"{type(model.backbone.base).__name__} has an operation without a forward-mode derivative "
            f"({one_line(error)[:160]}): load it with attn_implementation='eager', or choose another base"
        ) from error
    with torch.no_grad():
        largest = model.backbone.linearised_base(pixel_values=pixels, return_dict=True).logits.abs().max()
        if tangent.abs().max() <= torch.finfo(tangent.dtype).eps * largest:
            raise InputError("theta2 has no effect on the features: name layers that have one")
    u = torch.randn(tangent.shape, generator=generator).to(tangent)
    value = (u * tangent).sum()
    gradients: Any = [None] * len(parameters)
    if value.requires_grad:
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
        product = sum(float((g * w).sum()) for g, w in zip(gradients, drawn, strict=True) if g is not None)
        size = float((u * tangent).abs().sum())
    if abs(product - float(value.detach())) > 1e-2 * size:
        raise InputError(
            f"{type(model.backbone.base).__name__} detaches a part of its forward pass, so its gradient features "
            "cannot be trained: choose blocks above it, or another base"
        )
