"""Views of self-supervised learning against Pillow and colorsys, image by image; keys, sharing, and chances."""

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image

from hfkd.data import DataArguments, ResizedCrop, ViewAugmentation, augmentation_for, keyed_uniform
from hfkd.data.augmentation import BOX_DRAWS, DRAWS
from hfkd.data.views import _shift_hue, blurring_matrix, resizing_matrix
from hfkd.errors import InputError


# Nothing happens but what a test asks for.
STILL = {
    "horizontal_flip": False,
    "crop": None,
    "jitter_probability": 0.0,
    "grey_probability": 0.0,
    "blur_probability": 0.0,
}


def images(count=16, channels=3, side=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=generator)


def views(pixels, view=0, seed=3, epoch=2, first=0, **settings):
    index = torch.arange(first, first + len(pixels))
    return ViewAugmentation(**settings)(pixels, seed, epoch, index, view)


def test_crops_are_pillows():
    """The box of the same key that decoding would cut, resized by Pillow's antialiasing bilinear filter."""
    pixels, crop = images(), ResizedCrop(scale=(0.2, 1.0))
    found = views(pixels, **(STILL | {"crop": crop, "image_size": 8}))
    draws = keyed_uniform(3, 2, torch.arange(16), 0, DRAWS)[:, BOX_DRAWS]
    for image, result, draw in zip(pixels, found, draws, strict=True):
        box = crop.box(12, 12, draw)
        for channel, expected in zip(image, result, strict=True):
            cut = Image.fromarray(channel.float().numpy()).crop(box)
            resized = np.asarray(cut.resize((8, 8), Image.Resampling.BILINEAR))
            assert np.abs(resized - expected.numpy()).max() < 0.01


def test_a_whole_image_stays_itself():
    matrix = resizing_matrix(torch.zeros(1), torch.full((1,), 7.0), 7, 7)
    assert torch.equal(matrix[0], torch.eye(7))
    pixels = images()
    torch.testing.assert_close(views(pixels, **STILL), pixels.float())


def test_batched_boxes_fit_and_fill_their_ranges():
    crop = ResizedCrop(scale=(0.2, 1.0))
    draws = keyed_uniform(0, 0, torch.arange(4000), 0, 22)
    left, top, right, bottom = crop.boxes(100, 80, draws).double().unbind(1)
    assert min(left.min(), top.min()) == 0 and right.max() == 100 and bottom.max() == 80
    areas, ratios = (right - left) * (bottom - top) / 8000, (right - left) / (bottom - top)
    assert 0.19 < areas.min() < 0.22 and areas.max() > 0.95
    assert 0.73 < ratios.min() < 0.77 and 1.31 < ratios.max() < 1.36
    # A part that never fits: the largest centred one of a very wide image.
    assert ResizedCrop(scale=(0.9, 1.0)).boxes(100, 10, draws[:1]).tolist() == [[43, 0, 56, 10]]


@pytest.mark.parametrize("shift", [-0.1, 0.03, 0.5])
def test_hue_is_colorsyss(shift):
    pixels = images(4).double() / 255
    pixels[0] = pixels[0].mean(dim=0)  # grey, which has no hue
    found = _shift_hue(pixels, torch.full((4, 1, 1, 1), shift, dtype=torch.float64))
    for image, result in zip(pixels, found, strict=True):
        for rgb, new in zip(image.flatten(1).T.tolist(), result.flatten(1).T.tolist(), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
            assert new == pytest.approx(colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value), abs=1e-9)


def test_blur_is_a_gaussian_that_keeps_what_is_flat():
    sigma = torch.tensor([0.1, 2.0], dtype=torch.float64)
    matrix = blurring_matrix(sigma, 9)
    torch.testing.assert_close(matrix[0], torch.eye(9, dtype=torch.float64))
    torch.testing.assert_close(matrix.sum(dim=2), torch.ones(2, 9, dtype=torch.float64))
    middle = matrix[1, 4]
    torch.testing.assert_close(middle[5] / middle[4], torch.tensor(-1 / 8.0, dtype=torch.float64).exp())
    torch.testing.assert_close(middle, middle.flip(0))


def spread(result):
    return (result - result[:1]).abs().amax(dim=(1, 2, 3))


@pytest.mark.parametrize(
    ("operation", "share"),
    [
        ({"horizontal_flip": True}, 0.5),
        ({"jitter_probability": 0.8}, 0.8),
        ({"grey_probability": 0.2}, 0.2),
        ({"blur_probability": 0.5, "blur_sigma": (1.0, 2.0)}, 0.5),
    ],
)
def test_how_many_images_change(operation, share):
    pixels = images(1).expand(1000, -1, -1, -1)
    found = views(pixels, **(STILL | operation))
    changed = ((found - pixels).abs().amax(dim=(1, 2, 3)) > 0.5).float().mean().item()
    assert changed == pytest.approx(share, abs=0.05)


def test_each_image_has_draws_of_its_own_or_all_have_those_of_the_first():
    pixels = images(1).expand(8, -1, -1, -1)
    assert spread(views(pixels)[1:]).min() == 0 < spread(views(pixels))[1:].min()
    shared = views(pixels, shared=True)
    assert spread(shared).max() == 0
    torch.testing.assert_close(shared[0], views(pixels)[0])
    assert (views(pixels, shared=True, first=5)[0] - shared[0]).abs().max() > 1


def test_a_view_is_a_function_of_its_key():
    """Not of the batch that it is in, nor of its place there; the order of colour operations included."""
    settings = {"blur_probability": 0.5}
    whole, parts = images(40), images(40).split(7)
    together = views(whole, **settings)
    apart = [views(part, first=7 * number, **settings) for number, part in enumerate(parts)]
    torch.testing.assert_close(torch.cat(apart), together)
    index = torch.arange(40).flip(0)
    backwards = ViewAugmentation(**settings)(whole.flip(0), 3, torch.full((40,), 2), index, 0)
    torch.testing.assert_close(backwards.flip(0), together)
    for other in ({"view": 1}, {"seed": 4}, {"epoch": 3}):
        assert (views(whole, **other, **settings) - together).abs().amax(dim=(1, 2, 3)).min() > 0.5


def test_operations_keep_their_draws_when_others_are_switched_off():
    pixels = images()
    grey = {"grey_probability": 0.5}
    alone = views(pixels, **(STILL | grey))
    flipped = views(pixels, **(STILL | grey | {"horizontal_flip": True}))
    same = (alone == flipped).flatten(1).all(1) | (alone == flipped.flip(3)).flatten(1).all(1)
    assert same.all()


def test_range_kinds_and_widths():
    pixels = images(64)
    for given in (pixels, pixels.float(), pixels.double()):
        found = views(given, blur_probability=0.5)
        assert found.dtype == (torch.float64 if given.dtype == torch.float64 else torch.float32)
        assert found.min() >= -1e-3 and found.max() <= 255.001
    torch.testing.assert_close(views(pixels, blur_probability=0.5), views(pixels.float(), blur_probability=0.5))
    assert torch.equal(pixels, images(64))
    assert views(pixels, image_size=7).shape == (64, 3, 7, 7)


def test_grey_images_have_brightness_and_contrast_alone():
    pixels = images(64, channels=1)
    found = views(pixels, blur_probability=0.5)
    assert found.shape == pixels.shape and (found - pixels).abs().amax(dim=(1, 2, 3)).gt(1).float().mean() > 0.9
    jitter = STILL | {"jitter_probability": 1.0, "contrast": 0.0}
    factors = views(torch.full_like(pixels, 100), **jitter)[:, 0, 0, 0] / 100
    assert 0.6 <= factors.min() < 0.65 and 1.35 < factors.max() <= 1.4


def test_the_order_of_colour_operations_is_drawn_for_each_image():
    """Brightness cuts off at white; contrast after it gives another result than before it."""
    pixels = images(1).expand(200, -1, -1, -1)
    jitter = STILL | {"jitter_probability": 1.0, "saturation": 0.0, "hue": 0.0}
    found = views(pixels, **jitter) / 255
    draws = keyed_uniform(3, 2, torch.arange(200), 0, DRAWS + 9)
    brightness, contrast = (
        0.6 + 0.8 * draws[:, column].float()[:, None, None, None] for column in (DRAWS + 2, DRAWS + 3)
    )
    x = pixels.float() / 255

    def brighten(x):
        return (x * brightness).clamp(0, 1)

    def contrasted(x):
        luma = (x * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True).mean((2, 3), keepdim=True)
        return (contrast * x + (1 - contrast) * luma).clamp(0, 1)

    one, other = contrasted(brighten(x)), brighten(contrasted(x))
    differ = (one - other).abs().amax(dim=(1, 2, 3)) > 0.01
    is_one, is_other = ((found - way).abs().amax(dim=(1, 2, 3)) < 1e-4 for way in (one, other))
    assert (is_one | is_other).all() and differ.float().mean() > 0.3
    assert 0.3 < is_one[differ].float().mean() < 0.7


def test_what_the_command_asks_for():
    made = augmentation_for(DataArguments(augmentation="ssl"), "cifar10", 32)
    assert made == ViewAugmentation() and made.blur_probability == 0
    assert augmentation_for(DataArguments(augmentation="ssl_blur"), "stl10", 64).blur_probability == 0.5
    assert not augmentation_for(DataArguments(augmentation="ssl"), "digits", 8).horizontal_flip
    large = augmentation_for(DataArguments(augmentation="ssl"), "imagenet", 224)
    assert large.crop is None and large.resized_crop == ResizedCrop(scale=(0.2, 1.0))
    generated = large.on_device(224, shared=True)
    assert (generated.crop, generated.resized_crop, generated.shared) == (large.resized_crop, None, True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hue": 0.6}, "hue=0.6"),
        ({"grey_probability": 1.5}, "grey_probability"),
        ({"blur_sigma": (2.0, 1.0)}, "blur_sigma"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        ViewAugmentation(**settings)
