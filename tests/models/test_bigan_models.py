"""ALI's encoder, generator, latent head and discriminator: sizes, counts, interface, and what is saved."""

import json
import os

import pytest
import torch
from clean_process import run_clean
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification

from hfkd.errors import InputError
from hfkd.models import (
    ClassifierAdapter,
    HfkdBiganEncoderConfig,
    HfkdBiganEncoderForImageClassification,
    HfkdBiganEncoderModel,
    HfkdBiganGeneratorConfig,
    HfkdBiganGeneratorModel,
)
from hfkd.models.bigan_parts import JointDiscriminator, LatentHead, Maxout


TINY = {"hidden_sizes": [4, 6, 8], "kernel_sizes": [3, 4, 2], "strides": [1, 2, 1], "num_channels": 1, "image_size": 8}


def tiny_generator(**settings):
    config = HfkdBiganGeneratorConfig.mirror(HfkdBiganEncoderConfig(**TINY, **settings), latent_size=5)
    return HfkdBiganGeneratorModel(config)


def test_real_widths_are_alis():
    """Parameters after folding each batch norm into its convolution, and the sides of the maps."""
    model = HfkdBiganEncoderForImageClassification(HfkdBiganEncoderConfig())
    blocks = [block for _, block in ClassifierAdapter(model).top_blocks(5)]
    assert [conv.weight.numel() + norm.num_features for conv, norm, _ in blocks] == [
        2_432,
        32_832,
        131_200,
        524_544,
        2_097_664,
    ]
    assert all(conv.bias is None for conv, _, _ in blocks)
    with torch.no_grad():
        outputs = model.base_model(torch.randn(2, 3, 32, 32), output_hidden_states=True)
    assert [state.shape[-1] for state in outputs.hidden_states[1:]] == [28, 13, 10, 4, 1]
    assert outputs.pooler_output.shape == (2, 512)
    torch.testing.assert_close(outputs.pooler_output, outputs.last_hidden_state[:, :, 0, 0])


def test_top_blocks_are_the_convolutions_in_order():
    names = [
        name
        for name, _ in ClassifierAdapter(
            HfkdBiganEncoderForImageClassification(HfkdBiganEncoderConfig(**TINY))
        ).top_blocks(2)
    ]
    assert names == ["backbone.stages.1.0", "backbone.stages.2.0"]


def test_the_default_generator_mirrors_the_default_encoder():
    mirrored = HfkdBiganGeneratorConfig.mirror(HfkdBiganEncoderConfig())
    assert mirrored.to_dict() == HfkdBiganGeneratorConfig().to_dict()
    assert mirrored.image_size == 32
    assert HfkdBiganGeneratorModel(mirrored).sample(1, seed=0).shape == (1, 3, 32, 32)


def test_fresh_weights_are_alis():
    for model in (
        HfkdBiganEncoderModel(HfkdBiganEncoderConfig()),
        HfkdBiganGeneratorModel(HfkdBiganGeneratorConfig()),
        JointDiscriminator(HfkdBiganEncoderConfig(), 64),
        LatentHead(HfkdBiganEncoderConfig(), 64),
    ):
        convs = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
        for conv in convs:
            assert conv.weight.std().item() == pytest.approx(0.01, rel=5 / conv.weight.numel() ** 0.5)
            assert conv.bias is None or not conv.bias.any()


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_norms_and_slope_are_the_configurations(norm):
    model = HfkdBiganEncoderModel(HfkdBiganEncoderConfig(**TINY, norm=norm, negative_slope=0.3))
    for conv, made, activation in (stage[0] for stage in model.stages):
        assert activation.negative_slope == 0.3
        assert (conv.bias is None) == (norm != "none")
        assert type(made).__name__ == {"batch": "BatchNorm2d", "group": "GroupNorm", "none": "Identity"}[norm]


def test_unfit_images_and_layers_are_refused():
    model = HfkdBiganEncoderModel(HfkdBiganEncoderConfig(**TINY))
    with pytest.raises(ValueError, match="receptive field 8"):
        model(torch.zeros(1, 1, 7, 9))
    assert model(torch.zeros(1, 3, 9, 12)).pooler_output.shape == (1, 8)  # three equal channels, a larger map
    for config in (HfkdBiganEncoderConfig, HfkdBiganGeneratorConfig):
        with pytest.raises(ValueError, match="one positive number for each"):
            config(hidden_sizes=[4, 8], kernel_sizes=[3], strides=[1, 1])
    with pytest.raises(ValueError, match="latent_size=0"):
        HfkdBiganGeneratorConfig(latent_size=0)
    with pytest.raises(ValueError, match="leave labels out"):
        tiny_generator()(torch.zeros(1, 5), labels=torch.zeros(1))


# -- the interface of generators -------------------------------------------------------------------


def test_generator_output():
    generator, latents = tiny_generator().eval(), torch.randn(3, 5)
    output = generator(latents)
    assert output.images.shape == (3, 1, 8, 8) and output.images.abs().max() <= 1
    assert [tuple(f.shape) for f in output.block_features] == [(3, 6, 2, 2), (3, 4, 6, 6), (3, 4, 8, 8), (3, 4, 8, 8)]
    assert output.latents is latents
    assert torch.equal(generator(latents, return_dict=False)[0], output.images)


def test_samples_are_the_seeds_and_leave_no_trace():
    generator = tiny_generator().train()
    generator.blocks[0].eval()
    state, modes = torch.random.get_rng_state(), [m.training for m in generator.modules()]
    buffers = {name: value.clone() for name, value in generator.named_buffers()}
    first, again, other = (generator.sample(4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(generator.sample(4), generator.sample(4))
    assert torch.equal(state, torch.random.get_rng_state())
    assert modes == [m.training for m in generator.modules()]
    assert all(torch.equal(value, buffers[name]) for name, value in generator.named_buffers())
    assert not first.requires_grad
    drawn = generator.draw_inputs(4, torch.Generator().manual_seed(0))["latents"]
    assert torch.equal(first, generator.eval()(drawn).images)


def test_pictures():
    values = torch.tensor([-1.0, 0.0, 1.0, 1.5])
    (grey,) = HfkdBiganGeneratorModel.to_pil(values.view(1, 1, 1, 4))
    assert grey.mode == "L" and list(grey.tobytes()) == [0, 128, 255, 255]
    (colour,) = HfkdBiganGeneratorModel.to_pil(torch.stack([values, -values, values])[None, :, None])
    assert colour.mode == "RGB" and colour.size == (4, 1) and colour.getpixel((0, 0)) == (0, 255, 0)


def test_a_fresh_generator_starts_at_the_mean_image():
    generator, mean = tiny_generator(), torch.linspace(-1, 1, 64).view(1, 8, 8)
    generator.start_at(mean)
    torch.testing.assert_close(generator.sample(2, seed=0), mean.expand(2, -1, -1, -1), atol=1e-2, rtol=0)
    assert torch.isfinite(generator.pixel_bias).all()


# -- training-only parts ---------------------------------------------------------------------------


def test_maxout_takes_the_larger_of_two():
    hidden = torch.tensor([1.0, -2.0, 3.0, -5.0]).view(1, 4, 1, 1).requires_grad_()
    chosen = Maxout()(hidden)
    assert chosen.flatten().tolist() == [3.0, -2.0]
    assert torch.autograd.grad(chosen.sum(), hidden)[0].flatten().tolist() == [0, 1, 1, 0]


def test_latent_head():
    mean, log_std = LatentHead(HfkdBiganEncoderConfig(**TINY), 5)(torch.randn(3, 8))
    assert mean.shape == log_std.shape == (3, 5)


@pytest.mark.parametrize(
    ("settings", "widths"),
    [({}, (256, 512, 512)), ({"activation": "leaky_relu", "norm": "batch"}, (512, 1024, 1024))],
)
def test_discriminator_at_real_widths(settings, widths):
    """Inputs of D(x, z)'s three layers: twice 256 with maxout, as in ALI's code, and twice 512 with leaky ReLU."""
    discriminator = JointDiscriminator(HfkdBiganEncoderConfig(), 64, **settings)
    of_both = [m for m in discriminator.of_both if isinstance(m, nn.Conv2d)]
    assert [conv.in_channels for conv in of_both] == [2 * widths[0], *widths[1:]]
    assert discriminator(torch.randn(2, 3, 32, 32), torch.randn(2, 64)).shape == (2,)
    norms = [m for m in discriminator.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == (4 if "norm" in settings else 0)
    rates = [m.p for m in discriminator.modules() if isinstance(m, nn.Dropout)]
    assert sorted(rates) == [0.2, 0.2, *[0.5] * (len(rates) - 2)] and len(rates) == 10
    biased = [conv for conv in discriminator.modules() if isinstance(conv, nn.Conv2d) and conv.bias is not None]
    assert biased == [discriminator.of_image[1], *of_both]


def test_discriminator_reads_both_halves_of_a_pair():
    discriminator = JointDiscriminator(HfkdBiganEncoderConfig(**TINY, initializer_range=0.5), 5).eval()
    images, latents = torch.randn(2, 1, 8, 8), torch.randn(2, 5)
    score = discriminator(images, latents)
    assert not torch.equal(score, discriminator(images.flip(0), latents))
    assert not torch.equal(score, discriminator(images, latents.flip(0)))


# -- saving ----------------------------------------------------------------------------------------

LOAD = """
import torch
from transformers import AutoModel, AutoModelForImageClassification

torch.set_num_threads(1)
pixels = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
encoder = AutoModel.from_pretrained("encoder", trust_remote_code=True)
print(encoder(pixels).pooler_output.tolist())
generator = AutoModel.from_pretrained("generator", trust_remote_code=True)
print(generator.sample(1, seed=3).tolist())
print(type(AutoModelForImageClassification.from_pretrained("encoder", num_labels=3, trust_remote_code=True)).__name__)
print(generator.to_pil(generator.sample(2, seed=3))[0].size)
"""


def test_both_load_without_hfkd(tmp_path):
    encoder, generator = HfkdBiganEncoderModel(HfkdBiganEncoderConfig(**TINY)).eval(), tiny_generator()
    generator.pixel_bias.data.normal_()
    for name, model in (("encoder", encoder), ("generator", generator)):
        model.save_pretrained(tmp_path / name)
        loaded = AutoModel.from_pretrained(tmp_path / name)
        assert type(loaded) is type(model)
        for key, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value)
    printed = run_clean(LOAD, {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}, tmp_path).splitlines()
    pixels = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    torch.testing.assert_close(torch.tensor(json.loads(printed[0])), encoder(pixels).pooler_output)
    torch.testing.assert_close(torch.tensor(json.loads(printed[1])), generator.sample(1, seed=3))
    assert printed[2:] == ["HfkdBiganEncoderForImageClassification", "(8, 8)"]


def test_an_encoder_becomes_a_classifier(tmp_path):
    encoder = HfkdBiganEncoderModel(HfkdBiganEncoderConfig(**TINY))
    encoder.save_pretrained(tmp_path)
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=7)
    assert classifier.classifier.out_features == 7
    for key, value in encoder.state_dict().items():
        assert torch.equal(classifier.base_model.state_dict()[key], value)
    with pytest.raises(InputError, match="use 1 to 3"):
        ClassifierAdapter(classifier).top_blocks(4)
