"""Squeeze-and-span's speed: its step against its parts in bare PyTorch, and against a step on kept samples.

Sizes are those of the recipe `cifar10_cpu`: a ResNet-20 learns from DCGAN's generator and from random 32x32 images, in
batches of 256, half of them synthetic. Steps that are compared take turns.
"""

import contextlib
import tempfile
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hfkd.data import ImageColumns, ImageSource, Preprocessing, ViewAugmentation, make_source
from hfkd.models import HfkdDcganGeneratorConfig, HfkdDcganGeneratorModel, build_student
from hfkd.models.squeeze_module import Projector, SqueezeModule
from hfkd.trainers.memory import keep_freed_memory
from hfkd.trainers.squeeze_and_span import SqueezeAndSpanConfig, SqueezeAndSpanTrainer

from .timing import Measured
from .turns import WARMUP, time_against


STUDENT, SIZE, BATCH, LATENTS = "resnet20", 32, 256, 128
HEADS: dict[str, Any] = {
    "representation_size": 512,
    "squeeze_hidden_size": 512,
    "squeeze_depth": 3,
    "projector_layers": 5,
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VIEWS = ViewAugmentation()
PARTS = "generator, augmentation, three student passes, squeeze module, optimizer"


def benchmark(repeats: int) -> list[Measured]:
    """The rows of squeeze-and-span, in both precisions."""
    keep_freed_memory()
    rows = []
    for bf16 in tqdm([False, True], desc="benchmark", unit="precision"):
        precision = "bf16, channels_last" if bf16 else "fp32"
        fresh, kept = (step_against_parts(repeats, bf16=bf16, pool=pool) for pool in (False, True))
        what = "squeeze-and-span step"
        rows.append(Measured(f"{what} / its parts in bare PyTorch ({PARTS}), {precision}", fresh, "x", 1.1))
        # No bound: it is the generator's share of a step, and the making of the pool is in none of these steps.
        rows.append(Measured(f"{what} / step on samples out of generated_pool_size, {precision}", fresh / kept))
    return rows


def step_against_parts(repeats: int, *, bf16: bool, pool: bool = False) -> float:
    """Median over steps of the trainer's time over that of `Parts.step`, taken in turn within one run.

    With a `pool` the trainer's samples are made in a first step, which is not counted.
    """
    source = random_images(BATCH * (WARMUP + repeats))  # one epoch, and so one pool
    with tempfile.TemporaryDirectory() as folder:
        config = SqueezeAndSpanConfig(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-4,  # stays finite on random images
            generated_pool_size=BATCH // 2 if pool else 0,
            bf16=bf16,
            channels_last=bf16,
            save_strategy="no",
            logging_steps=10,
            disable_tqdm=True,
            max_steps=WARMUP + repeats,
            **HEADS,
        )
        trainer = SqueezeAndSpanTrainer(make_student(), make_generator(), config, source)
        return time_against(trainer, Parts(source.variant(views=2), config).step)


def random_images(count: int) -> ImageSource:
    """In colour, without labels."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image()})
    dataset = datasets.Dataset.from_dict({"image": list(pixels)}, features=features)
    preprocessing = Preprocessing.from_statistics("cifar10", SIZE)
    return make_source(dataset, ImageColumns("image", None, None), preprocessing, augmentation=VIEWS)


def make_student() -> PreTrainedModel:
    return build_student(STUDENT, class_names=("0", "1"), image_size=SIZE, seed=0).base_model


def make_generator() -> HfkdDcganGeneratorModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return HfkdDcganGeneratorModel(HfkdDcganGeneratorConfig(image_size=SIZE, latent_size=LATENTS)).eval()


class Parts:
    """What a step is made of, one after the other; each backward pass starts from a random gradient, without a loss.

    Args:
        source: of real images, two views each.
        config: of the trainer that this is compared with.
    """

    def __init__(self, source: ImageSource, config: SqueezeAndSpanConfig) -> None:
        self.source, self.bf16, self.steps = source, config.bf16, 0
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.generator, self.student = make_generator(), make_student()
        blocks: Any = self.generator.blocks
        channels = [block[0].out_channels for block in blocks]
        width, size = self.student.config.hidden_sizes[-1], config.representation_size
        self.squeeze = SqueezeModule(channels, size, config.squeeze_hidden_size, config.squeeze_depth)
        self.projector = Projector(width, size, config.projector_layers)
        trained: list[Any] = [self.student, self.squeeze, self.projector]
        for network in (self.generator, *trained):
            network.to(device=DEVICE, memory_format=self.layout)
        for network in trained:
            network.train()
        self.optimizer = torch.optim.SGD(
            [parameter for network in trained for parameter in network.parameters()],
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.gradient = 1e-6 * torch.randn(BATCH // 2, size, device=DEVICE)

    def step(self) -> None:
        number = torch.arange(BATCH // 2, device=DEVICE) + self.steps * (BATCH // 2)
        index, epoch = number % len(self.source), torch.zeros_like(number)
        images, features = self.generate(len(index))
        self.backward(self.represent_features(features))
        pixels = VIEWS((images.clamp(-1, 1) + 1) * 127.5, 0, epoch, index)
        real = self.source.materialise({"key": torch.stack([epoch, index], dim=1)}, device=DEVICE)
        normalised = self.source.preprocessing.normalize(pixels, torch.float32)
        for view in (normalised, real["pixel_values"], real["pixel_values_2"]):
            self.backward(self.represent(view))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.bf16)

    @torch.no_grad()
    def generate(self, count: int) -> tuple[Tensor, list[Tensor]]:
        """Images, and the features of each block averaged over positions."""
        with self.autocast():
            output = self.generator(torch.randn(count, LATENTS, device=DEVICE))
        return output.images.float(), [block.mean(dim=(2, 3)).float() for block in output.block_features]

    def represent_features(self, features: list[Tensor]) -> Tensor:
        with self.autocast():
            return self.squeeze(features)

    def represent(self, pixel_values: Tensor) -> Tensor:
        with self.autocast():
            features = self.student(pixel_values.contiguous(memory_format=self.layout)).pooler_output
            return self.projector(features.flatten(1))

    def backward(self, representation: Tensor) -> None:
        representation.float().backward(self.gradient)
