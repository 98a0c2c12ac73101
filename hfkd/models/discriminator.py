"""What all image discriminators share: one output and one shape of input."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput


@dataclass
class DiscriminatorOutput(ModelOutput):
    """Attributes:
    logits: (N,), log-odds that the image is real.
    block_features: the map after each block, (N, C_b, H_b, W_b), input side first.
    pooler_output: (N, D), one vector for each image.
    """

    logits: torch.Tensor | None = None
    block_features: tuple[torch.Tensor, ...] | None = None
    pooler_output: torch.Tensor | None = None


class DiscriminatorPreTrainedModel(PreTrainedModel):
    """`forward(pixel_values, labels=None, return_dict=None)` takes images (N, C, H, W) in [-1, 1] and returns a
    `DiscriminatorOutput`.

    Its configuration has `num_channels` and `image_size`. `labels` are class numbers (N,), for discriminators of
    images that belong to classes; the others refuse them.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False

    def as_input(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The images, three channels averaged into the one of a grey network, as saved processors give three.

        Raises:
            ValueError: images of another size or other channels than the network's.
        """
        channels, side = self.config.num_channels, self.config.image_size
        if channels == 1 and pixel_values.ndim == 4 and pixel_values.shape[1] == 3:
            pixel_values = pixel_values.mean(dim=1, keepdim=True)
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (channels, side, side):
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, and {type(self).__name__} takes "
                f"(N, {channels}, {side}, {side}): resize or convert the images"
            )
        return pixel_values
