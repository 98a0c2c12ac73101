"""BiGAN: encoder and generator against a discriminator of pairs, as ALI trains them (arXiv 1606.00704).

Donahue et al.'s BiGAN and Dumoulin et al.'s ALI (both ICLR 2017) are one idea: a discriminator D(x, z) tells pairs
(x, E(x)) of an image and its code from pairs (G(z), z) of a drawn code and its image, and E and G together make the
two alike. The encoder is the base network of the gradient-features paper (arXiv 2004.05529, section 4.3), which needs
no labels: `hfkd.losses.bigan` has the losses, ALI's own and the Wasserstein form.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfkd.data import Augmentation, keyed_normal, keyed_uniform
from hfkd.data.keyed_random import EVALUATION, LATENT_STREAM, MIXING_STREAM, NOISE_STREAM
from hfkd.errors import InputError
from hfkd.evaluation.similarity import discriminator_accuracy
from hfkd.losses.bigan import BiGanLoss, discriminator_loss, generator_loss, gradient_penalty
from hfkd.model_cards import Picture
from hfkd.models.bigan_parts import DiscriminatorActivation, DiscriminatorNorm, JointDiscriminator, LatentHead
from hfkd.models.generator import GeneratorPreTrainedModel

from .base import DistillationTrainer
from .cohort_checks import check_batches, common_precision
from .config import DistillationConfig, check_milestones, check_range
from .encoder_checks import base_of, check_encoder, check_generator
from .feature_maps import full_precision
from .images import preprocessing_of
from .networks import TrainingNetworks
from .optimizers import build_adam, build_discriminator_schedule, build_main_optimizer, build_main_schedule
from .pictures import sample_picture


# Of an encoder's configuration: what generator, latent layers and discriminator are built by.
ENCODER_FIELDS = ("hidden_sizes", "kernel_sizes", "strides", "negative_slope")
MAIN, DISCRIMINATOR = "encoder_generator", "discriminator"


@dataclass
class BiGanConfig(DistillationConfig):
    """Settings of BiGAN. The defaults are ALI's for CIFAR-10; each help says where another source speaks.

    The Wasserstein form of the public Wasserstein-BiGAN code is `gan_loss=wasserstein, discriminator_steps=5,
    discriminator_activation=leaky_relu, discriminator_input_dropout=0, discriminator_dropout=0, adam_beta2=0.9,
    per_device_train_batch_size=64` with an encoder of slope 0.2 and 100 latents.
    """

    _lower_is_better: ClassVar = ("reconstruction_error",)

    num_train_epochs: float = field(default=6475.0, metadata={"help": "Epochs (ALI: 6475 on CIFAR-10, 100 on SVHN)."})
    per_device_train_batch_size: int = field(default=100, metadata={"help": "Images per device (ALI: 100)."})
    optim: str = field(default="adam", metadata={"help": "Optimizer of encoder and generator (ALI: adam)."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Of encoder and generator (ALI: 1e-4)."})
    adam_beta1: float = field(default=0.5, metadata={"help": "Of both optimizers (ALI: 0.5)."})

    gan_loss: BiGanLoss = field(default="ali", metadata={"help": "ali (softplus, non-saturating) or wasserstein."})
    gradient_penalty_weight: float = field(
        default=10.0, metadata={"help": "lambda of the gradient penalty of gan_loss=wasserstein."}
    )
    discriminator_steps: int = field(
        default=1,
        metadata={
            "help": "The discriminator moves in each update, encoder and generator in every n-th (ALI: 1, from the "
            "same forward pass; Wasserstein-BiGAN: 5, on images of their own)."
        },
    )
    discriminator_learning_rate: float | None = field(
        default=None, metadata={"help": "Of Adam on the discriminator; None: learning_rate (ALI: the same)."}
    )
    discriminator_lr_milestones: list[float] = field(
        default_factory=list,
        metadata={"help": "Fractions of the run at which the discriminator's rate is multiplied by lr_gamma."},
    )
    discriminator_activation: DiscriminatorActivation = field(
        default="maxout", metadata={"help": "maxout of two pieces (ALI, CIFAR-10) or leaky_relu (ALI, SVHN)."}
    )
    discriminator_norm: DiscriminatorNorm = field(
        default="none", metadata={"help": "In D's layers on images: none (ALI, CIFAR-10) or batch (ALI, SVHN)."}
    )
    discriminator_input_dropout: float = field(
        default=0.2, metadata={"help": "Before D's first layers, in [0, 1) (ALI: 0.2)."}
    )
    discriminator_dropout: float = field(
        default=0.5, metadata={"help": "Before D's other layers, in [0, 1) (ALI: 0.5 on CIFAR-10, 0.2 on SVHN)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optim == "sgd":
            raise InputError("optim=sgd is not for BiGAN, whose two optimizers are of one kind: choose adam")
        check_range("gradient_penalty_weight", self.gradient_penalty_weight, 0)
        check_range("discriminator_steps", self.discriminator_steps, 1)
        for name in ("discriminator_input_dropout", "discriminator_dropout"):
            check_range(name, getattr(self, name), 0, 1, high_open=True)
        if self.discriminator_learning_rate is not None:
            check_range("discriminator_learning_rate", self.discriminator_learning_rate, 0)
        check_milestones("discriminator_lr_milestones", self.discriminator_lr_milestones)
        if self.gan_loss == "ali":
            self.refuse_changed(("gradient_penalty",), "gan_loss=ali")
        elif self.discriminator_norm == "batch":
            raise InputError(
                "discriminator_norm=batch ties the scores of a batch together, and the gradient penalty of "
                "gan_loss=wasserstein is on each by itself: choose none"
            )


class BiGanTrainer(DistillationTrainer):
    """Trains an encoder and a generator without labels.

    The encoder is saved at the root of each checkpoint, the generator in its folder `generator`. The latent layers of
    q(z | x) and the discriminator are training-only.

    Args:
        encoder: of the family `hfkd_bigan_encoder`, or one with the same fields in its configuration; of a classifier
            the head is left out.
        generator: makes images of the data's size; see `HfkdBiganGeneratorConfig.mirror`, and `start_at` for ALI's
            initial mean image.
        args: the settings.
        train_dataset, eval_dataset, processing_class, augmentation, callbacks, dataset_name: as in
            `DistillationTrainer`; labels are not looked at. Pixel values lie in [-1, 1] (mean and std 0.5).

    Raises:
        InputError: for networks that do not fit each other or the images.
    """

    _name = "Bidirectional GAN (BiGAN, ALI)"
    _paper: ClassVar = {
        "title": "Adversarially Learned Inference",
        "id": "1606.00704",
        "citation": (
            "@inproceedings{dumoulin2017ali,\n"
            "  title     = {Adversarially Learned Inference},\n"
            "  author    = {Dumoulin, Vincent and Belghazi, Ishmael and Poole, Ben and Mastropietro, Olivier and\n"
            "               Lamb, Alex and Arjovsky, Martin and Courville, Aaron},\n"
            "  booktitle = {International Conference on Learning Representations},\n"
            "  year      = {2017}\n"
            "}"
        ),
    }
    _tag_names: ClassVar = ["hfkd", "bigan", "gan", "unsupervised"]
    _template_file = "bigan.md"
    _task = "image-feature-extraction"
    evaluates_labels = False

    args: BiGanConfig

    def __init__(
        self,
        encoder: PreTrainedModel,
        generator: GeneratorPreTrainedModel,
        args: BiGanConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        augmentation: Augmentation | None = None,
        callbacks: Sequence[Any] | None = None,
        dataset_name: str | None = None,
    ) -> None:
        args = args or BiGanConfig()
        encoder = base_of(encoder)
        preprocessing = preprocessing_of(train_dataset, processing_class, encoder.config)
        check_encoder(encoder, ENCODER_FIELDS, "bigan_encoder", preprocessing)
        check_generator(generator, preprocessing)
        dtype = common_precision([encoder, generator])
        self.latent_size = generator.config.latent_size
        with torch.random.fork_rng():
            torch.manual_seed(args.seed + 1)
            head = LatentHead(encoder.config, self.latent_size)
            discriminator = JointDiscriminator(
                encoder.config,
                self.latent_size,
                activation=args.discriminator_activation,
                norm=args.discriminator_norm,
                input_dropout=args.discriminator_input_dropout,
                dropout=args.discriminator_dropout,
            )
        training_only = {"latent_head": head.to(dtype), "discriminator": discriminator.to(dtype)}
        networks = TrainingNetworks([encoder, generator], training_only, folders=["", "generator"])
        check_batches(train_dataset, args, list(networks.students), networks.training_only)
        super().__init__(
            networks,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            augmentation=augmentation,
            callbacks=callbacks,
            dataset_name=dataset_name,
        )

    def draw_pictures(self, folder: Path) -> Iterator[Picture]:
        """64 samples of the generator, the same latents in every card."""
        yield sample_picture(self.model.students[1], folder)

    # -- optimizers --------------------------------------------------------------------------------------------------

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """One Adam over encoder, latent layers and generator, one over the discriminator."""
        args, parts = self.args, self.model.training_only
        moving = [*self.model.students.parameters(), *parts["latent_head"].parameters()]
        rate = args.learning_rate if args.discriminator_learning_rate is None else args.discriminator_learning_rate
        return {
            MAIN: build_main_optimizer([p for p in moving if p.requires_grad], args),
            DISCRIMINATOR: build_adam(list(parts["discriminator"].parameters()), args, rate),
        }

    def build_schedules(self, optimizers: dict[str, torch.optim.Optimizer], max_steps: int) -> dict[str, Any]:
        return {
            MAIN: build_main_schedule(optimizers[MAIN], self.args, max_steps),
            DISCRIMINATOR: build_discriminator_schedule(optimizers[DISCRIMINATOR], self.args, max_steps),
        }

    # -- one update --------------------------------------------------------------------------------------------------

    def method_step(self, batch: dict[str, Tensor], share: float, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Both losses from one forward pass; both gradients are taken before anything moves, as in ALI's code.

        The total is their sum for ALI's losses. For the Wasserstein form it is the discriminator's: the two cancel
        there, and their sum would be the penalty alone.
        """
        args, update = self.args, self.state.global_step
        both_move = update % args.discriminator_steps == 0
        with torch.set_grad_enabled(both_move):
            data, samples = self._pairs(batch, update)
        data_scores, sample_scores = self._scores(data, samples)
        of_discriminator = discriminator_loss(data_scores, sample_scores, args.gan_loss)
        of_generator = generator_loss(data_scores, sample_scores, args.gan_loss)
        parts = {"generator_loss": of_generator}
        if args.gan_loss == "wasserstein":
            parts["gradient_penalty"] = self._gradient_penalty(batch, data, samples)
            of_discriminator = of_discriminator + args.gradient_penalty_weight * parts["gradient_penalty"]
        else:
            parts["discriminator_accuracy"] = discriminator_accuracy(data_scores, sample_scores, 0.0)["accuracy"]
        self.optimizer.backward(DISCRIMINATOR, share * of_discriminator, retain_graph=both_move)
        if both_move:
            self.optimizer.backward(MAIN, share * of_generator)
        parts["discriminator_loss"] = of_discriminator
        total = of_discriminator if args.gan_loss == "wasserstein" else of_generator + of_discriminator
        return total.detach(), {name: value.detach() for name, value in parts.items()}

    def _pairs(self, batch: dict[str, Tensor], update: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(x, E(x)) with E(x) ~ N(mean, std^2), and (G(z), z) with z ~ N(0, I); draws keyed by update and image."""
        images = batch["pixel_values"]
        mean, log_std = self._posterior(images)
        latents = self._draw(batch, update, LATENT_STREAM)
        codes = mean + log_std.exp() * self._draw(batch, update, NOISE_STREAM)
        return (images, codes), (self._generate(latents), latents)

    def _draw(self, batch: dict[str, Tensor], update: int, stream: int) -> Tensor:
        draws = keyed_normal(self.data_seed, update, batch["index"], stream, self.latent_size)
        return draws.to(batch["pixel_values"].dtype)

    def _posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with self.autocast():
            features = self.model.students[0](images, return_dict=True).pooler_output
            mean, log_std = self.model.training_only["latent_head"](features)
        return full_precision(mean), full_precision(log_std)

    def _generate(self, latents: Tensor) -> Tensor:
        with self.autocast():
            images = self.model.students[1](latents, return_dict=True).images
        return full_precision(images)

    def _scores(self, data: tuple[Tensor, Tensor], samples: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """D of both kinds of pairs, in one pass as in ALI's code: its batch norm, if any, sees both."""
        images, latents = (torch.cat(kinds) for kinds in zip(data, samples, strict=True))
        with self.autocast():
            scores = self.model.training_only["discriminator"](images, latents)
        data_scores, sample_scores = full_precision(scores).chunk(2)
        return data_scores, sample_scores

    def _gradient_penalty(
        self, batch: dict[str, Tensor], data: tuple[Tensor, Tensor], samples: tuple[Tensor, Tensor]
    ) -> Tensor:
        mixing = keyed_uniform(self.data_seed, self.state.global_step, batch["index"], MIXING_STREAM, 1)[:, 0]
        return gradient_penalty(self.model.training_only["discriminator"], data, samples, mixing)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def evaluation_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Latents (the mean of q(z | x)), the error of x -> z -> x in squared pixel values, and D's scores."""
        data, samples = self._pairs(batch, EVALUATION)
        data_scores, sample_scores = self._scores(data, samples)
        mean, _ = self._posterior(batch["pixel_values"])
        error = (self._generate(mean) - batch["pixel_values"]).square().flatten(1).mean(dim=1)
        return {"latents": mean, "error": error, "data_scores": data_scores, "sample_scores": sample_scores}

    def evaluation_metrics(self, outputs: dict[str, Tensor], labels: Tensor) -> dict[str, float]:
        """The mean `reconstruction_error`, both losses (without penalty), and ALI's `discriminator_accuracy`.

        There is no `loss`: that of a game does not say which model is best.
        """
        scores = outputs["data_scores"], outputs["sample_scores"]
        metrics = {
            "reconstruction_error": outputs["error"].mean().item(),
            "generator_loss": generator_loss(*scores, self.args.gan_loss).item(),
            "discriminator_loss": discriminator_loss(*scores, self.args.gan_loss).item(),
        }
        if self.args.gan_loss == "ali":
            metrics["discriminator_accuracy"] = discriminator_accuracy(*scores, 0.0)["accuracy"].item()
        return metrics

    def predictions(self, outputs: dict[str, Tensor]) -> Tensor:
        """The latents (N, L) of the images."""
        return outputs["latents"]
