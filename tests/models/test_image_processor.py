"""The stock processor that is saved beside a model."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import AutoImageProcessor

from hfkd.errors import InputError
from hfkd.models import build_image_processor


def test_grey_digits_become_three_equal_normalised_channels():
    pixels = (load_digits().images[3] * 15).astype(np.uint8)
    processor = build_image_processor(8, 1, [0.3], [0.4])
    output = processor(Image.fromarray(pixels), return_tensors="pt").pixel_values
    expected = (torch.tensor(pixels) / 255 - 0.3) / 0.4
    assert output.shape == (1, 3, 8, 8)
    torch.testing.assert_close(output, expected.expand(1, 3, 8, 8))


def test_colour_is_normalised_by_channel_and_resized():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    processor = build_image_processor((6, 5), 3, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    output = processor(Image.fromarray(pixels), return_tensors="pt").pixel_values[0]
    for channel, (mean, std) in enumerate([(0.1, 0.4), (0.2, 0.5), (0.3, 0.6)]):
        torch.testing.assert_close(output[channel], (torch.tensor(pixels[..., channel]) / 255 - mean) / std)
    assert processor(Image.new("RGB", (20, 30)), return_tensors="pt").pixel_values.shape == (1, 3, 6, 5)


def test_saves_a_name_that_every_installation_knows(tmp_path):
    processor = build_image_processor(8, 1, [0.3], [0.4])
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "ViTImageProcessor"  # not the Pillow class: see build_image_processor
    assert "auto_map" not in saved
    assert AutoImageProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()


@pytest.mark.parametrize(
    ("num_channels", "mean", "std", "message"),
    [
        (2, [0, 0], [1, 1], "num_channels=2"),
        (1, [0, 0, 0], [1], "mean="),
        (3, [0] * 3, [1], "std="),
        (1, [0], [0], "std="),
    ],
)
def test_refuses(num_channels, mean, std, message):
    with pytest.raises(InputError, match=message):
        build_image_processor(8, num_channels, mean, std)
