"""Reading the networks out of a pickle of StyleGAN2-ADA's PyTorch code, of which nothing is run.

That code pickles a module together with its own source, for the loader to execute. Here the source is never looked
at: a module is its settings and its tensors, and our own models take both.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfkd.errors import InputError
from hfkd.hub.pickled_tensors import TENSOR_NAMES, empty_dict
from hfkd.hub.restricted_pickle import Allowed, ForeignGlobalError, read_pickle
from hfkd.models.configuration_stylegan2 import StyleGan2Config
from hfkd.models.modeling_stylegan2_discriminator import HfkdStyleGan2DiscriminatorModel
from hfkd.models.modeling_stylegan2_generator import HfkdStyleGan2GeneratorModel


_LARGEST = 65536  # of any number among the settings
_MOST_PARTS = 10_000  # modules and tensors of one network
_LONGEST_NAME = 200  # of a module, with those it lies in
_MEND = "only networks of NVlabs' stylegan2-ada-pytorch, or of the same structure, can be converted"

# Setting of the original -> field of our configuration. Settings of the parts have the part's name before a dot.
_COMMON = {
    "c_dim": "num_classes",
    "img_resolution": "image_size",
    "img_channels": "num_channels",
    "mapping_kwargs.num_layers": "mapping_layers",
}
_GENERATOR = _COMMON | {
    "z_dim": "latent_size",
    "w_dim": "w_dim",
    "synthesis_kwargs.channel_base": "channel_base",
    "synthesis_kwargs.channel_max": "channel_max",
    "synthesis_kwargs.conv_clamp": "conv_clamp",
}
_DISCRIMINATOR = _COMMON | {
    "channel_base": "channel_base",
    "channel_max": "channel_max",
    "conv_clamp": "conv_clamp",
    "architecture": "architecture",
    "epilogue_kwargs.mbstd_group_size": "mbstd_group_size",
}
_REQUIRED = ("c_dim", "img_resolution", "img_channels")
# Where a setting is missing, the original's default stands; those that are not ours:
_ORIGINAL_DEFAULTS = {"conv_clamp": None}
# Of what is computed they change nothing but the precision, or how training goes on.
_NEUTRAL = frozenset(
    ("num_fp16_res", "synthesis_kwargs.num_fp16_res", "synthesis_kwargs.fp16_channels_last")
    + ("synthesis_kwargs.fused_modconv_default",)
    + ("block_kwargs.fp16_channels_last", "block_kwargs.freeze_layers", "mapping_kwargs.w_avg_beta")
)
# Known with one value only.
_FIXED: Mapping[str, Any] = {
    "synthesis_kwargs.architecture": "skip",
    "synthesis_kwargs.activation": "lrelu",
    "synthesis_kwargs.use_noise": True,
    "synthesis_kwargs.resample_filter": [1, 3, 3, 1],
    "mapping_kwargs.activation": "lrelu",
    "mapping_kwargs.lr_multiplier": 0.01,
    "block_kwargs.activation": "lrelu",
    "block_kwargs.resample_filter": [1, 3, 3, 1],
    "epilogue_kwargs.activation": "lrelu",
    "epilogue_kwargs.mbstd_num_channels": 1,
    "cmap_dim": None,
}

Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(frozen=True)
class StyleGan2Networks:
    """The averaged generator and the discriminator of one checkpoint, on the CPU."""

    generator: HfkdStyleGan2GeneratorModel
    discriminator: HfkdStyleGan2DiscriminatorModel


@dataclass(frozen=True)
class _Persistent:
    """A module of the original, as its attributes."""

    state: dict[str, Any]


def read_stylegan2_ada(path: Path) -> StyleGan2Networks:
    """The networks `G_ema` and `D` of a pickle that StyleGAN2-ADA's PyTorch code wrote (network-snapshot-*.pkl).

    Nothing in the file is executed. Every tensor is taken bit by bit, and all of the model's must be there.

    Raises:
        InputError: no such pickle, one of the TensorFlow code, one that holds a foreign name, or networks of another
            structure. One line, which begins with the path.
    """
    try:
        content = read_pickle(path, {**TENSOR_NAMES, **_NVLABS_NAMES})
    except ForeignGlobalError as error:
        if error.name.startswith("dnnlib.tflib."):
            raise InputError(
                f"{path}: is a pickle of the TensorFlow code ({error.name}), whose tensors have another layout: "
                "convert it with legacy.py of NVlabs' stylegan2-ada-pytorch first"
            ) from error
        raise
    try:
        if type(content) is not dict:
            raise InputError(f"holds a {type(content).__name__} and no networks: {_MEND}")
        return StyleGan2Networks(
            generator=_network(content, "G_ema", _GENERATOR, HfkdStyleGan2GeneratorModel),
            discriminator=_network(content, "D", _DISCRIMINATOR, HfkdStyleGan2DiscriminatorModel),
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _network(content: Mapping[str, Any], name: str, known: Mapping[str, str], model_class: type[Model]) -> Model:
    """The network of this name, as a model of ours whose fields are the `known` settings."""
    module = content.get(name)
    if not isinstance(module, _Persistent):
        raise InputError(f"holds no network {name!r}: {_MEND}")
    config = _configured(model_class.config_class, _settings(module, known, name), name)
    return _filled(model_class, config, _state_dict(module, name), name)


def _settings(module: _Persistent, known: Mapping[str, str], name: str) -> dict[str, Any]:
    """Fields of our configuration from the arguments that the module was built with."""
    arguments, others = module.state.get("_init_kwargs"), module.state.get("_init_args", ())
    if type(arguments) is not dict or type(others) is not tuple or others:
        raise InputError(f"{name} does not say by which settings it was built: {_MEND}")
    for key in _REQUIRED:
        if key not in arguments:
            raise InputError(f"{name} has no setting {key}: {_MEND}")
    fields: dict[str, Any] = dict(_ORIGINAL_DEFAULTS)
    for key, value in _flat(arguments):
        if key in known:
            fields[known[key]] = _plain(value, f"{name}.{key}")
        elif key in _FIXED and not _equal(value, _FIXED[key]):
            raise InputError(f"{name} has {key} other than {_FIXED[key]!r}: {_MEND}")
        elif key not in _FIXED and key not in _NEUTRAL:
            raise InputError(f"{name} has the setting {key[:60]!r}, which is not known here: {_MEND}")
    return fields


def _flat(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings one by one, those of a part with its name before a dot."""
    for key, value in arguments.items():
        if type(value) is dict:
            yield from ((f"{key}.{inner}", item) for inner, item in value.items())
        else:
            yield key, value


def _equal(value: Any, expected: Any) -> bool:
    """Equality, without comparing more than plain values and flat lists of them."""
    if type(expected) is list:
        return type(value) is list and len(value) == len(expected) and all(map(_equal, value, expected))
    return type(value) in (bool, int, float, str, type(None)) and value == expected


def _plain(value: Any, name: str) -> int | float | str | None:
    """A setting as it is, if it is a number that a network can have, a short text or None."""
    if value is None or (type(value) is str and len(value) < 20):
        return value
    if type(value) not in (int, float) or not abs(value) <= _LARGEST:
        raise InputError(f"{name} is no number up to {_LARGEST}: {_MEND}")
    return value


def _configured(config_class: type[Any], fields: Mapping[str, Any], name: str) -> Any:
    try:
        return config_class(**fields)
    except (ValueError, TypeError) as error:
        raise InputError(f"{name} cannot be built ({' '.join(str(error).split())}): {_MEND}") from error


def _state_dict(root: _Persistent, network: str) -> dict[str, Tensor]:
    """Every tensor by its name, in the way that `Module.state_dict` names them."""
    found: dict[str, Tensor] = {}
    waiting: list[tuple[str, Any]] = [("", root)]
    seen: set[int] = set()
    while waiting:
        prefix, module = waiting.pop()
        if len(prefix) > _LONGEST_NAME:
            raise InputError(f"{network} has a module whose name is longer than {_LONGEST_NAME}: {_MEND}")
        if not isinstance(module, _Persistent) or id(module) in seen:
            raise InputError(f"{network} has at {prefix[:60]!r} something that is no module of its own: {_MEND}")
        seen.add(id(module))
        for kind in ("_parameters", "_buffers"):
            for name, tensor in _dict_of(module, kind).items():
                if isinstance(tensor, Tensor):
                    found[prefix + name] = tensor
        waiting += [(f"{prefix}{name}.", child) for name, child in _dict_of(module, "_modules").items()]
        if len(seen) + len(found) > _MOST_PARTS:
            raise InputError(f"{network} has more than {_MOST_PARTS} modules and tensors: {_MEND}")
    return found


def _dict_of(module: _Persistent, name: str) -> dict[str, Any]:
    content = module.state.get(name, {})
    if type(content) is not dict:
        raise InputError(f"has a module whose {name} are a {type(content).__name__}: {_MEND}")
    return content


def _filled(model_class: type[Model], config: StyleGan2Config, tensors: Mapping[str, Tensor], name: str) -> Model:
    """The model with exactly these tensors, compared by name, shape and type before any memory is taken."""
    if config.mapping_layers > len(tensors):
        raise InputError(f"{name} has fewer tensors than its {config.mapping_layers} mapping layers: {_MEND}")
    with torch.device("meta"):
        model = model_class(config)
    expected = model.state_dict()
    for key in sorted(expected.keys() ^ tensors.keys()):
        what = "lacks" if key in expected else "has an unknown"
        raise InputError(f"{name} {what} tensor {key[:80]!r}: {_MEND}")
    for key, tensor in tensors.items():
        shape, dtype = tuple(expected[key].shape), expected[key].dtype
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise InputError(
                f"{name} has {key} of shape {tuple(tensor.shape)} and {tensor.dtype}, not {shape} and {dtype}: {_MEND}"
            )
    if len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) < len(tensors):
        raise InputError(f"{name} has tensors that share their values, which would grow when copied: {_MEND}")
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(
                f"{name} has values in {key} that are not finite: give an earlier snapshot of its training"
            )
    copies = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    model.load_state_dict(copies, assign=True)
    return model.eval()


def _persistent_object(meta: Any) -> _Persistent:
    """What stands for `torch_utils.persistence._reconstruct_persistent_obj`, which would run the source in `meta`."""
    if type(meta) is not dict or type(meta.get("state")) is not dict:
        raise InputError("it holds a module without a state")
    return _Persistent(meta["state"])


_NVLABS_NAMES: Allowed = {
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent_object,
    "dnnlib.util.EasyDict": empty_dict,
}
