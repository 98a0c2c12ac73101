import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from hfkd.data import Augmentation, Preprocessing, ResizedCrop, SquareCrop, keyed_uniform
from hfkd.errors import InputError


def random_images(count: int, channels: int = 3, height: int = 32, width: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


def pillow_reference(image: Image.Image, augmentation: Augmentation, draws: list[float]) -> Image.Image:
    """The usual per-sample pipeline: pad, cut out, mirror."""
    padding = augmentation.crop_padding
    mode = {"reflect": "reflect", "zeros": "constant"}[augmentation.padding_mode]
    array = np.asarray(image)
    widths = ((padding, padding), (padding, padding)) + ((0, 0),) * (array.ndim - 2)
    padded = Image.fromarray(np.pad(array, widths, mode=mode))  # type: ignore[call-overload]
    top, left = (int(draw * (2 * padding + 1)) for draw in draws[:2])
    image = padded.crop((left, top, left + image.width, top + image.height))
    if augmentation.horizontal_flip and draws[2] < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def to_pillow(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels[0].numpy() if pixels.shape[0] == 1 else pixels.permute(1, 2, 0).numpy())


def to_array(image: Image.Image) -> np.ndarray:
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("mode", ["reflect", "zeros"])
@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 32), (1, 8, 8), (3, 9, 12)])
def test_equals_the_per_sample_pillow_pipeline(mode: str, flip: bool, channels: int, height: int, width: int) -> None:
    augmentation = Augmentation(4, mode, flip)  # type: ignore[arg-type]
    images = random_images(64, channels, height, width)
    before = images.clone()
    index = torch.arange(100, 164)
    result = augmentation(images, 5, 2, index, view=1)
    draws = keyed_uniform(5, 2, index, 1, 3).tolist()
    expected = [to_array(pillow_reference(to_pillow(x), augmentation, d)) for x, d in zip(images, draws, strict=True)]
    assert np.array_equal(result.numpy(), np.stack(expected))
    assert torch.equal(images, before)


def test_all_shifts_and_both_directions_occur_equally() -> None:
    image = torch.arange(81, dtype=torch.uint8).view(1, 1, 9, 9).expand(9000, -1, -1, -1)
    corner = Augmentation(1, "zeros", False)(image, 0, 0, torch.arange(9000))[:, 0, 4, 4]
    counts = torch.bincount(corner.long(), minlength=81)
    assert sorted(counts.nonzero().flatten().tolist()) == [30, 31, 32, 39, 40, 41, 48, 49, 50]
    assert float(((counts[counts > 0] - 1000.0) ** 2 / 1000).sum()) < 26  # 8 degrees of freedom
    flipped = Augmentation(horizontal_flip=True)(image, 0, 0, torch.arange(9000))[:, 0, 0, 0] == 8
    assert float(flipped.double().mean()) == pytest.approx(0.5, abs=0.02)


def test_switching_one_operation_leaves_the_others_alone() -> None:
    images, index = random_images(32), torch.arange(32)
    both = Augmentation(4, "reflect", True)(images, 0, 0, index)
    crop = Augmentation(4, "reflect", False)(images, 0, 0, index)
    flipped = (keyed_uniform(0, 0, index, 0, 3)[:, 2] < 0.5)[:, None, None, None]
    assert torch.equal(both, torch.where(flipped, crop.flip(3), crop))


def test_default_does_nothing() -> None:
    images = random_images(2)
    assert not Augmentation()
    assert Augmentation()(images, 0, 0, torch.arange(2)) is images


def test_keeps_dtype_and_accepts_an_epoch_for_each_sample() -> None:
    images, index = random_images(4).double(), torch.arange(4)
    augmentation = Augmentation(2, "zeros", True)
    mixed = augmentation(images, 0, torch.tensor([0, 1, 0, 1]), index)
    assert mixed.dtype == torch.float64
    assert torch.equal(mixed[1::2], augmentation(images, 0, 1, index)[1::2])


def test_bad_settings() -> None:
    with pytest.raises(InputError, match="crop_padding 8 is too large to reflect images of 8 pixels"):
        Augmentation(8)(random_images(1, 1, 8, 8), 0, 0, torch.arange(1))
    with pytest.raises(InputError, match="crop_padding -1 is negative"):
        Augmentation(-1)
    with pytest.raises(InputError, match="padding_mode 'edge' is unknown"):
        Augmentation(1, "edge")  # type: ignore[arg-type]


def test_resized_crop_boxes_have_the_asked_area_and_ratio() -> None:
    augmentation = Augmentation(resized_crop=ResizedCrop(scale=(0.2, 0.6)))
    boxes = [augmentation.box(200, 160, 0, 0, index, 0) for index in range(400)]
    areas, ratios = [], []
    for box in boxes:
        assert box is not None
        left, top, right, bottom = box
        assert 0 <= left < right <= 200
        assert 0 <= top < bottom <= 160
        areas.append((right - left) * (bottom - top) / 32_000)
        ratios.append((right - left) / (bottom - top))
    assert 0.19 < min(areas) < 0.22 < 0.57 < max(areas) < 0.61
    assert 0.73 < min(ratios) < 0.78 < 1.28 < max(ratios) < 1.36
    assert np.mean(np.log(ratios)) == pytest.approx(0, abs=0.03)
    assert len(set(boxes)) > 390


def test_resized_crop_shares_no_draw_with_the_flip() -> None:
    crop = ResizedCrop()
    draws = keyed_uniform(1, 2, torch.tensor([3]), 1, 25)[0]
    assert Augmentation(resized_crop=crop).box(200, 160, 1, 2, 3, 1) == crop.box(200, 160, draws[3:])


def test_resized_crop_falls_back_to_the_centre_of_extreme_shapes() -> None:
    augmentation = Augmentation(resized_crop=ResizedCrop(scale=(1.0, 1.0)))
    assert augmentation.box(300, 30, 0, 0, 0, 0) == (130, 0, 170, 30)
    assert Augmentation().box(300, 30, 0, 0, 0, 0) is None


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (8, 8)])
def test_square_crops_lie_anywhere_in_the_image(width: int, height: int) -> None:
    cut = Augmentation(resized_crop=SquareCrop(0.75))
    boxes = [cut.box(width, height, seed=0, epoch=0, index=index, view=0) for index in range(400)]
    lefts, tops, rights, bottoms = (set(edge) for edge in zip(*boxes, strict=True))
    side = round(0.75 * min(width, height))
    assert all((right - left, bottom - top) == (side, side) for left, top, right, bottom in boxes)
    assert min(lefts) < 0.02 * width and max(rights) > 0.98 * width
    assert min(tops) < 0.02 * height and max(bottoms) > 0.98 * height


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.01, float("nan")])
def test_a_square_crop_is_a_part_of_the_image(fraction: float) -> None:
    with pytest.raises(InputError, match="SquareCrop.fraction=.* must be above 0 and at most 1"):
        SquareCrop(fraction)


def test_batched_is_ten_times_as_fast_as_per_sample_pillow() -> None:
    """Other work on the machine makes both slower, each at its own moments: the best times of several rounds count."""
    images, index = random_images(128), torch.arange(128)
    augmentation, preprocessing = Augmentation(4, "reflect", True), Preprocessing(32)
    mean, std = (
        np.array(values, dtype=np.float32)[:, None, None] for values in (preprocessing.mean, preprocessing.std)
    )
    stored = [to_pillow(image) for image in images]

    def batched() -> torch.Tensor:
        return preprocessing.normalize(augmentation(images, 0, 0, index))

    def per_sample() -> torch.Tensor:
        draws = np.random.default_rng(0).random((128, 3)).tolist()
        done = [to_array(pillow_reference(x, augmentation, d)) for x, d in zip(stored, draws, strict=True)]
        return torch.from_numpy(np.stack([(array.astype(np.float32) / 255 - mean) / std for array in done]))

    def best_time(run: Callable[[], torch.Tensor], repeats: int) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return min(times)

    fast = slow = float("inf")
    for _ in range(10):
        fast, slow = min(fast, best_time(batched, 30)), min(slow, best_time(per_sample, 5))
    print(f"\nimages/s at batch 128, 32x32: batched {128 / fast:,.0f}, per-sample Pillow {128 / slow:,.0f}")
    assert slow >= 10 * fast
