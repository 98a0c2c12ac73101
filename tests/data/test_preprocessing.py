import io

import numpy as np
import pytest
import torch
from PIL import Image

from hfkd.data import Preprocessing
from hfkd.data.preprocessing import decode_image, to_pixels
from hfkd.errors import InputError


def picture(mode: str = "RGB", size: tuple[int, int] = (20, 14)) -> Image.Image:
    generator = np.random.default_rng(0)
    small = Image.fromarray(generator.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BILINEAR).convert(mode)


def record(image: Image.Image, fmt: str = "PNG") -> dict[str, bytes | None]:
    buffer = io.BytesIO()
    image.save(buffer, fmt)
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "1"])
def test_decode_converts_to_grey_or_colour(mode: str) -> None:
    image = picture(mode)
    for channels, target in ((1, "L"), (3, "RGB")):
        decoded = decode_image(record(image), channels, "here")
        assert decoded.mode == target
        assert to_pixels(decoded).shape == (channels, 14, 20)
        assert np.array_equal(np.asarray(decoded), np.asarray(image.convert(target)))
    assert decode_image(record(image), None, "here").mode == ("L" if mode in ("L", "LA", "1") else "RGB")


def test_decode_turns_rotated_photographs_upright() -> None:
    image, buffer = picture(), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: turn a quarter
    image.save(buffer, "PNG", exif=exif)
    assert decode_image({"bytes": buffer.getvalue(), "path": None}, 3, "here").size == (14, 20)


def test_decode_errors_name_the_image_in_one_line(tmp_path: object) -> None:
    whole = record(picture())["bytes"]
    assert whole is not None
    broken = {
        "no image at all": {"bytes": b"no image", "path": "cat.png"},
        "cut off": {"bytes": whole[: len(whole) // 2], "path": None},
        "no such file": {"bytes": None, "path": f"{tmp_path}/absent.png"},
        "nothing": {"bytes": None, "path": None},
        "no record": None,
        "too deep": record(Image.fromarray(np.zeros((4, 4), dtype=np.uint16))),
    }
    for name, item in broken.items():
        with pytest.raises(InputError, match="row 3 of the train images") as caught:
            decode_image(item, 3, "row 3 of the train images")
        assert "\n" not in str(caught.value), name
        assert "0x" not in str(caught.value), name
    with pytest.raises(InputError, match=r"\(cat.png\)"):
        decode_image(broken["no image at all"], 3, "row 3")


def test_fit() -> None:
    image = picture(size=(40, 20))
    assert Preprocessing(20).fit(image).size == (20, 20)
    square = picture(size=(20, 20))
    assert Preprocessing(20).fit(square) is square
    centre = Preprocessing(20, crop_fraction=1.0).fit(image)
    assert np.array_equal(np.asarray(centre), np.asarray(image)[:, 10:30])


@pytest.mark.parametrize("crop_fraction", [None, 1.0, 0.875])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(37, 29), (29, 37), (12, 15)])
def test_saved_processor_does_the_same(crop_fraction: float | None, channels: int, size: tuple[int, int]) -> None:
    mean, std = ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)) if channels == 3 else ((0.3,), (0.25,))
    preprocessing = Preprocessing(14, channels, mean, std, crop_fraction=crop_fraction)
    image = picture("RGB" if channels == 3 else "L", size)
    ours = preprocessing.normalize(to_pixels(preprocessing.fit(image))[None])
    processor = preprocessing.to_image_processor()
    theirs = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
    assert theirs.shape == (1, 3, 14, 14)
    assert torch.allclose(ours.expand(-1, 3, -1, -1), theirs, atol=1e-5)
    assert Preprocessing.from_image_processor(processor, num_channels=channels) == preprocessing


def test_stock_processors() -> None:
    from transformers import BitImageProcessorPil, ConvNextImageProcessorPil, ViTImageProcessorPil

    assert Preprocessing.from_image_processor(ViTImageProcessorPil()) == Preprocessing(224)
    convnext = Preprocessing.from_image_processor(ConvNextImageProcessorPil(size={"shortest_edge": 224}))
    assert (convnext.image_size, convnext.crop_fraction, convnext.resample) == (224, 0.875, 3)
    assert Preprocessing.from_image_processor(ConvNextImageProcessorPil()).crop_fraction is None  # 384: stretched
    bit = BitImageProcessorPil(size={"shortest_edge": 256})
    assert Preprocessing.from_image_processor(bit, image_size=64).crop_fraction == 0.875
    plain = ViTImageProcessorPil(do_normalize=False)
    assert Preprocessing.from_image_processor(plain, num_channels=1).mean == (0.0,)
    with pytest.raises(InputError, match="has no square size"):
        Preprocessing.from_image_processor(ViTImageProcessorPil(size={"height": 10, "width": 20}))
    with pytest.raises(InputError, match="rescales by 1.0"):
        Preprocessing.from_image_processor(ViTImageProcessorPil(rescale_factor=1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_normalize(dtype: torch.dtype) -> None:
    preprocessing = Preprocessing.from_statistics("cifar100", 16)
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    result = preprocessing.normalize(pixels, dtype)
    mean, std = (
        torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (preprocessing.mean, preprocessing.std)
    )
    exact = (pixels.double() / 255 - mean) / std
    assert result.dtype == dtype
    bound = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2**-8 * 2.1}[dtype]
    assert float((result.double() - exact).abs().max()) < bound
    assert preprocessing.mean[0] == pytest.approx(129.3 / 255)
    assert preprocessing.std[2] == pytest.approx(70.4 / 255)


def test_measured_statistics() -> None:
    images = torch.randint(0, 256, (1500, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:, 2] = 7
    measured = Preprocessing(4).with_statistics_of(images)
    flat = images.double().transpose(0, 1).flatten(1) / 255
    assert measured.mean == pytest.approx(flat.mean(1).tolist(), abs=1e-6)
    assert measured.std[:2] == pytest.approx(flat.std(1, correction=0)[:2].tolist(), abs=1e-6)
    assert measured.std[2] > 0


def test_published_digit_statistics(digits: object, digit_columns: object) -> None:
    from hfkd.data import ResidentImages

    known = Preprocessing.from_statistics("digits", 8, 1)
    measured = known.with_statistics_of(ResidentImages(digits, digit_columns, known).images)  # type: ignore[arg-type]
    assert known.mean == pytest.approx(measured.mean, abs=1e-4)
    assert known.std == pytest.approx(measured.std, abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 0}, "image_size 0 is too small"),
        ({"image_size": 8, "num_channels": 2}, "num_channels 2 is neither 1"),
        ({"image_size": 8, "mean": (0.5,)}, "mean .* does not fit 3 channels"),
        ({"image_size": 8, "std": (0.5, 0.5, 0.0)}, "is not positive"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Preprocessing(**settings)
    with pytest.raises(InputError, match="normalization 'cifar' is unknown"):
        Preprocessing.from_statistics("cifar", 32)
