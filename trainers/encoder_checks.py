"""Whether an encoder that learns without labels fits its trainer and the images."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from hfkd.data import Preprocessing
from hfkd.errors import InputError

from .cohort_checks import check_images, check_is_model


def base_of(encoder: PreTrainedModel) -> PreTrainedModel:
    """The encoder, of a classifier without its head. Raises InputError where it is no model."""
    check_is_model("encoder", encoder)
    return encoder.base_model


def check_encoder(encoder: PreTrainedModel, fields: Sequence[str], preset: str, preprocessing: Preprocessing) -> None:
    """Raise InputError unless an encoder can be trained on the images.

    Args:
        encoder: a base model.
        fields: of its configuration, which the training-only networks are built by.
        preset: an encoder that has them.
        preprocessing: of the images, which must lie in [-1, 1] as generated ones do.
    """
    missing = [name for name in fields if not hasattr(encoder.config, name)]
    if missing:
        raise InputError(
            f"the encoder is a {type(encoder).__name__}, whose configuration has no {missing[0]} to build the other "
            f"networks by: use the preset {preset}, or a checkpoint of such an encoder"
        )
    check_symmetric(preprocessing)
    channels = getattr(encoder.config, "num_channels", preprocessing.num_channels)
    if channels != preprocessing.num_channels:  # one that averages three channels has grey images to learn from
        raise InputError(
            f"the encoder has num_channels={channels} and the images have {preprocessing.num_channels}, as generated "
            "ones must: build it with num_channels of the data, or decode the images with those of the encoder"
        )
    check_images([encoder], (), preprocessing)


def check_symmetric(preprocessing: Preprocessing) -> None:
    """Raise InputError unless images lie in [-1, 1], as generated ones do."""
    if any(value != 0.5 for value in (*preprocessing.mean, *preprocessing.std)):
        raise InputError(
            f"the images have mean {preprocessing.mean} and std {preprocessing.std}, and generated ones lie in "
            "[-1, 1]: choose normalization=symmetric"
        )


def check_generator(generator: PreTrainedModel, preprocessing: Preprocessing) -> None:
    """Raise InputError unless a generator can be sampled, says how, and makes images like the data's."""
    check_is_model("generator", generator)
    config, kind = generator.config, type(generator).__name__
    for holder, name, place in ((generator, "sample", ""), (config, "latent_size", "config.")):
        if not hasattr(holder, name):
            raise InputError(
                f"the generator is a {kind} without {place}{name}: use an HfkdBiganGeneratorModel, or a model with "
                "its methods and fields"
            )
    made = (getattr(config, "image_size", None), getattr(config, "num_channels", None))
    wanted = (preprocessing.image_size, preprocessing.num_channels)
    if made != wanted:
        raise InputError(
            f"the generator's layers make images of {made[0]}x{made[0]} pixels with {made[1]} channel(s), and the "
            f"data has {wanted[0]}x{wanted[0]} with {wanted[1]}: choose image_size={made[0]} for the data, or a "
            "generator of its size (BiGAN's mirrors an encoder, whose layers shrink its images to one position)"
        )
