"""Whether a generator, a discriminator and a judge can be trained and measured with each other and the images."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hfkd.data import Preprocessing
from hfkd.errors import InputError
from hfkd.evaluation.judges import Judge
from hfkd.models.probing import image_errors, probe_pixels, undisturbed

from .cohort_checks import check_is_model


def check_unlabelled(generator: PreTrainedModel) -> None:
    """Raise InputError where a generator wants to be told classes."""
    conditions: Any = getattr(generator, "conditions", None)
    if conditions is not None and (wanted := conditions(1)):
        raise InputError(
            f"the generator is a {type(generator).__name__} that takes {', '.join(wanted)}, and a GAN is trained "
            "without classes here: build one without them"
        )


def check_discriminator(discriminator: PreTrainedModel, preprocessing: Preprocessing, *, penalised: bool) -> None:
    """Raise InputError unless a discriminator gives one logit to each of the images.

    Args:
        preprocessing: of the images.
        penalised: whether its gradient at each image is.
    """
    check_is_model("discriminator", discriminator)
    kind = type(discriminator).__name__
    channels = getattr(discriminator.config, "num_channels", preprocessing.num_channels)
    if channels != preprocessing.num_channels:  # one that averages three channels has grey images to learn from
        raise InputError(
            f"the discriminator has num_channels={channels} and the images have {preprocessing.num_channels}: "
            "build it with num_channels of the data, or decode the images with those of the discriminator"
        )
    pixels = probe_pixels(discriminator, preprocessing.image_size, preprocessing.num_channels)
    with undisturbed(discriminator), image_errors(discriminator, pixels):
        logits = getattr(discriminator(pixels, return_dict=True), "logits", None)
    if not isinstance(logits, torch.Tensor) or logits.shape != (1,):
        raise InputError(f"the discriminator is a {kind}, which gives no single logit to an image: choose another")
    tied = any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in discriminator.modules())
    if penalised and tied:
        raise InputError(
            f"the discriminator is a {kind} with batch norm, which ties the logits of a batch together, and the "
            "gradient penalty is on each by itself: choose r1_weight=0, or norm spectral or none"
        )


def check_judge(judge: Judge | None, preprocessing: Preprocessing) -> None:
    """Raise InputError where a judge cannot take the images."""
    if judge is not None:
        side = preprocessing.image_size
        judge(torch.zeros(1, preprocessing.num_channels, side, side))
