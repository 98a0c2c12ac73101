"""Pickles as NVlabs' stylegan2-ada-pytorch writes them, of our own networks' tensors.

That code pickles a module as a call of `torch_utils.persistence._reconstruct_persistent_obj` with the module's source
and its `__dict__`. The names it needs exist only while the pickle is written.
"""

import pickle
import sys
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import torch
from torch import nn


class EasyDict(dict):
    """Keys as attributes."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]

    def __setattr__(self, name, value):
        self[name] = value


def _reconstruct_persistent_obj(meta):
    raise AssertionError("the pickle was run")


class Persistent(nn.Module):
    """A module of the original, with the tensors of one of ours."""

    class_name = "Layer"

    def __init__(self, ours):
        super().__init__()
        self.weight_gain = 1 / np.sqrt(9)  # a NumPy scalar, as in the original
        self.memory_format = None
        self.resolutions = [4, 8]
        for name, parameter in ours.named_parameters(recurse=False):
            stored = parameter.detach().clone()
            if stored.ndim == 4:  # the original keeps those of its 16-bit layers so
                stored = stored.contiguous(memory_format=torch.channels_last)
            self.register_parameter(name, nn.Parameter(stored))
        for name, buffer in ours.named_buffers(recurse=False):
            self.register_buffer(name, buffer.detach().clone())
        for name, child in ours.named_children():
            self.add_module(name, Persistent(child))

    def __reduce__(self):
        meta = EasyDict(type="class", version=6, module_src=self.source, class_name=self.class_name)
        meta.state = self.__dict__.copy()
        return _reconstruct_persistent_obj, (meta,)

    source = "raise SystemExit('the source was run')"


@contextmanager
def nvlabs_names():
    """The original's modules, for as long as a pickle is written."""
    modules = {name: ModuleType(name) for name in ("dnnlib", "dnnlib.util", "torch_utils", "torch_utils.persistence")}
    modules["dnnlib.util"].EasyDict = EasyDict
    modules["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj
    homes = {EasyDict: "dnnlib.util", _reconstruct_persistent_obj: "torch_utils.persistence"}
    before = {thing: thing.__module__ for thing in homes}
    sys.modules.update(modules)
    try:
        for thing, home in homes.items():
            thing.__module__ = home
        yield
    finally:
        for thing, home in before.items():
            thing.__module__ = home
        for name in modules:
            del sys.modules[name]


def persistent(ours, **settings):
    """A network of the original with the tensors of `ours`, that was built with `settings`."""
    module = Persistent(ours)
    module._init_args = ()
    module._init_kwargs = EasyDict(
        {key: EasyDict(value) if isinstance(value, dict) else value for key, value in settings.items()}
    )
    return module


def generator_settings(config, **changed):
    return {
        "z_dim": config.latent_size,
        "c_dim": config.num_classes,
        "w_dim": config.w_dim,
        "img_resolution": config.image_size,
        "img_channels": config.num_channels,
        "mapping_kwargs": {"num_layers": config.mapping_layers},
        "synthesis_kwargs": {
            "channel_base": config.channel_base,
            "channel_max": config.channel_max,
            "num_fp16_res": 4,
            "conv_clamp": 256,
        },
        **changed,
    }


def discriminator_settings(config, **changed):
    return {
        "c_dim": config.num_classes,
        "img_resolution": config.image_size,
        "img_channels": config.num_channels,
        "architecture": config.architecture,
        "channel_base": config.channel_base,
        "channel_max": config.channel_max,
        "num_fp16_res": 4,
        "conv_clamp": 256,
        "block_kwargs": {},
        "mapping_kwargs": {"num_layers": config.mapping_layers},
        "epilogue_kwargs": {"mbstd_group_size": config.mbstd_group_size},
        **changed,
    }


def write_snapshot(path, generator, discriminator, protocol=3, generator_changes=(), discriminator_changes=(), **more):
    """The file as training leaves it; `more` entries replace those of the dictionary. Returns the path."""
    averaged = persistent(generator, **generator_settings(generator.config, **dict(generator_changes)))
    judge = persistent(discriminator, **discriminator_settings(discriminator.config, **dict(discriminator_changes)))
    with nvlabs_names():
        content = {
            "training_set_kwargs": EasyDict(path="cifar10.zip", use_labels=False, max_size=50000, xflip=False),
            "G": averaged,
            "D": judge,
            "G_ema": averaged,
            "augment_pipe": None,
            **more,
        }
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path
