"""ACAI's encoder, latent layers and decoder: sizes, order of the blocks, initial weights, saving."""

import json
import os

import pytest
import torch
from clean_process import run_clean
from torch import nn
from transformers import AutoModel

from hfkd.models import (
    ClassifierAdapter,
    HfkdVaeEncoderConfig,
    HfkdVaeEncoderForImageClassification,
    HfkdVaeEncoderModel,
)
from hfkd.models.vae_parts import GaussianCodes, VaeDecoder


TINY = {"depth": 4, "scales": 2, "num_channels": 1, "image_size": 8}


def test_real_widths_are_acais():
    model = HfkdVaeEncoderForImageClassification(HfkdVaeEncoderConfig())
    convs = [block[0] for _, block in ClassifierAdapter(model).top_blocks(8)]
    sizes = [(conv.in_channels, conv.out_channels, conv.kernel_size[0]) for conv in convs]
    assert sizes == [
        *[(3, 64, 1), (64, 64, 3), (64, 64, 3), (64, 128, 3), (128, 128, 3)],
        *[(128, 256, 3), (256, 256, 3), (256, 512, 3)],
    ]
    assert all(conv.bias is not None for conv in convs)
    with torch.no_grad():
        outputs = model.base_model(torch.randn(2, 3, 32, 32), output_hidden_states=True)
    assert [state.shape[-1] for state in outputs.hidden_states[1:]] == [32, 16, 8, 4, 4]
    assert outputs.last_hidden_state.shape == (2, 512, 4, 4)
    torch.testing.assert_close(outputs.pooler_output, outputs.last_hidden_state.mean(dim=(2, 3)))


def test_the_first_convolution_is_linear():
    stages = HfkdVaeEncoderModel(HfkdVaeEncoderConfig(**TINY)).stages
    assert not [m for m in stages[0].modules() if isinstance(m, nn.LeakyReLU)]
    slopes = [m.negative_slope for stage in stages[1:] for m in stage.modules() if isinstance(m, nn.LeakyReLU)]
    assert slopes == [0.2] * 5


def test_fresh_weights_are_acais():
    config = HfkdVaeEncoderConfig()
    for model in (HfkdVaeEncoderModel(config), VaeDecoder(config, 16), GaussianCodes(config, 16, 4)):
        for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
            expected = (1.04 * conv.weight[0].numel()) ** -0.5
            assert conv.weight.std().item() == pytest.approx(expected, rel=5 / conv.weight.numel() ** 0.5)
            assert not conv.bias.any()


@pytest.mark.parametrize("scales", [1, 3])
def test_decoder_gives_the_images_size_back(scales):
    config = HfkdVaeEncoderConfig(depth=4, scales=scales, num_channels=1)
    codes = GaussianCodes(config, 3, 2)
    features = torch.randn(2, config.hidden_sizes[-1], 2, 2)
    mean, log_variance = codes(features)
    assert mean.shape == log_variance.shape == (2, 3, 2, 2)
    assert VaeDecoder(config, 3)(mean).shape == (2, 1, 2 * 2**scales, 2 * 2**scales)


def test_unfit_fields_are_refused():
    with pytest.raises(ValueError, match="scales=0"):
        HfkdVaeEncoderConfig(scales=0)


LOAD = """
import torch
from transformers import AutoModel, AutoModelForImageClassification

torch.set_num_threads(1)
encoder = AutoModel.from_pretrained(".", trust_remote_code=True)
print(encoder(torch.linspace(-1, 1, 64).view(1, 1, 8, 8)).pooler_output.tolist())
print(type(AutoModelForImageClassification.from_pretrained(".", num_labels=3, trust_remote_code=True)).__name__)
"""


def test_loads_without_hfkd(tmp_path):
    encoder = HfkdVaeEncoderModel(HfkdVaeEncoderConfig(**TINY)).eval()
    encoder.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in encoder.state_dict().items())
    printed = run_clean(LOAD, {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}, tmp_path).splitlines()
    expected = encoder(torch.linspace(-1, 1, 64).view(1, 1, 8, 8)).pooler_output
    torch.testing.assert_close(torch.tensor(json.loads(printed[0])), expected)
    assert printed[1] == "HfkdVaeEncoderForImageClassification"
