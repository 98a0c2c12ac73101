"""A generative adversarial network, as StyleGAN2-ADA trains it (Karras et al., NeurIPS 2020, arXiv 2006.06676).

Non-saturating losses, a lazy R1 penalty, an average of the generator's weights, and augmentation of what the
discriminator sees. Any generator and discriminator of this package's contracts will do, DCGAN's small ones to those
of StyleGAN2. It makes the teacher of squeeze-and-span for those who have none.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hfkd.data import Augmentation, keyed_normal, keyed_uniform
from hfkd.data.gan_augmentation import AdaptiveProbability, GanAugmentation
from hfkd.data.keyed_random import (
    EVALUATION,
    FAKE_AUGMENTATION_STREAM,
    LATENT_STREAM,
    NOISE_STREAM,
    REAL_AUGMENTATION_STREAM,
)
from hfkd.errors import InputError
from hfkd.evaluation.frechet import frechet_distance
from hfkd.evaluation.generation import judge_statistics
from hfkd.evaluation.judges import Judge
from hfkd.evaluation.similarity import discriminator_accuracy
from hfkd.losses.gan import discriminator_loss, generator_loss, r1_penalty
from hfkd.model_cards import Picture, hub_id_or_none
from hfkd.models.discriminator import DiscriminatorPreTrainedModel
from hfkd.models.generator import GeneratorPreTrainedModel

from .base import DistillationTrainer
from .cohort_checks import check_batches, common_precision
from .config import DistillationConfig, check_milestones, check_positive, check_range
from .distributed import world_size
from .encoder_checks import check_generator, check_symmetric
from .feature_maps import full_precision
from .gan_checks import check_discriminator, check_judge, check_unlabelled
from .images import preprocessing_of
from .networks import TrainingNetworks
from .optimizers import build_adam, build_discriminator_schedule, build_main_optimizer, build_main_schedule
from .pictures import sample_picture
from .weight_average import AfterUpdate, average_decay, follow


GENERATOR, DISCRIMINATOR, CONTROLLER = "generator", "discriminator", "augmentation"


@dataclass
class GanConfig(DistillationConfig):
    """Settings of a GAN. The defaults are for DCGAN's networks on small images; each help says what StyleGAN2-ADA has.

    StyleGAN2-ADA's own, for CIFAR-10, stand in the recipe `cifar10_stylegan2`.
    """

    _lower_is_better: ClassVar = ("frechet_distance",)

    num_train_epochs: float = field(default=100.0, metadata={"help": "Epochs (StyleGAN2-ADA: 25 to 100 M images)."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Images per device (StyleGAN2-ADA: 64)."})
    optim: str = field(default="adam", metadata={"help": "Of both networks: adam or adamw_torch."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Of the generator (DCGAN: 2e-4; StyleGAN2: 2.5e-3)."})
    adam_beta1: float = field(default=0.5, metadata={"help": "Of both optimizers (DCGAN: 0.5; StyleGAN2: 0)."})
    discriminator_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the discriminator; None: learning_rate (both papers: the same)."}
    )
    discriminator_lr_milestones: list[float] = field(
        default_factory=list,
        metadata={"help": "Fractions of the run at which the discriminator's rate is multiplied by lr_gamma."},
    )

    r1_weight: float = field(
        default=0.1,
        metadata={
            "help": "gamma of the penalty gamma/2 E||grad D||^2 at real images; 0: none (ours; StyleGAN2-ADA: 0.01 "
            "on CIFAR-10)."
        },
    )
    r1_interval: int = field(
        default=16, metadata={"help": "The penalty is taken in every n-th update and counts n times (StyleGAN2: 16)."}
    )
    ema_half_life: float = field(
        default=10.0,
        metadata={
            "help": "Half-life of the saved generator's average, in thousands of images (StyleGAN2: 10, ADA on "
            "CIFAR-10: 500); 0: no average."
        },
    )
    ema_ramp_up: float = field(
        default=0.05,
        metadata={"help": "The half-life is at most this fraction of the images so far (ADA: 0.05); 0: no limit."},
    )
    discriminator_augmentation: Literal["none", "diffaugment", "ada"] = field(
        default="none",
        metadata={
            "help": "Of all that the discriminator sees: none, diffaugment (always, for little data) or ada (with a "
            "probability that follows overfitting)."
        },
    )
    augmentation_operations: list[str] = field(
        default_factory=lambda: ["color", "translation", "cutout"],
        metadata={"help": "Of diffaugment and ada: color, translation, cutout (DiffAugment: all three)."},
    )
    ada_target: float = field(
        default=0.6, metadata={"help": "ADA: E[sign D(real)] at which the probability rests, in [-1, 1] (paper: 0.6)."}
    )
    ada_interval: int = field(default=4, metadata={"help": "ADA: adapt in every n-th update (paper: 4)."})
    ada_images: float = field(
        default=500.0,
        metadata={"help": "ADA: thousands of images in which the probability can go from 0 to 1 (paper: 500)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optim == "sgd":
            raise InputError("optim=sgd is not for a GAN, whose two optimizers are of one kind: choose adam")
        for name in ("r1_weight", "ema_half_life", "ema_ramp_up"):
            check_range(name, getattr(self, name), 0)
        for name in ("r1_interval", "ada_interval"):
            check_range(name, getattr(self, name), 1)
        check_range("ada_target", self.ada_target, -1, 1)
        check_positive("ada_images", self.ada_images)
        if self.discriminator_learning_rate is not None:
            check_range("discriminator_learning_rate", self.discriminator_learning_rate, 0)
        check_milestones("discriminator_lr_milestones", self.discriminator_lr_milestones)
        GanAugmentation(tuple(self.augmentation_operations))
        self._refuse_without_effect()

    def _refuse_without_effect(self) -> None:
        if self.r1_weight == 0:
            self.refuse_changed(("r1_interval",), "r1_weight=0")
        if self.ema_half_life == 0:
            self.refuse_changed(("ema_ramp_up",), "ema_half_life=0")
        ignored = {"none": ("augmentation_operations", "ada_"), "diffaugment": ("ada_",), "ada": ()}
        kind = self.discriminator_augmentation
        self.refuse_changed(ignored[kind], f"discriminator_augmentation={kind}")


class GanTrainer(DistillationTrainer):
    """Trains a generator of images without labels against a discriminator.

    Saved are the average of the generator's weights, at the root of each checkpoint, and the discriminator in its
    folder `discriminator`. The generator that learns is training-only; at the start it is a copy.

    Both losses come from one forward pass of the generator, and both gradients are taken before anything moves. Each
    loss is a mean over images, so that micro-batches and ranks add up, but for networks with statistics of a batch.

    Args:
        generator: makes images of the data's size from latents alone; it becomes the average.
        discriminator: takes such images; see `DiscriminatorPreTrainedModel`.
        args: the settings.
        train_dataset, eval_dataset, processing_class, augmentation, callbacks, dataset_name: as in
            `DistillationTrainer`; labels are not looked at. Pixel values lie in [-1, 1] (mean and std 0.5).
        judge: who says in an evaluation what generated images show, such as a `ClassifierJudge`; its features are the
            space of the Fréchet distance. None: only the discriminator is asked.

    Raises:
        InputError: for networks that do not fit each other or the images.
    """

    _name = "Generative adversarial network (StyleGAN2-ADA's training)"
    _paper: ClassVar = {
        "title": "Training Generative Adversarial Networks with Limited Data",
        "id": "2006.06676",
        "citation": (
            "@inproceedings{karras2020ada,\n"
            "  title     = {Training Generative Adversarial Networks with Limited Data},\n"
            "  author    = {Karras, Tero and Aittala, Miika and Hellsten, Janne and Laine, Samuli and\n"
            "               Lehtinen, Jaakko and Aila, Timo},\n"
            "  booktitle = {Advances in Neural Information Processing Systems},\n"
            "  year      = {2020}\n"
            "}"
        ),
    }
    _tag_names: ClassVar = ["hfkd", "gan", "unsupervised"]
    _template_file = "gan.md"
    _task = "unconditional-image-generation"
    evaluates_labels = False

    args: GanConfig

    def __init__(
        self,
        generator: GeneratorPreTrainedModel,
        discriminator: DiscriminatorPreTrainedModel,
        args: GanConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        augmentation: Augmentation | None = None,
        callbacks: Sequence[Any] | None = None,
        dataset_name: str | None = None,
        judge: Judge | None = None,
    ) -> None:
        args = args or GanConfig()
        preprocessing = preprocessing_of(train_dataset, processing_class, getattr(generator, "config", None))
        check_generator(generator, preprocessing)
        check_unlabelled(generator)
        check_symmetric(preprocessing)
        check_discriminator(discriminator, preprocessing, penalised=args.r1_weight > 0)
        check_judge(judge, preprocessing)
        common_precision([generator, discriminator])
        self.judge = judge
        self.operations = None
        training_only: dict[str, nn.Module] = {GENERATOR: deepcopy(generator)}
        if args.discriminator_augmentation != "none":
            self.operations = GanAugmentation(tuple(args.augmentation_operations))
        if args.discriminator_augmentation == "ada":
            training_only[CONTROLLER] = AdaptiveProbability(args.ada_target, 1000 * args.ada_images)
        networks = TrainingNetworks([generator, discriminator], training_only, folders=["", DISCRIMINATOR])
        check_batches(train_dataset, args, list(networks.students), networks.training_only)
        super().__init__(
            networks,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            augmentation=augmentation,
            callbacks=[AfterUpdate(self._follow_generator), *(callbacks or [])],
            dataset_name=dataset_name,
        )

    def draw_pictures(self, folder: Path) -> Iterator[Picture]:
        """64 samples of the averaged generator, the same latents in every card."""
        yield sample_picture(self.model.students[0], folder)

    def card_settings(self) -> dict[str, Any]:
        """With the judge, whose features a Fréchet distance is in; a local one by the last part of its folder."""
        settings = super().card_settings()
        name = getattr(getattr(getattr(self.judge, "model", None), "config", None), "_name_or_path", "")
        return settings | {"judge": hub_id_or_none(name) or Path(name).name} if name else settings

    # -- optimizers --------------------------------------------------------------------------------------------------

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """One Adam over the generator that learns, one over the discriminator; the average is in neither."""
        args = self.args
        rate = args.learning_rate if args.discriminator_learning_rate is None else args.discriminator_learning_rate
        return {
            GENERATOR: build_main_optimizer(list(self.model.training_only[GENERATOR].parameters()), args),
            DISCRIMINATOR: build_adam(list(self.model.students[1].parameters()), args, rate),
        }

    def build_schedules(self, optimizers: dict[str, torch.optim.Optimizer], max_steps: int) -> dict[str, Any]:
        return {
            GENERATOR: build_main_schedule(optimizers[GENERATOR], self.args, max_steps),
            DISCRIMINATOR: build_discriminator_schedule(optimizers[DISCRIMINATOR], self.args, max_steps),
        }

    # -- one update --------------------------------------------------------------------------------------------------

    def method_step(self, batch: dict[str, Tensor], share: float, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Both losses from one forward pass; the total is their sum, without the penalty."""
        args, update = self.args, self.state.global_step
        fake = self._generate(self.model.training_only[GENERATOR], batch, update)
        real = self._augment(batch["pixel_values"], batch, REAL_AUGMENTATION_STREAM)
        fake = self._augment(fake, batch, FAKE_AUGMENTATION_STREAM)
        penalised = args.r1_weight > 0 and update % args.r1_interval == 0
        real = real.detach().requires_grad_(penalised)
        real_logits, fake_logits = self._logits(real), self._logits(fake)
        parts = {
            "generator_loss": generator_loss(fake_logits),
            "discriminator_loss": discriminator_loss(real_logits, fake_logits),
            "discriminator_accuracy": discriminator_accuracy(real_logits, fake_logits, 0.0)["accuracy"],
        }
        total = parts["generator_loss"] + parts["discriminator_loss"]
        of_discriminator = parts["discriminator_loss"]
        if penalised:
            parts["r1_penalty"] = r1_penalty(real_logits, real, args.r1_weight)
            of_discriminator = of_discriminator + args.r1_interval * parts["r1_penalty"]
        self.optimizer.backward(DISCRIMINATOR, share * of_discriminator, retain_graph=True)
        self.optimizer.backward(GENERATOR, share * parts["generator_loss"])
        if CONTROLLER in self.model.training_only:
            parts["augmentation_probability"] = self._adapt(real_logits.detach(), last)
        return total.detach(), {name: value.detach() for name, value in parts.items()}

    def _generate(self, generator: Any, batch: dict[str, Tensor], update: int) -> Tensor:
        """An image for each of the batch, of latents (and layer noise) keyed by update and image."""
        index, dtype = batch["index"], batch["pixel_values"].dtype
        inputs = {"latents": keyed_normal(self.data_seed, update, index, LATENT_STREAM, generator.config.latent_size)}
        if noise_size := getattr(generator, "noise_size", 0):
            inputs["noise"] = keyed_normal(self.data_seed, update, index, NOISE_STREAM, noise_size)
        with self.autocast():
            images = generator(**{name: drawn.to(dtype) for name, drawn in inputs.items()}, return_dict=True).images
        return full_precision(images)

    def _augment(self, images: Tensor, batch: dict[str, Tensor], stream: int) -> Tensor:
        if self.operations is None:
            return images
        draws = keyed_uniform(self.data_seed, self.state.global_step, batch["index"], stream, self.operations.DRAWS)
        adaptive = CONTROLLER in self.model.training_only
        return self.operations(images, draws, self._controller.probability if adaptive else 1.0)

    @property
    def _controller(self) -> Any:
        return self.model.training_only[CONTROLLER]

    def _logits(self, images: Tensor) -> Tensor:
        with self.autocast():
            logits = self.model.students[1](images, return_dict=True).logits
        return full_precision(logits)

    def _adapt(self, real_logits: Tensor, last: bool) -> Tensor:
        """Show the controller this micro-batch, of all ranks; gives the probability that it was augmented with.

        That moves at the end of every n-th update, so that all micro-batches of one update are augmented alike.
        """
        controller, used = self._controller, self._controller.probability.clone()
        seen = torch.stack([real_logits.sign().sum(), torch.ones_like(real_logits).sum()])
        if world_size() > 1:
            dist.all_reduce(seen)
        controller.observe(*seen)
        if last and (self.state.global_step + 1) % self.args.ada_interval == 0:
            controller.adapt()
        return used

    def _follow_generator(self) -> None:
        args = self.args
        images = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seen = images * self.state.global_step
        decay = average_decay(images, seen, 1000 * args.ema_half_life, args.ema_ramp_up)
        follow(self.model.students[0], self.model.training_only[GENERATOR], decay)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def evaluation_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """D's logits of each image and of one generated for it; what the judge, if any, says of both."""
        images = batch["pixel_values"]
        fake = self._generate(self.model.students[0], batch, EVALUATION)
        outputs = {"real_logits": self._logits(images), "fake_logits": self._logits(fake)}
        if self.judge is not None:
            with torch.autocast(images.device.type, enabled=False):
                verdict, known = self.judge(fake.clamp(-1, 1)), self.judge(images)  # as `sample` gives them
            outputs["probabilities"] = verdict.probabilities
            if verdict.features is not None and known.features is not None:
                outputs |= {"fake_features": verdict.features, "real_features": known.features}
        return outputs

    def evaluation_metrics(self, outputs: dict[str, Tensor], labels: Tensor) -> dict[str, float]:
        """Both losses and the `discriminator_accuracy`; with a judge also its confidence and its Fréchet distance.

        `frechet_distance` is between as many generated images as there are real ones and these, in the judge's
        features; `judge_confidence` the mean of its highest probability; `smallest_judge_share` the share of
        generated images that it takes for the class that it finds least of. There is no `loss`: that of a game does
        not say which model is best.
        """
        real, fake = outputs["real_logits"], outputs["fake_logits"]
        metrics = {
            "generator_loss": generator_loss(fake).item(),
            "discriminator_loss": discriminator_loss(real, fake).item(),
            "discriminator_accuracy": discriminator_accuracy(real, fake, 0.0)["accuracy"].item(),
        }
        if "probabilities" in outputs:
            judged = judge_statistics(outputs["probabilities"])
            metrics["judge_confidence"] = judged.pop("judge_confidence")
            metrics["smallest_judge_share"] = min(judged.values())
        if "fake_features" in outputs:
            metrics["frechet_distance"] = frechet_distance(outputs["fake_features"], outputs["real_features"])
        return metrics

    def predictions(self, outputs: dict[str, Tensor]) -> Tensor:
        """D's logits (N,) of the images."""
        return outputs["real_logits"]
