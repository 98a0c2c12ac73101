"""Whether an encoder that learns without labels fits its trainer and the images."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from hfkd.data import Preprocessing
from hfkd.errors import InputError

from .cohort_checks import check_images


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
    if any(value != 0.5 for value in (*preprocessing.mean, *preprocessing.std)):
        raise InputError(
            f"the images have mean {preprocessing.mean} and std {preprocessing.std}, and generated ones lie in "
            "[-1, 1]: choose normalization=symmetric"
        )
    check_images([encoder], None, preprocessing)
