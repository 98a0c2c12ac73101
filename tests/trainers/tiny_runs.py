"""Tiny, real parts of a run on the digits, shared by the trainer tests."""

from functools import cache

import torch

from hfkd.data import Augmentation, DataArguments, build_sources, load_image_datasets
from hfkd.models import HfkdResNetConfig, HfkdResNetForImageClassification


NO_AUGMENTATION = Augmentation()


@cache
def digit_sources(num_channels=None):
    """200 digits to train on, augmented by crops, and 100 to test on; grey, or with the channels of stock models."""
    arguments = DataArguments(
        test_split="train[1000:1100]",
        train_split="train[:200]",
        validation_size=0,
        augmentation="crop",
        crop_padding=1,
    )
    return build_sources(load_image_datasets(arguments), arguments, num_channels=num_channels)


def tiny_resnet(seed, width=4, norm="batch", dtype=torch.float32, depths=(1, 1), num_labels=10):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = HfkdResNetConfig(
            depths=list(depths),
            hidden_sizes=[width * 2**stage for stage in range(len(depths))],
            num_channels=1,
            image_size=8,
            norm=norm,
            num_labels=num_labels,
        )
        return HfkdResNetForImageClassification(config).to(dtype)
