"""GBC's speed: its step against a generator step by cross-entropy, one backward pass against a loop over images, and
the trainer against a bare loop.

Steps take the same random images of a generator for 28x28 pixels and a classifier of three fully connected layers,
784-512-512-10, in batches of 256; the ones that are compared take turns.
"""

import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from hfkd.losses.generator_from_classifier import total_variation
from hfkd.models import (
    HfkdConditionalGeneratorConfig,
    HfkdConditionalGeneratorModel,
    HfkdMlpConfig,
    HfkdMlpForImageClassification,
)
from hfkd.trainers.convergence import ConvergenceConditions
from hfkd.trainers.generator_from_classifier import GeneratorFromClassifierConfig, GeneratorFromClassifierTrainer
from hfkd.trainers.memory import keep_freed_memory

from .timing import Measured, measure
from .turns import WARMUP, time_against


SIZE, CLASSES, BATCH, HIDDEN = 28, 10, 256, (512, 512)
FACTS = {"loss": 1e-4, "min_margin": 8.0, "median_margin": 10.0, "weight_decay": 0.005}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def benchmark(repeats: int) -> list[Measured]:
    """The rows of GBC, in float32, with the stationarity of all parameters."""
    keep_freed_memory()
    step, loop = "step / cross-entropy step of the same generator", "loop over the images / one weighted backward pass"
    measured = [
        lambda: Measured(f"GBC {step}", step_against_plain(repeats), "x", 4),
        lambda: Measured(f"gradient of stationarity by images: {loop}", loop_against_one_pass(repeats), "x", 15, True),
        lambda: Measured("trainer / bare PyTorch loop, GBC", trainer_against_bare_loop(repeats), "x", 1.05),
    ]
    return [row() for row in tqdm(measured, desc="benchmark", unit="row")]


def settings_in(folder: str, **settings: Any) -> GeneratorFromClassifierConfig:
    """GBC without a warm-up, which saves and evaluates nothing."""
    return GeneratorFromClassifierConfig(
        folder,
        **{
            "per_device_train_batch_size": BATCH,
            "stationarity_set": "all",
            "per_group": False,
            "warmup_updates": 0,
            "save_strategy": "no",
            "disable_tqdm": True,
            **settings,
        },
    )


def make_networks() -> tuple[HfkdConditionalGeneratorModel, HfkdMlpForImageClassification]:
    """Generator and classifier with random weights; the classifier says that it has converged."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = HfkdConditionalGeneratorModel(HfkdConditionalGeneratorConfig.for_images(SIZE, num_labels=CLASSES))
        classifier = HfkdMlpForImageClassification(
            HfkdMlpConfig(hidden_sizes=HIDDEN, num_channels=1, image_size=SIZE, num_labels=CLASSES)
        )
    classifier.config.training_facts = dict(FACTS)
    return generator, classifier


class BareLoop:
    """GBC as one writes it in plain PyTorch: draw, generate, measure, step.

    Args:
        config: the weights of the losses, and Adam's settings.
        plain: cross-entropy in the place of stationarity and duality.
    """

    def __init__(self, config: GeneratorFromClassifierConfig, *, plain: bool = False) -> None:
        self.config, self.plain = config, plain
        generator, classifier = make_networks()
        self.generator = generator.train().to(DEVICE)
        self.conditions = ConvergenceConditions(classifier, None, config, SIZE, 1).to(DEVICE)
        self.labels = torch.arange(BATCH, device=DEVICE) % CLASSES
        self.trained = list(self.generator.parameters())
        self.optimizer = torch.optim.Adam(self.trained, lr=config.learning_rate)

    def step(self) -> None:
        latents = torch.randn(BATCH, self.generator.config.latent_size, device=DEVICE)
        images = self.generator(latents, self.labels).images
        loss = self.config.total_variation_weight * total_variation(images)
        if self.plain:
            loss = loss + F.cross_entropy(self.conditions.logits(images), self.labels)
        else:
            found = self.conditions(images, self.labels)
            loss = loss + self.config.stationarity_weight * found.stationarity
            loss = loss + self.config.duality_weight * found.duality.mean()
        self.optimizer.zero_grad()
        loss.backward(inputs=self.trained)
        nn.utils.clip_grad_norm_(self.trained, self.config.max_grad_norm)
        self.optimizer.step()


def step_against_plain(repeats: int) -> float:
    """Median time of a step of the generator by GBC over that of one by cross-entropy."""
    with tempfile.TemporaryDirectory() as folder:
        config = settings_in(folder)
    steps = {"own": BareLoop(config).step, "plain": BareLoop(config, plain=True).step}
    return measure(steps, repeats).ratio("own", "plain")


class PerImage(ConvergenceConditions):
    """The same conditions with a forward and a backward pass for each image by itself."""

    def logits(self, images: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor:
        self.each = [super(PerImage, self).logits(image[None], parameters) for image in images]
        return torch.cat(self.each)

    def expected_gradients(
        self, theta: dict[str, Tensor], logits: Tensor, labels: Tensor, multipliers: Tensor | None
    ) -> dict[str, Tensor]:
        total = {name: torch.zeros_like(parameter) for name, parameter in theta.items()}
        for row, label in zip(self.each, labels, strict=True):
            own = super().expected_gradients(theta, row, label[None], multipliers)
            total = {name: total[name] + own[name] / len(labels) for name in total}
        return total


class ImagesAlone:
    """Stationarity of a batch of random images (N, 1, 28, 28), and its gradient by them, without a generator.

    Args:
        kind: of conditions.
    """

    def __init__(self, kind: type[ConvergenceConditions]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            config = settings_in(folder, temperature="margin")  # that of one image by itself is another
        self.conditions = kind(make_networks()[1], None, config, SIZE, 1).to(DEVICE)
        generator = torch.Generator().manual_seed(0)
        self.images = (2 * torch.rand(BATCH, 1, SIZE, SIZE, generator=generator) - 1).to(DEVICE)
        # The classes that it sees: with others the weights' best scale is zero, and so is all that is compared.
        self.labels = self.conditions.logits(self.images).argmax(dim=1)

    def gradient(self) -> Tensor:
        images = self.images.clone().requires_grad_()
        (found,) = torch.autograd.grad(self.conditions(images, self.labels).stationarity, images)
        return found


def loop_against_one_pass(repeats: int) -> float:
    """Median time of the gradient with a pass for each image over that with one pass for all."""
    kinds = {"loop": PerImage, "one pass": ConvergenceConditions}
    return measure({name: ImagesAlone(kind).gradient for name, kind in kinds.items()}, repeats).ratio(*kinds)


def trainer_against_bare_loop(repeats: int) -> float:
    """Median over steps of the trainer's step time over that of `BareLoop`, taken in turn within one run."""
    with tempfile.TemporaryDirectory() as folder:
        config = settings_in(folder, max_steps=WARMUP + repeats, logging_steps=10)
        trainer = GeneratorFromClassifierTrainer(*make_networks(), config)
        return time_against(trainer, BareLoop(config).step)
