"""Speed of distillation: an epoch on kept logits of a teacher against one that runs the teacher at each step."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hfkd.data.teacher_cache import open_teacher_cache
from hfkd.losses.online_adversarial import distillation_kl
from hfkd.models import build_student
from hfkd.trainers.memory import keep_freed_memory
from hfkd.trainers.networks import FrozenTeacher

from .benchmark_gradient_features import CLASSES, DEVICE, SIZE, random_images
from .timing import Measured, Timings, measure


TEACHER, STUDENT, BATCH, EPOCH = "resnet56", "resnet20", 128, 4
TEMPERATURE = 4.0


def benchmark(repeats: int) -> list[Measured]:
    """The rows of the cached teacher, in float32 and in bfloat16 with channels last, in batches of 128 images."""
    keep_freed_memory()
    rows = []
    with tqdm(total=2, desc="benchmark", unit="row") as bar:
        for bf16, precision in ((False, "fp32"), (True, "bf16, channels_last")):
            value = epochs(repeats, bf16=bf16).ratio("live", "cached")
            what = f"epoch with a live teacher / with a cached one, {TEACHER} -> {STUDENT}, {precision}"
            rows.append(Measured(what, value, "x", 1.5, True))
            bar.update()
    return rows


class Step:
    """One update of the student by cross-entropy and T^2 KL to the teacher's logits, with SGD."""

    def __init__(self, bf16: bool) -> None:
        self.layout = torch.channels_last if bf16 else torch.contiguous_format
        self.bf16 = bf16
        self.student = network(STUDENT).train().to(device=DEVICE, memory_format=self.layout)
        self.teacher = FrozenTeacher(network(TEACHER).to(device=DEVICE, memory_format=self.layout))
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def teacher_logits(self, pixel_values: Tensor) -> Tensor:
        """(N, K), in float32."""
        return self._logits(self.teacher, pixel_values)

    def take(self, pixel_values: Tensor, labels: Tensor, teacher_logits: Tensor) -> None:
        logits = self._logits(self.student, pixel_values)
        loss = F.cross_entropy(logits, labels) + distillation_kl(logits, teacher_logits, TEMPERATURE)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _logits(self, model: Any, pixel_values: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.bf16):
            return model(pixel_values.contiguous(memory_format=self.layout)).logits.float()


def network(preset: str) -> PreTrainedModel:
    """A residual network for images of 32x32 pixels, its weights random."""
    return build_student(preset, class_names=CLASSES, image_size=SIZE, seed=0)


def epochs(repeats: int, *, bf16: bool = False) -> Timings:
    """Seconds of an epoch with the teacher in it (`live`) and on its kept logits (`cached`), taken in turn.

    Images, student, loss and optimizer are the same; images are not augmented, as kept logits ask for.
    """
    step, source = Step(bf16), random_images(EPOCH * BATCH)
    index = torch.arange(len(source), device=DEVICE)

    def batch_of(rows: Tensor) -> dict[str, Tensor]:
        return source.materialise({"key": torch.stack([torch.zeros_like(rows), rows], dim=1)})

    def encode(inputs: Mapping[str, Any]) -> Tensor:
        return step.teacher_logits(source.materialise(inputs, device=DEVICE)["pixel_values"])

    with tempfile.TemporaryDirectory() as folder:
        cache = open_teacher_cache(Path(folder) / "cache", source, encode, {})

        def live() -> None:
            for batch in map(batch_of, index.split(BATCH)):
                step.take(batch["pixel_values"], batch["labels"], step.teacher_logits(batch["pixel_values"]))

        def cached() -> None:
            for batch in map(batch_of, index.split(BATCH)):
                step.take(batch["pixel_values"], batch["labels"], cache.gather(batch["index"]))

        return measure({"live": live, "cached": cached}, repeats)
