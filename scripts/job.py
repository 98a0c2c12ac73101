"""What a method's set-up hands to `hfkd train`."""

from dataclasses import dataclass

from hfkd.data import ImageSource, KeyedDraws
from hfkd.trainers.base import DistillationTrainer


@dataclass
class Job:
    """A trainer that is ready to train, its training images, and the images that it is measured on at the end.

    A method without data has no training images, and is measured on draws.
    """

    trainer: DistillationTrainer
    train: ImageSource | None
    test: ImageSource | KeyedDraws | None
