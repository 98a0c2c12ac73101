"""AFD's speed: the trainer against a bare loop, its step against plain cross-entropy steps, and the augmentation."""

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hfkd.data import Augmentation, ImageColumns, ImageSource, Preprocessing, make_source
from hfkd.models import build_student
from hfkd.trainers.online_adversarial import OnlineAdversarialConfig, OnlineAdversarialTrainer

from .timing import Measured, measure
from .turns import WARMUP, time_against


STUDENTS, CLASSES, SIZE, BATCH = ("resnet20", "resnet20"), 10, 32, 128
VANILLA = {"kl_weight": 0.0, "feature_loss": "none"}
AUGMENTATION = Augmentation(crop_padding=4, padding_mode="reflect", horizontal_flip=True)


def benchmark(repeats: int) -> list[Measured]:
    """The rows that concern AFD, with a ResNet-20 pair on random 32x32 images in batches of 128."""
    source = _random_images()
    with tqdm(total=3, desc="benchmark", unit="row") as bar:
        overhead = trainer_against_bare_loop(source, VANILLA, repeats)
        bar.update()
        step = trainer_against_bare_loop(source, {}, repeats)
        bar.update()
        augmentation = augmentation_speed_up(source, repeats)
        bar.update()
    return [
        Measured("trainer / bare PyTorch loop, cross-entropy of the pair", overhead, "x", 1.05),
        Measured("AFD step / bare cross-entropy steps of the same pair", step, "x", 1.9),
        Measured("batched augmentation / per-sample PIL pipeline, images per second", augmentation, "x", 10.0, True),
    ]


def _random_images() -> ImageSource:
    pixels = np.random.default_rng(0).integers(0, 256, (2 * BATCH, SIZE, SIZE, 3), dtype=np.uint8)
    names = [str(number) for number in range(CLASSES)]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    labels = [number % CLASSES for number in range(len(pixels))]
    dataset = Dataset.from_dict({"image": list(pixels), "label": labels}, features=features)
    columns = ImageColumns("image", "label", tuple(names))
    preprocessing = Preprocessing.from_statistics("cifar10", SIZE)
    return make_source(dataset, columns, preprocessing, augmentation=AUGMENTATION)


def _build_students() -> list[PreTrainedModel]:
    names = [str(number) for number in range(CLASSES)]
    return [build_student(name, class_names=names, image_size=SIZE, seed=k) for k, name in enumerate(STUDENTS)]


def trainer_against_bare_loop(source: ImageSource, settings: dict[str, Any], repeats: int) -> float:
    """Median over steps of the trainer's step time over that of a bare loop's step, taken in turn within one run.

    The bare loop trains equal students on equal batches by cross-entropy alone, and does nothing else.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = OnlineAdversarialConfig(
            output_dir=folder,
            max_steps=WARMUP + repeats,
            per_device_train_batch_size=BATCH,
            eval_strategy="no",
            save_strategy="no",
            logging_steps=10,
            disable_tqdm=True,
            **settings,
        )
        trainer = OnlineAdversarialTrainer(_build_students(), args=config, train_dataset=source)
        return time_against(trainer, BareLoop(source, _build_students(), config).step)


class BareLoop:
    """Cross-entropy training of each student by itself, as one writes it in plain PyTorch."""

    def __init__(self, source: ImageSource, students: list[PreTrainedModel], config: OnlineAdversarialConfig) -> None:
        self.source, self.device, self.steps = source, config.device, 0
        self.students = [student.to(config.device).train() for student in students]
        self.optimizers = [
            torch.optim.SGD(
                student.parameters(),
                lr=config.learning_rate,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
            )
            for student in students
        ]

    def step(self) -> None:
        index = torch.arange(BATCH) + BATCH * (self.steps % 2)
        keys = torch.stack([torch.full_like(index, self.steps // 2), index], dim=1)
        batch = self.source.materialise({"key": keys}, device=self.device)
        for student, optimizer in zip(self.students, self.optimizers, strict=True):
            loss = F.cross_entropy(student(batch["pixel_values"]).logits, batch["labels"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.steps += 1


def augmentation_speed_up(source: ImageSource, repeats: int) -> float:
    """Images per second of the batched pipeline over those of one that treats PIL images one by one.

    Both pad by four mirrored pixels, crop, flip and normalise a batch. The images are decoded beforehand, which
    favours the per-sample pipeline, as the batched one decodes each image once for a whole training.
    """
    index = torch.arange(BATCH)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keys = torch.stack([torch.zeros_like(index), index], dim=1).to(device)
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH, SIZE, SIZE, 3), dtype=np.uint8)
    images = [PILImage.fromarray(image) for image in pixels]
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (source.preprocessing.mean, source.preprocessing.std)
    )
    pipelines: dict[str, Callable[[], object]] = {
        "batched": lambda: source.materialise({"key": keys}, device=device),
        "per sample": lambda: torch.stack([_augment_one(image, mean, std) for image in images]).to(device),
    }
    return measure(pipelines, repeats=max(repeats, 20)).ratio("per sample", "batched")


def _augment_one(image: PILImage.Image, mean: Tensor, std: Tensor) -> Tensor:
    padding = AUGMENTATION.crop_padding
    padded = PILImage.fromarray(np.pad(np.asarray(image), ((padding, padding), (padding, padding), (0, 0)), "reflect"))
    top, left = torch.randint(2 * padding + 1, (2,)).tolist()
    cropped = padded.crop((left, top, left + SIZE, top + SIZE))
    if torch.rand(1) < 0.5:
        cropped = cropped.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(cropped)).permute(2, 0, 1).float().div_(255)
    return pixels.sub_(mean).div_(std)
