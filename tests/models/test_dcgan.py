"""DCGAN's networks: shapes, initialisation, spectral norm, sampling, saving, and what they refuse."""

import json
import os

import pytest
import torch
from clean_process import run_clean
from torch import nn
from transformers import AutoConfig, AutoModel

from hfkd.models import (
    HfkdDcganDiscriminatorConfig,
    HfkdDcganDiscriminatorModel,
    HfkdDcganGeneratorConfig,
    HfkdDcganGeneratorModel,
    code_files,
)
from hfkd.models.spectral_norm import SpectralConv2d


def tiny_generator(**settings):
    return HfkdDcganGeneratorModel(HfkdDcganGeneratorConfig(**{"width": 4, "latent_size": 6, **settings}))


def tiny_discriminator(**settings):
    return HfkdDcganDiscriminatorModel(HfkdDcganDiscriminatorConfig(**{"width": 4, **settings}))


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (16, 3), (32, 3), (64, 1)])
def test_shapes(side, channels):
    generator = tiny_generator(image_size=side, num_channels=channels)
    discriminator = tiny_discriminator(image_size=side, num_channels=channels)
    latents = torch.randn(3, 6)
    made = generator(latents)
    assert made.images.shape == (3, channels, side, side) and made.images.abs().max() <= 1
    sides = [4 * 2**k for k in range(side.bit_length() - 3)]
    widths = [4 * side // 2 // s for s in sides]
    assert [tuple(f.shape) for f in made.block_features] == [(3, w, s, s) for w, s in zip(widths, sides, strict=True)]
    assert made.latents is latents and generator.noise_size == 0
    judged = discriminator(made.images)
    assert judged.logits.shape == (3,)
    expected = [(3, w, s, s) for w, s in zip(reversed(widths), reversed(sides), strict=True)]
    assert [tuple(f.shape) for f in judged.block_features] == expected
    torch.testing.assert_close(judged.pooler_output, judged.block_features[-1].mean(dim=(2, 3)))


def test_the_papers_widths():
    """Radford et al., figure 1: 100 latents to 64x64 pixels by maps of 1024, 512, 256 and 128 channels."""
    with torch.device("meta"):
        generator = HfkdDcganGeneratorModel(HfkdDcganGeneratorConfig(image_size=64, width=128))
        assert [f.shape[1:] for f in generator(torch.randn(2, 100)).block_features] == [
            (1024, 4, 4), (512, 8, 8), (256, 16, 16), (128, 32, 32)
        ]  # fmt: skip


def test_fresh_weights_are_small_and_normal():
    torch.manual_seed(0)
    for model in (tiny_generator(width=32), tiny_discriminator(width=32, norm="none")):
        kinds = (nn.Conv2d, nn.ConvTranspose2d)
        weights = torch.cat([m.weight.flatten() for m in model.modules() if isinstance(m, kinds)])
        assert weights.std().item() == pytest.approx(0.02, rel=0.02)
        biases = [m.bias for m in model.modules() if isinstance(m, kinds) and m.bias is not None]
        assert all((bias == 0).all() for bias in biases)


@pytest.mark.parametrize(("norm", "kinds"), [("none", set()), ("batch", {"BatchNorm2d"}), ("group", {"GroupNorm"})])
def test_norms_of_the_generator(norm, kinds):
    generator = tiny_generator(norm=norm)
    found = {type(m).__name__ for m in generator.modules()} & {"BatchNorm2d", "GroupNorm"}
    assert found == kinds
    assert all((block[0].bias is None) == (norm != "none") for block in generator.blocks)


def test_norms_of_the_discriminator():
    """Batch norm in all blocks but the first, as in the paper."""
    batch = tiny_discriminator(norm="batch")
    assert [type(block[1]).__name__ for block in batch.blocks] == ["Identity", "BatchNorm2d", "BatchNorm2d"]
    assert [block[0].bias is None for block in batch.blocks] == [False, True, True]
    spectral = tiny_discriminator(norm="spectral")
    convs = [m for m in spectral.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 4 and all(isinstance(conv, SpectralConv2d) for conv in convs)


# -- spectral norm ---------------------------------------------------------------------------------


def spectral_conv():
    torch.manual_seed(0)
    conv = SpectralConv2d(3, 5, 3, 1, 1).double()
    nn.init.normal_(conv.direction)
    return conv


def test_spectral_norm_converges_to_the_largest_singular_value():
    conv, x = spectral_conv(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for _ in range(100):
        conv(x)
    largest = torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2)
    expected = nn.functional.conv2d(x, conv.weight / largest, conv.bias, padding=1)
    torch.testing.assert_close(conv(x), expected)
    torch.testing.assert_close(conv.eval()(x), expected)


def test_spectral_norm_is_torchs():
    """Outputs and gradients are those of torch's own parametrisation, once both have converged."""
    conv, x = spectral_conv(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    plain = nn.Conv2d(3, 5, 3, 1, 1).double()
    plain.load_state_dict({name: conv.state_dict()[name] for name in ("weight", "bias")})
    theirs = nn.utils.parametrizations.spectral_norm(plain)
    with torch.no_grad():
        for _ in range(200):
            conv(x), theirs(x)
    torch.testing.assert_close(conv(x), theirs(x))
    gradient, expected = (
        torch.autograd.grad(model(x).square().sum(), weight)[0]
        for model, weight in ((conv, conv.weight), (theirs, theirs.parametrizations.weight.original))
    )
    torch.testing.assert_close(gradient, expected)


def test_evaluation_leaves_the_direction_alone_and_training_moves_it():
    conv, x = spectral_conv(), torch.randn(1, 3, 4, 4, dtype=torch.float64)
    before = conv.direction.clone()
    conv.eval()(x)
    assert torch.equal(conv.direction, before)
    conv.train()(x)
    assert not torch.equal(conv.direction, before) and conv.direction.norm().item() == pytest.approx(1)


def test_two_passes_before_one_backward():
    """A discriminator sees real and generated images before it learns from either."""
    conv, x = spectral_conv(), torch.randn(1, 3, 4, 4, dtype=torch.float64)
    (conv(x).sum() - conv(2 * x).square().sum()).backward()
    assert conv.weight.grad.abs().min() > 0


@pytest.mark.parametrize("norm", ["none", "spectral"])
def test_double_backward(norm):
    discriminator = tiny_discriminator(image_size=8, num_channels=1, norm=norm, initializer_range=0.5).double()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(discriminator(x).logits.sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert discriminator.to_logit.weight.grad.abs().sum() > 0


# -- use -------------------------------------------------------------------------------------------


def test_sampling_is_of_the_seed_and_leaves_no_trace():
    generator = tiny_generator().train()
    state, statistics = torch.random.get_rng_state(), generator.blocks[0][1].running_mean.clone()
    first, again, other = (generator.sample(4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.random.get_rng_state()) and generator.training
    assert torch.equal(statistics, generator.blocks[0][1].running_mean)


def test_a_grey_discriminator_averages_three_channels():
    discriminator = tiny_discriminator(num_channels=1).eval()
    grey = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(discriminator(grey.expand(-1, 3, -1, -1)).logits, discriminator(grey).logits)


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 4, 32, 32), (3, 32, 32)])
def test_images_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"takes \(N, 3, 32, 32\)"):
        tiny_discriminator()(torch.zeros(shape))


def test_neither_knows_classes():
    with pytest.raises(ValueError, match="knows no classes"):
        tiny_generator()(torch.zeros(1, 6), labels=torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="knows no classes"):
        tiny_discriminator()(torch.zeros(1, 3, 32, 32), labels=torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (HfkdDcganGeneratorConfig, {"image_size": 28}, "image_size=28 is no power of two"),
        (HfkdDcganDiscriminatorConfig, {"image_size": 4}, "image_size=4"),
        (HfkdDcganGeneratorConfig, {"width": 0}, "width=0"),
        (HfkdDcganGeneratorConfig, {"latent_size": 0}, "latent_size=0"),
        (HfkdDcganGeneratorConfig, {"norm": "spectral"}, "norm='spectral' is unknown"),
        (HfkdDcganDiscriminatorConfig, {"norm": "group"}, "norm='group' is unknown"),
        (HfkdDcganDiscriminatorConfig, {"num_channels": 0}, "num_channels=0"),
    ],
)
def test_bad_configurations(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(**settings)


LOAD = """
import torch
from transformers import AutoModel

torch.set_num_threads(1)
generator = AutoModel.from_pretrained("generator", trust_remote_code=True)
print(generator.sample(1, seed=3).tolist())
discriminator = AutoModel.from_pretrained("discriminator", trust_remote_code=True).eval()
print(discriminator(torch.linspace(-1, 1, 64).view(1, 1, 8, 8)).logits.tolist())
"""


def test_both_load_without_hfkd(tmp_path):
    made = {"image_size": 8, "num_channels": 1, "initializer_range": 0.5}
    models = {"generator": tiny_generator(**made), "discriminator": tiny_discriminator(**made)}
    models["discriminator"](torch.randn(4, 1, 8, 8))  # moves what spectral norm remembers
    for name, model in models.items():
        model.eval().save_pretrained(tmp_path / name)
        loaded = AutoModel.from_pretrained(tmp_path / name)
        assert type(loaded) is type(model) and type(AutoConfig.from_pretrained(tmp_path / name)) is type(model.config)
        assert loaded.state_dict().keys() == model.state_dict().keys()
        for key, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key
    assert {file.name for file in code_files(models["discriminator"])} == {
        "configuration_convnet.py", "configuration_dcgan_discriminator.py", "configuration_dcgan_generator.py",
        "discriminator.py", "layers.py", "modeling_dcgan_discriminator.py", "spectral_norm.py",
    }  # fmt: skip
    printed = run_clean(LOAD, {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}, tmp_path).splitlines()
    torch.testing.assert_close(torch.tensor(json.loads(printed[0])), models["generator"].sample(1, seed=3))
    pixels = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    torch.testing.assert_close(torch.tensor(json.loads(printed[1])), models["discriminator"](pixels).logits.detach())
