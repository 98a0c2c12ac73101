"""One vector for each image from any base model of transformers, gradients intact."""

from torch import Tensor
from transformers import PreTrainedModel

from hfkd.models.adapter import SPECIAL_TOKENS
from hfkd.models.probing import image_errors, probe_pixels, undisturbed


def pooled_features(backbone: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    """Features (N, D) of images (N, C, H, W); of a classifier's base, what that classifier reads.

    They are the model's `pooler_output`. A model without one gives the average of its map, or of its tokens the first,
    where it has one that stands for the image, else the average. (A ViT that `AutoModel` has loaded comes with a
    pooler, of random weights where none was saved; the base of `AutoModelForImageClassification` has none.)
    """
    outputs = backbone(pixel_values=pixel_values, return_dict=True)
    pooled = getattr(outputs, "pooler_output", None)
    if pooled is None:
        hidden = outputs[0]
        if hidden.dim() == 4:
            pooled = hidden.mean(dim=(2, 3))
        else:
            pooled = hidden[:, 0] if _has_special_token(backbone) else hidden.mean(dim=1)
    return pooled.flatten(1)


def feature_attribute(backbone: PreTrainedModel) -> str:
    """What to read of the outputs of a saved `backbone`, loaded by `AutoModel`, for its `pooled_features`: as code.

    A transformer that was trained without a pooler is given a fresh one there, whose output means nothing.
    """
    lacks_pooler = getattr(backbone, "pooler", backbone) is None
    return "last_hidden_state[:, 0]" if lacks_pooler and _has_special_token(backbone) else "pooler_output"


def feature_size(backbone: PreTrainedModel, image_size: int, num_channels: int) -> int:
    """D of `pooled_features`. Raises InputError where the model cannot take such images."""
    pixels = probe_pixels(backbone, image_size, num_channels)
    with undisturbed(backbone), image_errors(backbone, pixels):
        return pooled_features(backbone, pixels).shape[1]


def _has_special_token(backbone: PreTrainedModel) -> bool:
    return any(name.rsplit(".", 1)[-1] in SPECIAL_TOKENS for name, _ in backbone.named_parameters())
