"""What all image generators share: one output, one way to sample, images as Pillow pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.image_transforms import to_pil_image
from transformers.utils import ModelOutput


def class_numbers(n: int, labels: Sequence[int] | torch.Tensor | None, num_classes: int) -> torch.Tensor:
    """`labels` as int64 (n,) on the CPU, by default 0, 1, 2, ... in turn.

    Raises:
        ValueError: another number of labels, or a label outside the classes.
    """
    numbers = torch.arange(n) % num_classes if labels is None else torch.as_tensor(labels).cpu().long()
    if numbers.shape != (n,):
        raise ValueError(f"labels have shape {tuple(numbers.shape)}: {n} images need {n} labels")
    outside = numbers[(numbers < 0) | (numbers >= num_classes)]
    if len(outside):
        raise ValueError(
            f"label {int(outside[0])} is outside the {num_classes} classes: give numbers from 0 to {num_classes - 1}"
        )
    return numbers


@dataclass
class GeneratorOutput(ModelOutput):
    """Attributes:
    images: (N, C, H, W) in [-1, 1]; those of a family without tanh, as StyleGAN2, may lie a little outside.
    block_features: the map after each block, (N, C_b, H_b, W_b), in order.
    latents: (N, latent_size), what the images were made of.
    intermediate_latents: (N, num_ws, w_dim), the styles that a mapping network made of the latents; None without one.
    """

    images: torch.Tensor | None = None
    block_features: tuple[torch.Tensor, ...] | None = None
    latents: torch.Tensor | None = None
    intermediate_latents: torch.Tensor | None = None


class GeneratorPreTrainedModel(PreTrainedModel):
    """A generator's `forward(latents, labels=None)` is a function of its arguments and returns a `GeneratorOutput`.

    Its configuration has `latent_size`, `num_channels` and `image_size`. A family with noise in its layers says in
    `noise_size` how much of it an image takes, and its forward takes `noise` (N, noise_size), or None for no noise. A
    family with further random inputs draws them in `draw_inputs` as well; one whose images belong to classes says in
    `conditions` what `sample` makes where it is given no labels.
    """

    main_input_name = "latents"
    output_modalities = ("image",)
    accepts_loss_kwargs = False

    @property
    def noise_size(self) -> int:
        """Standard normal numbers that the layers of one image take; 0 without such noise."""
        return 0

    def draw_inputs(self, n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Random inputs of `forward` for `n` images, on the CPU; here `latents` and any `noise`, from N(0, I)."""
        drawn = {"latents": torch.randn(n, self.config.latent_size, generator=generator)}
        if self.noise_size:
            drawn["noise"] = torch.randn(n, self.noise_size, generator=generator)
        return drawn

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
            return self(**inputs, return_dict=True).images.clamp(-1, 1)
        finally:
            for module, mode in modes.items():
                module.training = mode

    @staticmethod
    def to_pil(images: torch.Tensor) -> list[Any]:
        """Images (N, C, H, W) in [-1, 1] as Pillow images, grey for one channel and RGB for three."""
        pixels = ((images.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return [to_pil_image(image, do_rescale=False, input_data_format="channels_first") for image in pixels]
