"""Students by name: presets with fresh weights, or any image classifier from a folder or the Hub."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hfkd.errors import InputError
from hfkd.models.modeling_bigan_encoder import HfkdBiganEncoderForImageClassification
from hfkd.models.modeling_mlp import HfkdMlpForImageClassification
from hfkd.models.modeling_resnet import HfkdResNetForImageClassification
from hfkd.models.modeling_vae_encoder import HfkdVaeEncoderForImageClassification
from hfkd.models.modeling_wide_resnet import HfkdWideResNetForImageClassification
from hfkd.models.probing import image_errors, one_line, probe_pixels, undisturbed


@dataclass(frozen=True)
class StudentPreset:
    """A classifier class and the fields of its configuration that differ from the defaults."""

    model_class: type[PreTrainedModel]
    settings: dict[str, Any] = field(default_factory=dict)


def _cifar_resnet(depth: int) -> StudentPreset:
    return StudentPreset(HfkdResNetForImageClassification, {"depths": [(depth - 2) // 6] * 3})


def _imagenet_resnet(depths: list[int], *, layer_type: str = "basic", stem: str = "imagenet") -> StudentPreset:
    expansion = 4 if layer_type == "bottleneck" else 1
    return StudentPreset(
        HfkdResNetForImageClassification,
        {
            "embedding_size": 64,
            "hidden_sizes": [width * expansion for width in (64, 128, 256, 512)],
            "depths": depths,
            "layer_type": layer_type,
            "stem": stem,
        },
    )


def _wide_resnet(depth: int, widen_factor: int) -> StudentPreset:
    return StudentPreset(HfkdWideResNetForImageClassification, {"depth": depth, "widen_factor": widen_factor})


# ALI's and ACAI's for 32x32 pixels, and small ones of the same make for 8x8.
_ENCODERS = {
    "bigan_encoder": StudentPreset(HfkdBiganEncoderForImageClassification),
    "bigan_encoder_svhn": StudentPreset(HfkdBiganEncoderForImageClassification, {"negative_slope": 0.01}),
    "bigan_encoder_8px": StudentPreset(
        HfkdBiganEncoderForImageClassification,
        {"hidden_sizes": [32, 64, 128], "kernel_sizes": [3, 4, 2], "strides": [1, 2, 1]},
    ),
    "vae_encoder": StudentPreset(HfkdVaeEncoderForImageClassification),
    "vae_encoder_8px": StudentPreset(HfkdVaeEncoderForImageClassification, {"depth": 32, "scales": 1}),
}

# Whose weights can be explained by a maximum margin: with batch norm, with a small start, or (plain) by weight decay.
_MLPS = {
    "mlp": StudentPreset(HfkdMlpForImageClassification),
    "mlp_bn": StudentPreset(HfkdMlpForImageClassification, {"norm": "batch"}),
    "mlp_small_first": StudentPreset(
        HfkdMlpForImageClassification, {"bias": "first", "initial_scales": [0.05, 1.0, 1.0]}
    ),
}

STUDENT_PRESETS: dict[str, StudentPreset] = {
    **{f"resnet{depth}": _cifar_resnet(depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    "resnet18_cifar": _imagenet_resnet([2, 2, 2, 2], stem="cifar"),
    "resnet18": _imagenet_resnet([2, 2, 2, 2]),
    "resnet34": _imagenet_resnet([3, 4, 6, 3]),
    "resnet50": _imagenet_resnet([3, 4, 6, 3], layer_type="bottleneck"),
    **{
        f"wrn_{depth}_{widen_factor}": _wide_resnet(depth, widen_factor)
        for depth, widen_factor in ((10, 2), (16, 2), (16, 4), (28, 2), (28, 4), (40, 2))
    },
    **_ENCODERS,
    **_MLPS,
}


def build_student(
    name_or_path: str,
    *,
    class_names: Sequence[str],
    image_size: int,
    num_channels: int = 3,
    seed: int = 0,
    trust_remote_code: bool = False,
    revision: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """An image classifier for `class_names` that takes (N, num_channels, image_size, image_size).

    Args:
        name_or_path: a key of `STUDENT_PRESETS` (fresh weights), a folder or a Hub id (its weights; a head for another
            number of classes is replaced by a fresh one).
        class_names: one name for each class, in the order of the label ids.
        image_size: side of the images in pixels.
        num_channels: channels of the images.
        seed: seed of the fresh weights. The global random state is left as it was.
        trust_remote_code: whether the checkpoint may run its own Python code.
        revision: branch, tag or commit on the Hub.
        settings: fields of the configuration that go over the preset's, such as `{"norm": "none"}`.

    Raises:
        InputError: the name is unknown, a setting is unknown or was given for a checkpoint, the checkpoint is missing,
            is not an image classifier, has no safetensors weights or needs remote code that was not allowed, or the
            model cannot take the images.
    """
    class_names = [str(name) for name in class_names]
    if len(set(class_names)) != len(class_names) or len(class_names) < 2:
        raise InputError(f"class_names has {len(class_names)} names: a classifier needs two or more different ones")
    labels: dict[str, Any] = {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: i for i, name in enumerate(class_names)},
    }
    # Only the CPU generator: torch.manual_seed would move those of every accelerator too.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if name_or_path in STUDENT_PRESETS:
            sizes = {"image_size": image_size, "num_channels": num_channels}
            model = _fresh(name_or_path, {**(settings or {}), **sizes, **labels})
        elif settings:
            _check_name(name_or_path)
            raise InputError(
                f"student {name_or_path!r} is a checkpoint, which has its own {', '.join(settings)}: leave out"
            )
        else:
            model = _load(name_or_path, trust_remote_code=trust_remote_code, revision=revision, **labels)
    pixels = probe_pixels(model, image_size, num_channels)
    with undisturbed(model), image_errors(model, pixels):
        model(pixel_values=pixels)
    return model


def _fresh(name: str, settings: Mapping[str, Any]) -> PreTrainedModel:
    """The preset `name` with fresh weights; `settings` go over its own."""
    preset = STUDENT_PRESETS[name]
    config_class = preset.model_class.config_class
    known = {field.name for field in fields(config_class)}
    if unknown := sorted(settings.keys() - known):
        raise InputError(f"preset {name!r} has no {unknown[0]}: leave it out, or choose another preset")
    try:
        config = config_class(**{**preset.settings, **settings})
    except ValueError as error:
        raise InputError(f"preset {name!r}: {one_line(error)}") from error
    return preset.model_class(config)


def _load(name_or_path: str, *, trust_remote_code: bool, revision: str | None, **labels: Any) -> PreTrainedModel:
    """Weights of a folder or Hub id under a head for `labels`."""
    _check_name(name_or_path)
    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        _check_remote_code(name_or_path, trust_remote_code=trust_remote_code, revision=revision)
        config = AutoConfig.from_pretrained(name_or_path, **hub)
        _check_is_image_classifier(name_or_path, config)
        return AutoModelForImageClassification.from_pretrained(
            name_or_path, **hub, **labels, ignore_mismatched_sizes=True, use_safetensors=True
        )
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"student {name_or_path!r} cannot be loaded: {one_line(error)}") from error


def load_base(name_or_path: str) -> PreTrainedModel:
    """A trained network of transformers or of this package, from a folder or the Hub, in float32, to build upon.

    It comes with the classifier that it was trained with; one that was saved without, such as an encoder, gets a fresh
    one.

    Raises:
        InputError: the checkpoint is missing, lacks weights, has no classifier class, or is third-party remote code.
    """
    _check_name(name_or_path, "base")
    try:
        content, _ = PreTrainedConfig.get_config_dict(name_or_path)
        kind = content.get("model_type")
        if kind not in CONFIG_MAPPING:
            raise InputError(
                f"base {name_or_path!r} (type {kind!r}) is third-party remote code, which a saved model cannot carry "
                "along: use a network of transformers or of hfkd"
            )
        _check_is_image_classifier(name_or_path, AutoConfig.from_pretrained(name_or_path), "base")
        base, info = AutoModelForImageClassification.from_pretrained(
            name_or_path, dtype=torch.float32, output_loading_info=True, use_safetensors=True
        )
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"base {name_or_path!r} cannot be loaded: {one_line(error)}") from error
    missing = sorted(name for name in info["missing_keys"] if name.startswith(f"{base.base_model_prefix}."))
    if missing:
        raise InputError(f"base {name_or_path!r} lacks weights: {', '.join(missing[:3])}: give a whole checkpoint")
    return base


def _check_name(name_or_path: str, role: str = "student") -> None:
    """A name that is no preset, no folder and no `user/name` is refused before the Hub is asked."""
    path = Path(name_or_path)
    if path.is_dir():
        return
    if path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1:
        raise InputError(f"{role} {name_or_path!r}: there is no such folder; give a folder with config.json in it")
    if "/" not in name_or_path:
        near = ", ".join(difflib.get_close_matches(name_or_path, STUDENT_PRESETS, n=3, cutoff=0.0))
        raise InputError(
            f"{role} {name_or_path!r} is no preset (nearest: {near}) and no folder; a Hub id has the form user/name"
        )


def _check_remote_code(name_or_path: str, *, trust_remote_code: bool, revision: str | None) -> None:
    """Without permission, transformers would ask on the terminal or raise a message of several lines."""
    if trust_remote_code:
        return
    config, _ = PreTrainedConfig.get_config_dict(name_or_path, revision=revision)
    if "AutoConfig" in config.get("auto_map", {}) and config.get("model_type") not in CONFIG_MAPPING:
        raise InputError(
            f"student {name_or_path!r} runs Python code of its own: read it, then allow it with trust_remote_code=True"
        )


def _check_is_image_classifier(name_or_path: str, config: PreTrainedConfig, role: str = "student") -> None:
    own_code = "AutoModelForImageClassification" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING and not own_code:
        raise InputError(
            f"{role} {name_or_path!r} is of type {config.model_type!r}, which has no image classifier: "
            "give a checkpoint that AutoModelForImageClassification loads"
        )
