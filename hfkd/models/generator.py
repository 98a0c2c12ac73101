"""What all image generators share: one output, one way to sample, images as Pillow pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.image_transforms import to_pil_image
from transformers.utils import ModelOutput


@dataclass
class GeneratorOutput(ModelOutput):
    """Attributes:
    images: (N, C, H, W) in [-1, 1].
    block_features: the map after each block, (N, C_b, H_b, W_b), in order.
    latents: (N, latent_size), what the images were made of.
    """

    images: torch.Tensor | None = None
    block_features: tuple[torch.Tensor, ...] | None = None
    latents: torch.Tensor | None = None


class GeneratorPreTrainedModel(PreTrainedModel):
    """A generator's `forward(latents, labels=None)` is a function of its arguments and returns a `GeneratorOutput`.

    Its configuration has `latent_size`, `num_channels` and `image_size`. A family whose forward takes further random
    inputs (noise in its layers) draws them in `draw_inputs` as well; one whose images belong to classes says in
    `conditions` what `sample` makes where it is given no labels.
    """

    main_input_name = "latents"
    output_modalities = ("image",)
    accepts_loss_kwargs = False

    def draw_inputs(self, n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Random inputs of `forward` for `n` images, on the CPU; here `latents` from N(0, I)."""
        return {"latents": torch.randn(n, self.config.latent_size, generator=generator)}

    def conditions(self, n: int, labels: Sequence[int] | torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """What is asked of `n` images, as inputs of `forward` on the CPU; here `labels` (n,), where they are given."""
        return {} if labels is None else {"labels": torch.as_tensor(labels)}

    @torch.no_grad()
    def sample(
        self,
        n: int,
        labels: Sequence[int] | torch.Tensor | None = None,
        seed: int | None = None,
        **conditions: Any,
    ) -> torch.Tensor:
        """`n` images (n, C, H, W) in [-1, 1], in evaluation mode; the global random state is left alone.

        Args:
            n: how many.
            labels: n class numbers, for generators of classes.
            seed: of the draws, which are made on the CPU and so are the same on every device; None: a fresh one.
            conditions: what else the family's `conditions` takes.

        Raises:
            ValueError: labels or other conditions that the generator does not know.
        """
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        drawn = self.draw_inputs(n, generator)
        inputs: dict[str, Any] = {name: value.to(self.device, self.dtype) for name, value in drawn.items()}
        asked = self.conditions(n, labels, **conditions)
        inputs |= {name: value.to(self.device) for name, value in asked.items()}
        modes: dict[nn.Module, bool] = {module: module.training for module in self.modules()}
        self.eval()
        try:
            return self(**inputs, return_dict=True).images
        finally:
            for module, mode in modes.items():
                module.training = mode

    @staticmethod
    def to_pil(images: torch.Tensor) -> list[Any]:
        """Images (N, C, H, W) in [-1, 1] as Pillow images, grey for one channel and RGB for three."""
        pixels = ((images.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return [to_pil_image(image, do_rescale=False, input_data_format="channels_first") for image in pixels]
