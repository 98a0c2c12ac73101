"""Who says what class a generated image shows: any classifier, or nearest neighbours of real images."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from transformers import PreTrainedModel

from hfkd.data import Preprocessing
from hfkd.errors import InputError
from hfkd.models.adapter import find_classifier
from hfkd.models.probing import undisturbed


NEIGHBOURS = 5


class Verdict(NamedTuple):
    """Attributes:
    probabilities: (N, K) of the K classes; rows add up to 1.
    features: (N, D), a space for a Fréchet distance; None from a judge without one.
    """

    probabilities: Tensor
    features: Tensor | None = None


# Takes images (N, C, H, W) in [-1, 1], and answers on their device. The judge of a generator should have been trained
# on other images than the generator's parent classifier: else the two share their mistakes.
Judge = Callable[[Tensor], Verdict]


class NearestNeighbourJudge:
    """The vote of the 5 real images with the nearest pixels (Euclidean distance), without features.

    It always finds neighbours, and so is forgiving: look at the correlations and the pictures too.

    Args:
        images: (M, C, H, W) in [-1, 1], disjoint from the images that it is to judge.
        labels: (M,) class numbers below `num_classes`.
        num_classes: K.
    """

    def __init__(self, images: Tensor, labels: Tensor, num_classes: int) -> None:
        self.num_classes = num_classes
        self._shape = tuple(images.shape[1:])
        self._neighbours = KNeighborsClassifier(min(NEIGHBOURS, len(images)))
        self._neighbours.fit(images.flatten(1).cpu().numpy(), labels.cpu().numpy())

    def __call__(self, images: Tensor) -> Verdict:
        """Shares of the votes as probabilities. Raises `InputError` for images of another shape than its own."""
        if tuple(images.shape[1:]) != self._shape:
            raise InputError(
                f"images of shape {tuple(images.shape[1:])} before a nearest-neighbour judge that knows images of "
                f"shape {self._shape}: give it real images of the same shape"
            )
        votes = torch.from_numpy(self._neighbours.predict_proba(images.flatten(1).cpu().numpy()))
        shares = torch.zeros(len(images), self.num_classes, dtype=votes.dtype)
        shares[:, torch.from_numpy(self._neighbours.classes_)] = votes
        return Verdict(shares.to(images.device))


class ClassifierJudge:
    """Any image classifier, in evaluation mode; its features are what its last linear layer takes.

    Args:
        model: an image classifier of transformers, on any device.
        preprocessing: size, channels and statistics of the images that it was trained on. Grey images are repeated
            for a model of three channels.
        batch_size: images per forward pass.
    """

    def __init__(self, model: PreTrainedModel, preprocessing: Preprocessing, batch_size: int = 256) -> None:
        self.model = model
        self.preprocessing = preprocessing
        self.batch_size = batch_size
        self._last = find_classifier(model)

    def __call__(self, images: Tensor) -> Verdict:
        """Softmax of the logits, and features. Raises `InputError` for images that the model was not made for."""
        taken: list[Tensor] = []
        probabilities: list[Tensor] = []
        parameter = next(self.model.parameters())

        def keep(module: Any, inputs: tuple[Tensor, ...]) -> None:
            taken.append(inputs[0].flatten(1).to(images.device))

        hook = self._last.register_forward_pre_hook(keep)
        try:
            with undisturbed(self.model):
                for batch in self._as_input(images).split(self.batch_size):
                    logits = self.model(pixel_values=batch.to(parameter.device, parameter.dtype)).logits
                    probabilities.append(logits.softmax(dim=-1).to(images.device))
        finally:
            hook.remove()
        return Verdict(torch.cat(probabilities), torch.cat(taken))

    def _as_input(self, images: Tensor) -> Tensor:
        """u(x) = ((x + 1) / 2 - mean) / std: the images as the model saw them in training."""
        wanted = self.preprocessing
        channels, height, width = images.shape[1:]
        if (height, width) != (wanted.image_size,) * 2 or channels not in (1, wanted.num_channels):
            raise InputError(
                f"images of {height}x{width} pixels with {channels} channels before {type(self.model).__name__}, "
                f"which takes {wanted.image_size}x{wanted.image_size} with {wanted.num_channels}: give a classifier "
                "of such images as the generator makes"
            )
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (wanted.mean, wanted.std))
        return ((images + 1) / 2 - mean) / std
