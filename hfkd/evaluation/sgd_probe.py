"""The linear probe of the self-supervised literature: a linear layer, trained by SGD on augmented images.

The protocol is that of Squeeze and Span (Yang et al., NeurIPS 2022, arXiv 2211.03000, section 5.1), which follows
MoCo's: the backbone is frozen and stays in evaluation mode, and each epoch sees new crops of the training images.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hfkd.data import ImageSource, KeyedSampler, collate, keyed_permutation
from hfkd.errors import InputError
from hfkd.evaluation.cohort import accuracy
from hfkd.evaluation.inference import outputs_over
from hfkd.evaluation.linear_probe import LinearHead


MOMENTUM = 0.9
INITIAL_STD = 0.01
TRUST = 0.001  # of LARS

Batches = Callable[[int], Iterator[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class SGDProbeSettings:
    """Of the paper's code for CIFAR, whose text has them for all data. Momentum is 0.9, weight decay 0.

    Attributes:
        optimizer: `sgd`, or `lars`, which the code has for STL-10 with batches of 4096 and a rate of 1.6: SGD whose
            gradient of each tensor p is scaled by 0.001 |p| / |gradient|, but not where one of them is 0.
        learning_rate: at the first epoch e = 0; that of epoch e is multiplied by (1 + cos(pi e / epochs)) / 2. For
            other batch sizes the code multiplies it by batch_size / 256.
        batch_size: images of a step, in the backbone too.
        epochs: passes over the training images, in an order of their own each.
        seed: of the first weights, N(0, 0.01^2), and of the order.
    """

    optimizer: Literal["sgd", "lars"] = "sgd"
    learning_rate: float = 30.0
    batch_size: int = 256
    epochs: int = 90
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in ("sgd", "lars"):
            raise InputError(f"optimizer={self.optimizer!r} of the probe is unknown: choose sgd or lars")
        if self.learning_rate <= 0 or self.batch_size < 1 or self.epochs < 1:
            raise InputError(
                f"learning_rate={self.learning_rate}, batch_size={self.batch_size}, epochs={self.epochs}: the probe "
                "needs all above 0"
            )

    def rate(self, epoch: int) -> float:
        """The learning rate of `epoch`, from 0."""
        return self.learning_rate * (1 + math.cos(math.pi * epoch / self.epochs)) / 2


class SGDProbe(NamedTuple):
    """A fitted layer, and its test accuracy in [0, 1] after the last epoch (what counts) and after the best one."""

    head: LinearHead
    accuracy: float
    best_accuracy: float


def fit_sgd_probe(
    features: Callable[[Tensor], Tensor],
    train: ImageSource,
    test: ImageSource,
    num_classes: int,
    settings: SGDProbeSettings | None = None,
    device: torch.device | str = "cpu",
) -> SGDProbe:
    """Train a linear layer on a frozen backbone, and measure it after every epoch.

    Args:
        features: from images (N, C, H, W) on `device` to features (N, D); it must not depend on a training mode.
        train: labelled images, under the augmentation that the protocol wants: random resized crops (0.08, 1) and
            flips. Of a source without augmentation the features are made once, which a CPU can afford.
        test: labelled images, which are seen without augmentation.
        num_classes: C, one more than the greatest label.
        settings: of the optimizer.
        device: where the features are made and the layer is trained.

    Raises:
        InputError: no labels, or a rate at which the layer diverges.
    """
    settings, device = settings or SGDProbeSettings(), torch.device(device)
    test_features, test_labels = outputs_over(test, features, device, settings.batch_size)
    if train.labels is None or test_labels is None:
        raise InputError("the linear probe needs labels, and the images have none")
    test_features, test_labels = test_features.to(device), test_labels.to(device)
    prepare = _augmented if train.augmentation else _stored
    batches = prepare(features, train, settings, device)
    layer = _fresh_layer(test_features.shape[1], num_classes, settings.seed).to(device)
    accuracies = []
    for _ in _epochs(layer, batches, settings):
        with torch.no_grad():
            accuracies.append(accuracy(layer(test_features), test_labels))
    if not all(parameter.isfinite().all() for parameter in layer.parameters()):
        raise InputError(f"learning_rate={settings.learning_rate}: the linear probe diverged: give a lower one")
    head = LinearHead(layer.weight.detach().cpu(), layer.bias.detach().cpu())
    return SGDProbe(head, accuracies[-1], max(accuracies))


def _epochs(layer: nn.Linear, batches: Batches, settings: SGDProbeSettings) -> Iterator[None]:
    """Train epoch by epoch."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=settings.learning_rate, momentum=MOMENTUM)
    for epoch in tqdm(range(settings.epochs), desc="Linear probe", unit="epoch", delay=2, leave=False):
        optimizer.param_groups[0]["lr"] = settings.rate(epoch)
        for inputs, labels in batches(epoch):
            optimizer.zero_grad()
            F.cross_entropy(layer(inputs), labels).backward()
            if settings.optimizer == "lars":
                scale_by_trust(layer)
            optimizer.step()
        yield


@torch.no_grad()
def scale_by_trust(module: nn.Module) -> None:
    """LARS (You et al., arXiv 1708.03888, Algorithm 1, without decay): each gradient g of p times 0.001 |p| / |g|."""
    for parameter in module.parameters():
        assert parameter.grad is not None  # of a backward pass before
        size, slope = parameter.norm(), parameter.grad.norm()
        parameter.grad.mul_(torch.where((size > 0) & (slope > 0), TRUST * size / slope, torch.ones_like(size)))


def _fresh_layer(width: int, num_classes: int, seed: int) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, width, num_classes)  # the global generator stays as it is
    with torch.no_grad():
        layer.weight.normal_(std=INITIAL_STD, generator=torch.Generator().manual_seed(seed))
        layer.bias.zero_()
    return layer


def _augmented(
    features: Callable[[Tensor], Tensor], source: ImageSource, settings: SGDProbeSettings, device: torch.device
) -> Batches:
    """Features of images that are new in every epoch."""
    source = source.variant(views=1)
    sampler = KeyedSampler(len(source), seed=settings.seed)
    loader = DataLoader(source, batch_size=settings.batch_size, sampler=sampler, collate_fn=collate)

    def epoch_of_batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        sampler.set_epoch(epoch)
        for keys in loader:
            batch = source.materialise(keys, device=device)
            with torch.no_grad():
                inputs = features(batch["pixel_values"]).float()
            yield inputs, batch["labels"]

    return epoch_of_batches


def _stored(
    features: Callable[[Tensor], Tensor], source: ImageSource, settings: SGDProbeSettings, device: torch.device
) -> Batches:
    """Features that are made once, in the order that the epoch's images would have."""
    inputs, labels = outputs_over(source, features, device, settings.batch_size)
    assert labels is not None  # checked by the caller
    inputs, labels = inputs.to(device), labels.to(device)
    order = partial(keyed_permutation, settings.seed, n=len(inputs))

    def epoch_of_batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in order(epoch).to(device).split(settings.batch_size):
            yield inputs[rows], labels[rows]

    return epoch_of_batches
