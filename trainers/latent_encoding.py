"""Encoding: a backbone learns to say of which latents a frozen generator would have made an image.

It is what Squeeze-and-Span (Yang et al., NeurIPS 2022, arXiv 2211.03000, eq. 3 and Table 1) compares with: latents,
unlike features, make a poor teacher. Codes are of the extended space w+, one for each layer of the generator, where it
has a mapping network, and otherwise of its latents.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hfkd.data import Augmentation, Preprocessing
from hfkd.errors import InputError
from hfkd.evaluation.collapse import mean_standard_deviation
from hfkd.losses.latent_encoding import latent_loss, perceptual_distance, reconstruction_loss
from hfkd.model_cards import Picture
from hfkd.models.probing import image_errors, probe_pixels, undisturbed
from hfkd.models.squeeze_module import Projector

from .cohort_checks import check_is_model
from .encoder_checks import base_of, check_symmetric
from .feature_maps import full_precision
from .frozen_generator import FrozenGenerator, feature_channels
from .images import preprocessing_of
from .networks import FrozenTeacher, Renormalize
from .pictures import sample_picture
from .self_supervised import SelfSupervisedTrainer
from .self_supervised_config import SelfSupervisedConfig
from .squeeze_and_span import SqueezeAndSpanTrainer


@dataclass
class LatentEncodingConfig(SelfSupervisedConfig):
    """Settings of encoding. The defaults are those of Squeeze-and-Span's code for CIFAR-10 and CIFAR-100."""

    _lower_is_better: ClassVar = ("reconstruction_error",)

    per_device_train_batch_size: int = field(
        default=128, metadata={"help": "Samples per device and update, synthetic and real together (code: 128)."}
    )
    learning_rate: float = field(
        default=0.005, metadata={"help": "The rate itself, which the code has as 0.01 x batch / 256."}
    )
    synthetic_share: float = field(
        default=1.0,
        metadata={
            "help": "alpha in [0, 1]: share of the batch that is synthetic, and weight of its loss (Table 1: 1, 0.5)."
        },
    )
    augment_synthetic: bool = field(
        default=False, metadata={"help": "Must stay off: an augmented image is none that the generator makes."}
    )
    projector_layers: int = field(
        default=2, metadata={"help": "Linear layers from features to codes, >= 1 (code: 2)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.augment_synthetic:
            raise InputError("augment_synthetic=True: the generator makes no augmented images: leave it out")
        if not self.synthetic_share:
            raise InputError("synthetic_share=0 leaves codes free to differ from latents: choose a share above 0")
        self.refuse_changed(("representation_size",), "encoding, whose codes are as large as the latents")
        self.refuse_changed(("gather_statistics",), "encoding, whose loss is a mean over images")


class LatentEncodingTrainer(SelfSupervisedTrainer):
    """Trains a backbone and a small MLP on it, whose codes the generator turns into the image again.

    Gradients pass through the generator, which stays as it is. The MLP is training-only. Images are not augmented, and
    lie in [-1, 1]. The paper's loss has LPIPS by AlexNet too, whose weights this package cannot ship: its place is
    taken by the unweighted distance in a network that the user gives, and is empty without one.

    Args:
        student: any image model of transformers, or one with a head, which is left out.
        generator: without classes; frozen. Its images are of the data's size.
        args: the settings.
        perceptual_network: an image classifier with feature maps, in whose features images are compared too; frozen.
        perceptual_processing_class: its image processor, where its statistics differ from mean and std 0.5.
        train_dataset, eval_dataset, processing_class, callbacks, dataset_name: as in `SelfSupervisedTrainer`.

    Raises:
        InputError: for networks that do not fit each other, the images, or the settings.
    """

    _name = "Encoding into a generator's latents"
    _paper = SqueezeAndSpanTrainer._paper
    _tag_names: ClassVar = ["hfkd", "latent-encoding", "gan-inversion", "self-supervised", "gan"]
    _template_file = "latent_encoding.md"
    parent_role = "teacher"
    views = 1

    args: LatentEncodingConfig

    def __init__(
        self,
        student: Any,
        generator: Any,
        args: LatentEncodingConfig | None = None,
        *,
        perceptual_network: Any = None,
        perceptual_processing_class: Any = None,
        **parts: Any,
    ) -> None:
        if parts.get("augmentation"):
            raise InputError("augmentation: the generator makes no augmented images to find codes of: leave it out")
        given = (parts.get("train_dataset"), parts.get("processing_class"))
        preprocessing = preprocessing_of(*given, base_of(student).config)
        check_symmetric(preprocessing)
        self.perceptual: FrozenTeacher | None = None
        if perceptual_network is not None:
            _check_perceptual(perceptual_network, preprocessing)
            renormalize = Renormalize.for_teacher(preprocessing, perceptual_processing_class)
            self.perceptual = FrozenTeacher(perceptual_network, renormalize)
        super().__init__(student, generator, args or LatentEncodingConfig(), **parts)
        if self.perceptual is not None:
            self.model.teachers.append(self.perceptual.to(self.args.device))

    def build_heads(
        self, args: LatentEncodingConfig, width: int, generator: FrozenGenerator | None
    ) -> Mapping[str, nn.Module]:
        """The MLP from features to codes."""
        assert generator is not None  # as synthetic_share is above 0
        if generator.num_classes:
            raise InputError(
                f"the generator makes images of {generator.num_classes} classes, which real images do not tell: give "
                "one without classes"
            )
        shape = code_shape(generator.model)
        if feature_channels(generator, "latent") != [shape[-1]]:
            raise InputError(
                f"the generator is a {type(generator.model).__name__}, which has styles and makes no images of them: "
                "give one with a method synthesize"
            )
        return {"projector": Projector(width, math.prod(shape), args.projector_layers)}

    # -- the loss ----------------------------------------------------------------------------------------------------

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """alpha L_synthetic + (1 - alpha) L_real; only the synthetic one knows its latents."""
        alpha = self.args.synthetic_share
        generated = self.generate(batch)
        codes = self.encode(self.synthetic_view(generated, batch))
        latents = generated.latents if codes.dim() == 2 else generated.latents[:, None].expand_as(codes)
        parts = {"latent": latent_loss(codes, latents)} | self.image_losses(codes, generated.images)
        self.watch(codes.flatten(1), mean_standard_deviation(generated.latents))
        loss = torch.stack(list(parts.values())).sum()
        if alpha < 1:
            of_real = self.image_losses(self.encode(batch["pixel_values"]), batch["pixel_values"])
            parts |= {f"real_{name}": value for name, value in of_real.items()}
            loss = alpha * loss + (1 - alpha) * torch.stack(list(of_real.values())).sum()
        return loss, parts

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Codes (N, layers, width), or (N, latents), of images (N, C, H, W) in [-1, 1]."""
        return self.represent(pixel_values).unflatten(1, code_shape(self.model.teachers[0].model))

    def decode(self, codes: Tensor) -> Tensor:
        """The generator's images (N, C, H, W) of codes; where its layers take noise, always the same noise."""
        generator: Any = self.model.teachers[0].model
        with self.autocast():
            if hasattr(generator, "synthesize"):
                images = generator.synthesize(codes.to(generator.dtype), noise_mode="const").images
            else:
                images = generator(codes.to(generator.dtype), return_dict=True).images
        return full_precision(images)

    def image_losses(self, codes: Tensor, images: Tensor) -> dict[str, Tensor]:
        """How far the generator's images of `codes` are from `images`: pixels, and any perceptual distance."""
        decoded, images = self.decode(codes), full_precision(images)
        losses = {"reconstruction": reconstruction_loss(images, decoded)}
        if self.perceptual is not None:
            losses["perceptual"] = perceptual_distance(self._maps(decoded), self._maps(images))
        return losses

    def _maps(self, images: Tensor) -> list[Tensor]:
        """The perceptual network's hidden states, with gradients by the images."""
        assert self.perceptual is not None
        network: Any = self.perceptual.model
        with self.autocast():
            pixels = self.perceptual.renormalize(images).to(network.dtype)
            hidden = network(pixels, output_hidden_states=True, return_dict=True).hidden_states
        return [full_precision(one) for one in hidden or ()]

    # -- data, evaluation, the card ----------------------------------------------------------------------------------

    def _image_source(self, dataset: Any, name: str, augmentation: Augmentation | None = None) -> Any:
        return super()._image_source(dataset, name, Augmentation())

    def evaluation_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """As in the family, and the squared error of the image made of each code."""
        outputs = super().evaluation_step(batch)
        shape = code_shape(self.model.teachers[0].model)
        decoded = self.decode(outputs["representations"].unflatten(1, shape))
        error = (decoded - full_precision(batch["pixel_values"])).square().flatten(1).mean(dim=1)
        return outputs | {"error": error}

    def evaluation_metrics(self, outputs: dict[str, Tensor], labels: Tensor) -> dict[str, float]:
        """As in the family, and the mean `reconstruction_error` of pixels in [-1, 1]."""
        return super().evaluation_metrics(outputs, labels) | {"reconstruction_error": outputs["error"].mean().item()}

    def draw_pictures(self, folder: Path) -> Iterator[Picture]:
        """Samples of the generator."""
        yield sample_picture(self.model.teachers[0].model, folder)


def _check_perceptual(network: Any, preprocessing: Preprocessing) -> None:
    """Raise InputError unless the network takes such images, and has maps to compare them by."""
    check_is_model("perceptual_network", network)
    pixels = probe_pixels(network, preprocessing.image_size, preprocessing.num_channels)
    with undisturbed(network), image_errors(network, pixels):
        maps = network(pixels, output_hidden_states=True, return_dict=True).hidden_states or ()
    if not maps or any(feature_map.dim() != 4 for feature_map in maps):
        raise InputError(
            f"perceptual_network is a {type(network).__name__}, whose hidden states are no maps: give a "
            "convolutional network, such as a ResNet"
        )


def code_shape(generator: Any) -> tuple[int, ...]:
    """(layers, width) of a generator with a mapping network, (latents,) of another."""
    config = generator.config
    return (config.num_ws, config.w_dim) if hasattr(generator, "synthesize") else (config.latent_size,)
