"""A generator as a teacher: it is frozen, and what it makes is a function of keys."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hfkd.data import Preprocessing, keyed_normal, keyed_uniform
from hfkd.data.keyed_random import LATENT_STREAM, MIXING_STREAM, NOISE_STREAM
from hfkd.errors import InputError
from hfkd.evaluation.sampling import class_names
from hfkd.models.squeeze_module import pool_maps

from .cohort_checks import check_is_model
from .feature_maps import full_precision
from .networks import FrozenTeacher


class Generated(NamedTuple):
    """Synthetic samples, without gradients and in full precision.

    Attributes:
        images: (N, C, H, W), clamped to [-1, 1].
        features: of each block, the average over the positions of its map, (N, C_b).
        latents: (N, L): w where the generator has a mapping network, else z.
    """

    images: Tensor
    features: tuple[Tensor, ...]
    latents: Tensor

    def rows(self, index: Tensor) -> "Generated":
        return Generated(self.images[index], tuple(one[index] for one in self.features), self.latents[index])


class FrozenGenerator(FrozenTeacher):
    """A generator of the contract of `GeneratorPreTrainedModel`, whose samples are drawn by keys.

    Classes, where it knows any, are drawn with equal chances. Layer noise is drawn anew for each image.

    Raises:
        InputError: a model that is no generator.
    """

    model: Any

    def __init__(self, generator: Any) -> None:
        check_is_model("generator", generator)
        for holder, name, place in ((generator, "sample", ""), (generator.config, "latent_size", "config.")):
            if not hasattr(holder, name):
                raise InputError(
                    f"the generator is a {type(generator).__name__} without {place}{name}: give a generator, such as "
                    "hfkd train gan or hfkd convert stylegan2-ada leaves"
                )
        super().__init__(generator)
        self.num_classes = len(class_names(generator) or ())

    def draw(self, seed: int, epoch: Tensor, index: Tensor) -> Generated:
        """One forward pass for the samples of keys `epoch` and `index`, int64 (N,) each: image and features of one."""
        parameter = next(self.model.parameters())
        latents = keyed_normal(seed, epoch, index, LATENT_STREAM, self.model.config.latent_size).to(parameter.dtype)
        inputs: dict[str, Tensor] = {}
        if size := getattr(self.model, "noise_size", 0):
            inputs["noise"] = keyed_normal(seed, epoch, index, NOISE_STREAM, size).to(parameter.dtype)
        if self.num_classes:
            labels = (keyed_uniform(seed, epoch, index, MIXING_STREAM, 1)[:, 0] * self.num_classes).long()
            asked = self.model.conditions(len(index), labels=labels)
            inputs |= {name: value.to(parameter.device) for name, value in asked.items()}
        output = self(latents, **inputs, return_dict=True)
        styles = getattr(output, "intermediate_latents", None)
        return Generated(
            full_precision(output.images).clamp(-1, 1),
            tuple(full_precision(pooled) for pooled in pool_maps(output.block_features)),
            full_precision(output.latents if styles is None else styles[:, 0]),
        )


def check_generated(generator: FrozenGenerator, preprocessing: Preprocessing, *, resized: bool) -> None:
    """Raise InputError unless the generator's images can stand beside, or in the place of, the data's.

    Args:
        generator: whose images they are.
        preprocessing: of the student's images.
        resized: whether the augmentation cuts generated images to the student's size.
    """
    config = generator.model.config
    made, channels = int(config.image_size), int(config.num_channels)
    if channels != preprocessing.num_channels:
        raise InputError(
            f"the generator makes images of {channels} channel(s) and the student's have "
            f"{preprocessing.num_channels}: decode the data with {channels}, or choose another generator"
        )
    if made < preprocessing.image_size or (made > preprocessing.image_size and not resized):
        raise InputError(
            f"the generator makes images of {made}x{made} pixels and the student's are "
            f"{preprocessing.image_size}x{preprocessing.image_size}: choose image_size={made} (larger generated "
            "images are cut to size by the crops of augment_synthetic=True)"
        )


def features_of(generated: Generated, kind: str) -> tuple[Tensor, ...]:
    """What the teacher is: `generator`, each block's features, or `latent`."""
    return generated.features if kind == "generator" else (generated.latents,)


def feature_channels(generator: FrozenGenerator, kind: str) -> list[int]:
    """Widths of `features_of`."""
    device = next(generator.parameters()).device
    index = torch.arange(1, device=device)
    return [one.shape[1] for one in features_of(generator.draw(0, torch.zeros_like(index), index), kind)]
