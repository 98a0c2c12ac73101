"""What Squeeze-and-Span refuses before a run, and in it; what it takes that is not quite like the data."""

from types import SimpleNamespace

import pytest
import torch
from squeeze_runs import VIEWS, tiny_generator, tiny_trainer
from tiny_runs import digit_sources, tiny_resnet

from hfkd.data import Augmentation
from hfkd.errors import InputError, RunError
from hfkd.models import (
    HfkdBiganEncoderConfig,
    HfkdVaeEncoderConfig,
    HfkdVaeEncoderModel,
)
from hfkd.trainers.squeeze_and_span import SqueezeAndSpanConfig, SqueezeAndSpanTrainer


ALL_SYNTHETIC = {"synthetic_share": 1.0}
NO_DATA = SimpleNamespace(train=None, test=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"synthetic_share": 1.5}, "synthetic_share=1.5"),
        ({"synthetic_share": -0.1}, "synthetic_share=-0.1"),
        ({"synthetic_share": 0.0}, "no synthetic sample"),
        ({"synthetic_share": 0.01}, "has 0 synthetic sample"),
        ({"per_device_train_batch_size": 3}, "has 1 synthetic sample"),
        ({"per_device_train_batch_size": 10, "synthetic_share": 0.9}, "has 1 real sample"),
        ({"gradient_accumulation_steps": 2}, "raise per_device_train_batch_size"),
        ({"dataloader_drop_last": False}, "dataloader_drop_last=False"),
        ({"squeeze_depth": -1}, "squeeze_depth=-1"),
        ({"squeeze_depth": 0}, "has no effect with squeeze_depth=0"),
        ({"augment_synthetic": False, "shared_augmentation": True}, "no effect with augment_synthetic=False"),
        ({"teacher_features": "discriminator"}, "choose one of generator, latent"),
        ({"covariance_weight": -1.0}, "covariance_weight=-1.0"),
        ({"per_device_train_batch_size": 400}, "has 200 images"),
    ],
)
def test_bad_settings_are_one_line(tmp_path, settings, message):
    with pytest.raises(InputError, match=message) as caught:
        tiny_trainer(tmp_path, **settings)
    assert "\n" not in str(caught.value)


def encoder():
    return HfkdVaeEncoderModel(HfkdVaeEncoderConfig(depth=4, scales=1, num_channels=1, image_size=8))


def larger_images():
    return tiny_generator(kernel_sizes=[4, 4], strides=[1, 4])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"generator": None}, "needs a generator"),
        ({"generator": encoder()}, "without sample"),
        ({"generator": tiny_generator(num_channels=3)}, "images of 3 channel"),
        ({"generator": tiny_generator(strides=[1, 1])}, "images of 5x5 pixels and the student's are 8x8"),
        ({"generator": larger_images(), "augment_synthetic": False}, "images of 16x16"),
        ({"student": HfkdBiganEncoderConfig()}, "encoder is a HfkdBiganEncoderConfig"),
        ({"sources": NO_DATA}, "needs real images"),
        ({"sources": NO_DATA, "max_steps": -1, **ALL_SYNTHETIC}, "give max_steps"),
        ({"sources": NO_DATA, "generated_pool_size": 9, **ALL_SYNTHETIC}, "leave the pool out"),
    ],
)
def test_bad_parts_are_one_line(tmp_path, parts, message):
    with pytest.raises(InputError, match=message) as caught:
        tiny_trainer(tmp_path, **parts)
    assert "\n" not in str(caught.value)


def test_larger_generated_images_are_cut_to_size(tmp_path):
    generator = larger_images()
    trainer = tiny_trainer(tmp_path, generator=generator, max_steps=2)
    seen = []
    trainer.model.students[0].register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["pixel_values"].shape[2:]), with_kwargs=True
    )
    trainer.train()
    assert generator.config.image_size == 16 and set(seen) == {(8, 8)}


def test_a_plain_augmentation_is_not_for_generated_images(tmp_path):
    settings = SqueezeAndSpanConfig(str(tmp_path), per_device_train_batch_size=50, use_cpu=True)
    digits = digit_sources().train
    for plain, message in (
        (Augmentation(crop_padding=1), "pass a ViewAugmentation"),
        (Augmentation(), "the augmentation changes nothing"),
    ):
        with pytest.raises(InputError, match=message):
            SqueezeAndSpanTrainer(tiny_resnet(0), tiny_generator(), settings, digits, augmentation=plain)
    source = digit_sources().train.variant(augmentation=VIEWS)
    trainer = SqueezeAndSpanTrainer(tiny_resnet(0), tiny_generator(), settings, source)
    assert trainer.synthetic_augmentation.horizontal_flip is False  # the source's own


def test_a_generator_may_not_change(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=1)
    method_step = trainer.method_step

    def careless(batch, share, last):
        with torch.no_grad():
            trainer.model.teachers[0].model.pixel_bias.add_(1e-3)
        return method_step(batch, share, last)

    trainer.method_step = careless
    with pytest.raises(RunError, match="a generator's weights or statistics changed"):
        trainer.train()
