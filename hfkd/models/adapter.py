"""One view of any transformers image classifier: feature map, pooled feature, logits, head and blocks.

Nothing here asks for a class of this package: a model loaded as remote code is an instance of another class of the
same name. What is asked for is structure: a base model whose first output is a feature map or a sequence of tokens,
and one linear layer outside it with as many outputs as there are labels.
"""

import math
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from hfkd.errors import InputError
from hfkd.models.probing import ImageSize, image_errors, probe_pixels, undisturbed


Tap = Literal["post_activation", "pre_activation"]

# Names that transformers gives to the learned tokens in front of the patches.
SPECIAL_TOKENS = ("cls_token", "distillation_token", "register_tokens")
# Names of the lists that hold blocks inside a stage; a block's own lists have other names (layer, branch, ...).
STAGE_LISTS = ("layers", "blocks")
ACTIVATION_LIBRARIES = ("torch.nn.modules.activation", "transformers.activations")
PROBE_SIZE = 64


class ClassifierFeatures(NamedTuple):
    """What one forward pass gives, gradients intact.

    Attributes:
        feature_map: (N, C, H, W), at the tap.
        pooled: (N, C'), what the last linear layer reads (in training after its dropout, if it has one).
        logits: (N, K).
    """

    feature_map: torch.Tensor
    pooled: torch.Tensor
    logits: torch.Tensor


class _FirstToken(nn.Module):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[:, 0]


class _MeanToken(nn.Module):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.mean(dim=1)


class ClassifierAdapter:
    """Feature map, pooled feature and logits of an image classifier, and the names of its parts.

    The tap is what the head consumes: the last ReLU's output in a ResNet or wide ResNet, the last 1x1 convolution with
    norm and activation in MobileNetV2, the last stage's output in ConvNeXt, the final-normed patch tokens, laid out as
    a map, in ViT (whose logits come from the class token). The adapter adds no parameter, buffer or lasting hook.

    Args:
        model: any transformers image classifier.
        tap: `post_activation`, or `pre_activation` for the input of the activation whose output is the tap.

    Attributes:
        classifier: the last linear layer, whose outputs are the logits.
        head: everything after the tap, from the model's own modules. It maps the tap to logits: the feature map
            (N, C, H, W), or where the model has tokens the sequence (N, T, C) with its special tokens.

    Raises:
        InputError: the model has no feature map, linear classifier or (for `pre_activation`) final activation to be
            found, or its logits are not a function of the tap.
    """

    def __init__(self, model: PreTrainedModel, tap: Tap = "post_activation") -> None:
        if tap not in get_args(Tap):
            raise InputError(f"tap {tap!r} is unknown: use one of {', '.join(get_args(Tap))}")
        self.model = model
        self._backbone = _find_backbone(model)
        self.classifier = _find_classifier(model, self._backbone)
        self._special_tokens = _count_special_tokens(self._backbone)
        self._activation: nn.Module | None = None
        pixels = self._probe_pixels(getattr(model.config, "image_size", None) or PROBE_SIZE)
        with undisturbed(model):
            with image_errors(model, pixels):
                if tap == "pre_activation":
                    self._activation = self._find_activation(pixels)
                raw, features = self._run(pixels)
            self.head = self._build_head(raw)
            self._check_head(raw, features.logits)

    def __call__(self, pixel_values: torch.Tensor) -> ClassifierFeatures:
        """Features of `pixel_values` (N, C, H, W) from one forward pass of the model."""
        return self._run(pixel_values)[1]

    def head_parameters(self) -> list[nn.Parameter]:
        """Parameters after the tap."""
        return list(self.head.parameters())

    def backbone_parameters(self) -> list[nn.Parameter]:
        """All other parameters of the model."""
        head = {id(parameter) for parameter in self.head.parameters()}
        return [parameter for parameter in self.model.parameters() if id(parameter) not in head]

    def top_blocks(self, k: int) -> list[tuple[str, nn.Module]]:
        """The last `k` residual or transformer blocks, as (qualified name in the model, module), in execution order.

        Raises:
            InputError: `k` is below 1 or above the number of blocks.
        """
        return find_top_blocks(self.model, k)

    def feature_shape(self, image_size: ImageSize) -> tuple[int, int, int]:
        """(C, H, W) of the feature map for images of `image_size` pixels, a side or (height, width).

        Raises:
            InputError: the model cannot take images of that size.
        """
        pixels = self._probe_pixels(image_size)
        with undisturbed(self.model), image_errors(self.model, pixels):
            _, channels, height, width = self._run(pixels)[1].feature_map.shape
        return channels, height, width

    def _probe_pixels(self, image_size: ImageSize) -> torch.Tensor:
        return probe_pixels(self.model, image_size, getattr(self.model.config, "num_channels", 3))

    def _run(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ClassifierFeatures]:
        """The tap as the model lays it out, and the features. Hooks live for this call only."""
        seen: dict[str, torch.Tensor] = {}

        def keep_output(module: nn.Module, args: Any, output: Any) -> None:
            seen["tap"] = output[0]

        def keep_pooled(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen["pooled"] = args[0]

        def keep_preactivation(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen["preactivation"] = args[0]

        with ExitStack() as stack:
            stack.callback(self._backbone.register_forward_hook(keep_output).remove)
            stack.callback(self.classifier.register_forward_pre_hook(keep_pooled).remove)
            if self._activation is not None:
                stack.callback(self._activation.register_forward_pre_hook(keep_preactivation).remove)
            logits = self.model(pixel_values=pixel_values, return_dict=True).logits
        raw = seen.get("preactivation", seen["tap"])
        return raw, ClassifierFeatures(self._as_map(raw, pixel_values), seen["pooled"], logits)

    def _as_map(self, raw: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) from a map or from tokens (N, T, C), whose patches cover the image row by row."""
        if raw.ndim == 4:
            return raw
        if raw.ndim != 3:
            raise InputError(
                f"{type(self._backbone).__name__} has no feature map: its first output has shape {tuple(raw.shape)}, "
                "not (N, C, H, W) or (N, tokens, C)"
            )
        patches = raw[:, self._special_tokens :]
        count, (image_height, image_width) = patches.shape[1], pixel_values.shape[2:]
        height = round(math.sqrt(count * image_height / image_width))
        if height == 0 or count % height:
            raise InputError(
                f"{type(self._backbone).__name__} gives {count} patch tokens for {image_height}x{image_width} pixels, "
                f"which form no grid: has it special tokens other than {', '.join(SPECIAL_TOKENS)}?"
            )
        return patches.transpose(1, 2).reshape(len(raw), -1, height, count // height)

    def _find_activation(self, pixels: torch.Tensor) -> nn.Module:
        """The activation module whose output is the tap."""
        calls: dict[nn.Module, tuple[Any, Any]] = {}
        with ExitStack() as stack:
            for module in self._backbone.modules():
                if type(module).__module__ in ACTIVATION_LIBRARIES:
                    hook = module.register_forward_hook(lambda m, args, output: calls.update({m: (args[0], output)}))
                    stack.callback(hook.remove)
            tap, _ = self._run(pixels)
        for module, (before, after) in calls.items():
            if after is tap:
                if before is after:
                    raise InputError(
                        f"{type(self.model).__name__} overwrites its pre-activation: use tap='post_activation'"
                    )
                return module
        raise InputError(
            f"{type(self.model).__name__} has no activation right before its feature map: use tap='post_activation'"
        )

    def _build_head(self, raw: torch.Tensor) -> nn.Sequential:
        head = nn.Sequential() if self._activation is None else nn.Sequential(self._activation)
        if raw.ndim == 4:
            head.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten())
            # ConvNeXt's norm of the pooled feature. Before a token tap, the same name is that tap's own norm.
            if isinstance(norm := getattr(self._backbone, "layernorm", None), nn.Module):
                head.append(norm)
        else:
            head.append(_FirstToken() if self._special_tokens else _MeanToken())
        for child in self.model.children():
            if child is not self._backbone:
                head.append(child)
        return head

    def _check_head(self, raw: torch.Tensor, logits: torch.Tensor) -> None:
        """Of a model put together otherwise, the split into head and backbone would be silently wrong."""
        try:
            error = (self.head(raw) - logits).abs().max()
        except RuntimeError:  # shapes that do not fit: a head of another make
            error = torch.tensor(math.inf)
        if error > math.sqrt(torch.finfo(logits.dtype).eps) * logits.abs().max():
            raise InputError(
                f"{type(self.model).__name__} has no head to be found: its logits are not its last layers on pooled "
                "features of its base model"
            )


def find_classifier(model: PreTrainedModel) -> nn.Linear:
    """The last linear layer of an image classifier, whose outputs are the logits.

    Raises:
        InputError: there is no base model inside it, or not exactly one such layer outside.
    """
    return _find_classifier(model, _find_backbone(model))


def find_top_blocks(model: PreTrainedModel, k: int) -> list[tuple[str, nn.Module]]:
    """The last `k` residual or transformer blocks, as (qualified name in the model, module), in execution order.

    Raises:
        InputError: `k` is below 1 or above the number of blocks.
    """
    blocks = find_blocks(model)
    if not 1 <= k <= len(blocks):
        raise InputError(f"k={k} top blocks of {type(model).__name__}: use 1 to {len(blocks)}")
    return blocks[-k:]


def find_blocks(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """All residual or transformer blocks, as (qualified name in the model, module), in execution order."""
    backbone = _find_backbone(model)
    prefix = next(name for name, module in model.named_modules() if module is backbone)
    return _find_blocks(prefix, backbone)


def _find_backbone(model: PreTrainedModel) -> nn.Module:
    backbone = getattr(model, "base_model", model)
    if backbone is model:
        raise InputError(
            f"{type(model).__name__} has no base model inside it, so no feature map is found: "
            "load it with AutoModelForImageClassification"
        )
    return backbone


def _find_classifier(model: PreTrainedModel, backbone: nn.Module) -> nn.Linear:
    """The one linear layer outside the backbone with an output for each label."""
    inside = set(backbone.modules())
    linears = [module for module in model.modules() if isinstance(module, nn.Linear) and module not in inside]
    classifiers = [linear for linear in linears if linear.out_features == model.config.num_labels]
    if len(classifiers) != 1:
        raise InputError(
            f"{type(model).__name__} has {len(classifiers)} linear layers with num_labels={model.config.num_labels} "
            "outputs outside its base model, so no logits layer is found: exactly one is needed"
        )
    return classifiers[0]


def _count_special_tokens(backbone: nn.Module) -> int:
    """Tokens before the patches; each such parameter has shape (1, tokens, C)."""
    return sum(
        parameter.shape[1]
        for name, parameter in backbone.named_parameters()
        if name.rsplit(".", 1)[-1] in SPECIAL_TOKENS
    )


def _find_blocks(prefix: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Blocks below `module` by the conventions of transformers: members of its lists, or of the lists of a stage."""
    blocks = []
    for name, child in module.named_children():
        path = f"{prefix}.{name}"
        if isinstance(child, nn.ModuleList | nn.Sequential):
            for index, member in child.named_children():
                blocks += _find_members(f"{path}.{index}", member)
        else:
            blocks += _find_blocks(path, child)
    return blocks


def _find_members(path: str, member: nn.Module) -> list[tuple[str, nn.Module]]:
    """A member of a list is a stage (a list itself, or with a child list of blocks), a block, or a single layer."""
    lists: list[tuple[str, nn.Module]] = [(path, member)]
    if not isinstance(member, nn.ModuleList | nn.Sequential):
        lists = [(f"{path}.{name}", child) for name, child in member.named_children() if name in STAGE_LISTS]
    if lists:
        return [(f"{at}.{name}", block) for at, held in lists for name, block in held.named_children()]
    return [(path, member)] if any(True for _ in member.children()) else []
