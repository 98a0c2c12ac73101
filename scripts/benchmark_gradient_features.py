"""Speed of gradient features: their step against fine-tuning of the same layers, and activations that are kept.

Fine-tuning runs PyTorch's layers as they are, the lower ones without gradients, with the same head, loss and
optimizer. All steps take one batch of random images, and the steps that are compared take turns.
"""

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hfkd.data import ImageColumns, Preprocessing, ResidentImages
from hfkd.data.activation_cache import open_activation_cache
from hfkd.models import (
    HfkdBiganEncoderConfig,
    HfkdBiganEncoderForImageClassification,
    build_gradient_features,
    build_student,
)
from hfkd.models.activation_cut import ActivationCut
from hfkd.models.tangents import FastLayers
from hfkd.trainers.memory import keep_freed_memory

from .timing import Measured, Timings, measure


CLASSES, SIZE, BATCH, EPOCH = [str(number) for number in range(10)], 32, 128, 4
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def benchmark(repeats: int) -> list[Measured]:
    """The rows of gradient features, in float32 and in bfloat16 with channels last, in batches of 128 images.

    The networks are ResNet-18 for CIFAR with its last block linearised, and ALI's encoder with its last one, two and
    three convolutions, whose inputs are given: the layers below are left out of both steps. Activations are kept of
    the layers below the last block of ResNet-56 and below the last convolution of the encoder.
    """
    keep_freed_memory()
    rows = []
    with tqdm(total=18, desc="benchmark", unit="row") as bar:
        for bf16 in (False, True):
            for row in _rows(repeats, bf16):
                rows.append(row)
                bar.update()
    return rows


def _rows(repeats: int, bf16: bool) -> Iterator[Measured]:
    precision = "bf16, channels_last" if bf16 else "fp32"
    value = step_against_fine_tuning(resnet("resnet18_cifar"), 1, repeats, bf16=bf16)
    yield Measured(f"step / fine-tuning step, ResNet-18's last block with all below, {precision}", value, "x", 1.3)
    for layers, bound in ((1, 1.3), (2, 1.6), (3, 1.6)):
        value = step_against_fine_tuning(encoder(), layers, repeats, bf16=bf16, top_alone=True)
        what = f"top {layers} of ALI's encoder alone, {precision}"
        yield Measured(f"step / fine-tuning step, {what}", value, "x", bound)
        # No bound: multiply-adds alone give (5K - 2) / (3K - 1), which is 1.5, 1.6 and 1.63.
        value = step_against_fine_tuning(encoder(), layers, repeats, bf16=bf16, top_alone=True, fast=True)
        yield Measured(f"step / fine-tuning step with the same matrix product, {what}", value)
    value = epoch_speed_up(resnet("resnet56"), repeats, bf16=bf16)
    yield Measured(f"epoch / epoch on kept activations, ResNet-56's last block, {precision}", value, "x", 5.0, True)
    # No bound: with one layer of five on top, what is left to do limits the gain.
    value = epoch_speed_up(encoder(), repeats, bf16=bf16)
    yield Measured(f"epoch / epoch on kept activations, top 1 of ALI's encoder, {precision}", value)


def resnet(preset: str) -> PreTrainedModel:
    """A residual network for images of 32x32 pixels, its weights random."""
    return build_student(preset, class_names=CLASSES, image_size=SIZE, seed=0).eval()


def encoder() -> PreTrainedModel:
    """ALI's encoder for CIFAR-10, its weights random."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return HfkdBiganEncoderForImageClassification(HfkdBiganEncoderConfig(num_labels=len(CLASSES))).eval()


class Step:
    """One update of a model: forward pass, cross-entropy, backward pass, Adam.

    Args:
        base: copied.
        theta2: number of blocks.
        mode: as in `build_gradient_features`.
        bf16: bfloat16 autocast, with channels last.
        fast: let fine-tuning compute its layers as gradient features do.
    """

    def __init__(self, base: PreTrainedModel, theta2: int, mode: str, bf16: bool, fast: bool = False) -> None:
        self.model = build_gradient_features(copy.deepcopy(base), theta2, class_names=CLASSES, mode=mode).train()
        self.layout = torch.channels_last if bf16 else torch.contiguous_format
        self.model.to(device=DEVICE, memory_format=self.layout)
        self.bf16, self.fast = bf16, fast
        self.cut = ActivationCut(self.model.backbone)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=1e-5, fused=True)

    def autocast(self) -> torch.autocast:
        return torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.bf16)

    def below(self, pixel_values: Tensor) -> Tensor:
        """What the linearised layers get of `pixel_values` (N, C, H, W)."""
        with self.autocast():
            return self.cut.below(pixel_values.contiguous(memory_format=self.layout))

    def take(self, inputs: Tensor, labels: Tensor, *, activations: bool = False) -> None:
        """One update on images, or on `activations` of the layers below."""
        with self.autocast(), FastLayers() if self.fast else contextlib.nullcontext():
            forward: Callable[[Tensor], Any] = self.cut.above if activations else self.model.backbone
            features = forward(inputs.contiguous(memory_format=self.layout))
        logits = self.model.logits_of(features.pooler_output, features.tangent)
        F.cross_entropy(logits.float(), labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def step_against_fine_tuning(
    base: PreTrainedModel,
    theta2: int,
    repeats: int,
    *,
    bf16: bool = False,
    top_alone: bool = False,
    fast: bool = False,
) -> float:
    """Median time of a step over that of a fine-tuning step of the same layers, with the layers below or without.

    Part of what is gained in the encoder is its last convolution as a matrix product (`FastLayers`), which PyTorch's
    layers do not do; with `fast`, fine-tuning does it too. In multiply-adds alone, K convolutions cost
    (3K - 1 + 2K - 1) / (3K - 1) of fine-tuning.
    """
    own, tuned = Step(base, theta2, "full", bf16), Step(base, theta2, "finetune", bf16, fast)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator).to(DEVICE)
    labels = torch.randint(len(CLASSES), (BATCH,), generator=generator).to(DEVICE)
    if top_alone:
        inputs = own.below(inputs)
    steps = {
        name: lambda step=step: step.take(inputs, labels, activations=top_alone)
        for name, step in (("own", own), ("tuned", tuned))
    }
    return measure(steps, repeats).ratio("own", "tuned")


def epoch_speed_up(base: PreTrainedModel, repeats: int, *, bf16: bool = False) -> float:
    """Median time of an epoch over that of an epoch on activations that lie on the disk; the last block is linearised.

    The layers below cost one forward pass, and K linearised ones 3K - 1 forward and as many backward products as they
    have weights: the gain is large for a small part of a deep network.
    """
    return _epochs(Step(base, 1, "full", bf16), repeats).ratio("images", "activations")


def _epochs(step: Step, repeats: int) -> Timings:
    source = random_images(EPOCH * BATCH)
    labels = source.labels.to(DEVICE) if source.labels is not None else torch.zeros(0)
    index = torch.arange(len(source), device=DEVICE)

    def pixels(of: Tensor) -> Tensor:
        return source.materialise({"key": torch.stack([torch.zeros_like(of), of], dim=1)})["pixel_values"]

    with tempfile.TemporaryDirectory() as folder:
        cache = open_activation_cache(
            Path(folder) / "cache", source, lambda inputs: step.below(pixels(inputs["key"][:, 1].to(DEVICE))), {}
        )

        def on_images() -> None:
            for batch in index.split(BATCH):
                step.take(pixels(batch), labels[batch])

        def on_activations() -> None:
            for batch in index.split(BATCH):
                step.take(cache.gather(batch), labels[batch], activations=True)

        return measure({"images": on_images, "activations": on_activations}, repeats)


def random_images(count: int) -> ResidentImages:
    """Of 32x32 pixels in colour, in ten classes."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    rows = {"image": list(pixels), "label": [number % len(CLASSES) for number in range(count)]}
    columns = ImageColumns("image", "label", tuple(CLASSES))
    preprocessing = Preprocessing.from_statistics("cifar10", SIZE)
    return ResidentImages(datasets.Dataset.from_dict(rows, features=features), columns, preprocessing)
