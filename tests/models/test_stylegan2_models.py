"""StyleGAN2's generator and discriminator: counts, noise, classes, gradients, and what is saved."""

import json
import math
import os

import pytest
import torch
from clean_process import run_clean
from published_files import check_imports
from safetensors.torch import load_file, save_file
from tiny_stylegan2 import SIZES, draws, tiny_discriminator, tiny_generator
from transformers import AutoModel

from hfkd.models import (
    HfkdStyleGan2DiscriminatorConfig,
    HfkdStyleGan2DiscriminatorModel,
    HfkdStyleGan2GeneratorConfig,
    HfkdStyleGan2GeneratorModel,
    code_files,
)


# -- sizes ----------------------------------------------------------------------------------------


def test_cifar_generator_has_the_published_sizes():
    model = HfkdStyleGan2GeneratorModel(HfkdStyleGan2GeneratorConfig.cifar()).eval()
    assert model.num_parameters() == 19_947_539
    assert (len(model.state_dict()), len(list(model.parameters()))) == (75, 56)
    assert model.config.num_ws == 8 and model.noise_size == 16 + 2 * (64 + 256 + 1024)
    with torch.no_grad():
        output = model(**model.draw_inputs(1, torch.Generator().manual_seed(0)))
    assert [tuple(f.shape[1:]) for f in output.block_features] == [(512, side, side) for side in (4, 8, 16, 32)]
    assert output.images.shape == (1, 3, 32, 32) and output.intermediate_latents.shape == (1, 8, 512)
    assert 0.1 < output.block_features[-1].std() < 3  # each layer keeps the variance


def test_large_networks_have_the_published_sizes():
    """Parameters and buffers of layers as StyleGAN2-ADA's code prints them for 1024x1024 pixels."""
    with torch.device("meta"):
        generator = HfkdStyleGan2GeneratorModel(HfkdStyleGan2GeneratorConfig(image_size=1024))
        discriminator = HfkdStyleGan2DiscriminatorModel(HfkdStyleGan2DiscriminatorConfig(image_size=1024))
    inputs = {"latents": torch.empty(2, 512), "noise": torch.empty(2, generator.noise_size)}
    output = generator(**{name: value.to("meta") for name, value in inputs.items()})
    assert output.images.shape == (2, 3, 1024, 1024) and output.block_features[-1].shape[1] == 32
    published = {
        (generator, "mapping.fc7"): (262_656, 0),
        (generator, "synthesis.b4.conv1"): (2_622_465, 32),
        (generator, "synthesis.b4.torgb"): (264_195, 0),
        (generator, "synthesis.b16.conv0"): (2_622_465, 272),
        (generator, "synthesis.b128.conv0"): (1_442_561, 16_400),
        (generator, "synthesis.b256.conv1"): (213_249, 65_552),
        (generator, "synthesis.b256.torgb"): (66_051, 0),
        (discriminator, "b1024.fromrgb"): (128, 16),
        (discriminator, "b1024.skip"): (2048, 16),
        (discriminator, "b1024.conv0"): (9248, 16),
        (discriminator, "b1024.conv1"): (18_496, 16),
        (discriminator, "b128.conv1"): (1_180_160, 16),
        (discriminator, "b64.conv0"): (2_359_808, 16),
        (discriminator, "b4.conv"): (513 * 512 * 9 + 512, 16),
        (discriminator, "b4.fc"): (8192 * 512 + 512, 0),
        (discriminator, "b4.out"): (513, 0),
    }
    for (model, name), (parameters, buffers) in published.items():
        module = model.get_submodule(name)
        assert sum(p.numel() for p in module.parameters()) == parameters, name
        assert sum(b.numel() for b in module.buffers()) == buffers, name


def test_state_names_are_the_originals():
    names = list(tiny_generator(num_classes=3, image_size=8).state_dict())
    conv = ("weight", "bias", "noise_strength", "resample_filter", "noise_const", "affine.weight", "affine.bias")
    block = [f"torgb.{name}" for name in ("weight", "bias", "affine.weight", "affine.bias")] + ["resample_filter"]
    expected = ["mapping.w_avg"] + [f"mapping.{fc}.{p}" for fc in ("embed", "fc0", "fc1") for p in ("weight", "bias")]
    expected += [f"synthesis.b4.{name}" for name in ["const", *block, *(f"conv1.{name}" for name in conv)]]
    expected += [f"synthesis.b8.{name}" for name in [*block, *(f"conv{k}.{name}" for k in (0, 1) for name in conv)]]
    assert sorted(names) == sorted(expected)

    conv = ("weight", "bias", "resample_filter")
    b16 = ["resample_filter", *(f"{layer}.{name}" for layer in ("fromrgb", "conv0", "conv1") for name in conv)]
    b8 = [name for name in b16 if "fromrgb" not in name]
    b4 = [f"conv.{name}" for name in conv] + [f"{layer}.{name}" for layer in ("fc", "out") for name in conv[:2]]
    expected = [f"b{r}.{name}" for r, names in ((16, b16), (8, b8), (4, b4)) for name in names]
    assert sorted(tiny_discriminator(architecture="orig").state_dict()) == sorted(expected)
    skips = [f"b{r}.skip.{name}" for r in (16, 8) for name in ("weight", "resample_filter")]
    assert sorted(tiny_discriminator().state_dict()) == sorted(expected + skips)


def test_fresh_weights():
    model = HfkdStyleGan2GeneratorModel(HfkdStyleGan2GeneratorConfig(image_size=8, channel_max=64, w_dim=64))
    state = model.state_dict()
    assert state["mapping.fc1.weight"].std().item() == pytest.approx(100, rel=0.05)
    assert state["synthesis.b8.conv0.weight"].std().item() == pytest.approx(1, rel=0.05)
    assert state["synthesis.b8.conv0.affine.bias"].eq(1).all() and not state["synthesis.b8.conv0.bias"].any()
    assert state["synthesis.b8.conv0.noise_strength"].shape == () and not state["synthesis.b8.conv0.noise_strength"]
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    assert torch.equal(state["synthesis.b8.resample_filter"], torch.outer(taps, taps))
    assert not state["mapping.w_avg"].any()


# -- noise and styles -----------------------------------------------------------------------------


def test_noise_modes():
    model = tiny_generator()
    inputs = draws(model)
    noisy, quiet = model(**inputs).images, model(inputs["latents"]).images
    assert (noisy - quiet).abs().max() > 1e-3
    assert torch.equal(quiet, model(inputs["latents"], noise_mode="none").images)
    kept = torch.cat([layer.noise_const.flatten() for layer in model.synthesis.layers()])
    const = model(inputs["latents"], noise_mode="const").images
    torch.testing.assert_close(const, model(inputs["latents"], noise=kept.expand(3, -1)).images)
    with torch.no_grad():
        for layer in model.synthesis.layers():
            layer.noise_strength.zero_()
    assert torch.equal(model(**inputs).images, quiet)
    with pytest.raises(ValueError, match="noise_mode='const' takes none"):
        model(**inputs, noise_mode="const")
    with pytest.raises(ValueError, match="noise_mode='loud' is unknown"):
        model(inputs["latents"], noise_mode="loud")
    with pytest.raises(ValueError, match=f"an image takes {16 + 2 * (64 + 256)} numbers"):
        model(inputs["latents"], noise=inputs["noise"][:, 1:])


def test_truncation():
    model = tiny_generator()
    latents = draws(model)["latents"]
    plain = model(latents, noise_mode="const")
    torch.testing.assert_close(model(latents, noise_mode="const", truncation_psi=1.0).images, plain.images)
    mean = model(latents, noise_mode="const", truncation_psi=0.0)
    torch.testing.assert_close(mean.images, mean.images[:1].expand(3, -1, -1, -1))
    torch.testing.assert_close(mean.intermediate_latents[0, 0], model.mapping.w_avg)
    half = model(latents, truncation_psi=0.5).intermediate_latents
    torch.testing.assert_close(half, (plain.intermediate_latents + model.mapping.w_avg) / 2)
    assert not torch.equal(model.float().sample(2, seed=0), model.sample(2, seed=0, truncation_psi=0.3))


def test_the_mean_style_is_followed_in_training_only():
    model = tiny_generator()
    latents, before = draws(model)["latents"], model.mapping.w_avg.clone()
    w = model(latents).intermediate_latents[:, 0]
    assert torch.equal(model.mapping.w_avg, before)
    model.train()(latents)
    torch.testing.assert_close(model.mapping.w_avg, 0.995 * before + 0.005 * w.mean(dim=0))


def test_each_style_moves_its_own_layers():
    """Of six: 0 the first maps; 1 first colours and second block; 2; 3 likewise with the third; 4; 5 last colours."""
    model = tiny_generator()
    ws = torch.randn(2, 6, 5).double()
    base = model.synthesize(ws)
    moved = {0: [1, 1, 1], 1: [0, 1, 1], 2: [0, 1, 1], 3: [0, 0, 1], 4: [0, 0, 1], 5: [0, 0, 0]}
    for index, expected in moved.items():
        changed = ws.clone()
        changed[:, index] += 1
        output = model.synthesize(changed)
        pairs = zip(base.block_features, output.block_features, strict=True)
        assert [not torch.equal(a, b) for a, b in pairs] == [bool(e) for e in expected], index
        assert not torch.equal(base.images, output.images), index
    with torch.no_grad():
        model.synthesis.b8.conv0.affine.weight.zero_()
    base, changed = model.synthesize(ws), ws.clone()
    changed[:, 1] += 1
    output = model.synthesize(changed)
    assert torch.equal(base.block_features[-1], output.block_features[-1])
    assert not torch.equal(base.images, output.images)  # by the first block's colours alone
    assert output.latents is None


def test_latents_and_styles_give_the_same():
    model = tiny_generator()
    inputs = draws(model)
    output = model(**inputs)
    again = model.synthesize(output.intermediate_latents, inputs["noise"])
    assert torch.equal(again.images, output.images)
    for ws in (torch.zeros(2, 7, 5), torch.zeros(2, 5, 5), torch.zeros(2, 6, 4), torch.zeros(6, 5)):
        with pytest.raises(ValueError, match="an image takes 6 of 5 numbers each") as caught:
            model.synthesize(ws.double())
        assert str(tuple(ws.shape)) in str(caught.value)


# -- classes, samples, gradients ------------------------------------------------------------------


def test_a_generator_of_classes():
    model = tiny_generator(num_classes=3)
    assert model.config.num_labels == 3 and model.mapping.fc0.weight.shape[1] == 6 + 5
    inputs = draws(model)
    first, second = (model(**inputs, labels=torch.full((3,), label)).images for label in (0, 1))
    assert (first - second).abs().max() > 1e-3
    with pytest.raises(ValueError, match="give labels"):
        model(**inputs)
    model.float()
    assert torch.equal(model.sample(4, seed=0), model.sample(4, labels=[0, 1, 2, 0], seed=0))
    with pytest.raises(ValueError, match="label 3 is outside the 3 classes"):
        model.sample(1, labels=[3])
    with pytest.raises(ValueError, match="leave labels out"):
        tiny_generator().sample(1, labels=[0])


def test_samples_are_the_seeds_and_leave_no_trace():
    model = tiny_generator().float().train()
    state, mean = torch.random.get_rng_state(), model.mapping.w_avg.clone()
    first, again, other = (model.sample(4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(mean, model.mapping.w_avg) and model.training
    assert first.min() >= -1 and first.max() <= 1
    drawn = model.draw_inputs(4, torch.Generator().manual_seed(0))
    assert torch.equal(first, model.eval()(**drawn).images.clamp(-1, 1))


def test_gradients_reach_every_weight_and_the_latents():
    model = tiny_generator(num_classes=3, conv_clamp=None).train()
    inputs = draws(model)
    inputs["latents"].requires_grad_()
    output = model(**inputs, labels=torch.tensor([0, 1, 2]))
    (output.images.square().sum() + sum(f.sum() for f in output.block_features)).backward()
    assert inputs["latents"].grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("architecture", ["orig", "resnet"])
def test_gradient_penalty_reaches_the_discriminators_weights(architecture):
    """By a second derivative, which the penalty's finite difference along a direction confirms."""
    model = tiny_discriminator(architecture=architecture, conv_clamp=None)
    images = torch.randn(4, 3, 16, 16).double().requires_grad_()

    def penalty():
        (gradient,) = torch.autograd.grad(model(images).logits.sum(), images, create_graph=True)
        return gradient.square().sum()

    penalty().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {"b4.conv.bias", "b4.fc.bias", "b4.out.bias"}  # nothing but leaky ReLUs follows them
    weight = model.b8.conv1.weight
    direction, analytic = torch.randn_like(weight), weight.grad.clone()
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(direction, alpha=sign * 1e-6)
        values.append(penalty().item())
        with torch.no_grad():
            weight.sub_(direction, alpha=sign * 1e-6)
    assert (values[0] - values[1]) / 2e-6 == pytest.approx((analytic * direction).sum().item(), rel=1e-4)


def test_bfloat16_autocast_is_close():
    generator, discriminator = tiny_generator().float(), tiny_discriminator().float()
    inputs = {name: value.float() for name, value in draws(generator).items()}
    with torch.no_grad():
        plain = generator(**inputs)
        logits = discriminator(plain.images).logits
        with torch.autocast("cpu", torch.bfloat16):
            rough = generator(**inputs)
            rough_logits = discriminator(plain.images).logits
    assert torch.equal(rough.intermediate_latents, plain.intermediate_latents)  # the mapping is in full precision
    assert rough.images.dtype == torch.float32 and rough.block_features[-1].dtype == torch.bfloat16
    assert 0 < (rough.images - plain.images).abs().max() < 0.05 * plain.images.abs().max()
    torch.testing.assert_close(rough_logits.float(), logits, atol=0.05, rtol=0.1)


# -- the discriminator ----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["orig", "resnet"])
def test_discriminator_output(architecture):
    model = tiny_discriminator(architecture=architecture)
    images = torch.randn(4, 3, 16, 16).double()
    output = model(images)
    assert output.logits.shape == (4,)
    shapes = [(10, 8, 8), (10, 4, 4), (10, 1, 1)]
    assert [tuple(f.shape[1:]) for f in output.block_features] == shapes
    assert torch.equal(output.pooler_output, output.block_features[-1].flatten(1))
    torch.testing.assert_close(output.logits, model.b4.out(output.pooler_output)[:, 0])
    model.config.features = "multi"
    means = [f.mean(dim=(2, 3)) for f in output.block_features]
    torch.testing.assert_close(model(images).pooler_output, torch.cat(means, dim=1))
    assert (model(images[:2]).logits - output.logits[:2]).abs().max() > 1e-6  # other images in the group
    alone = tiny_discriminator(architecture=architecture, mbstd_group_size=1)
    torch.testing.assert_close(alone(images[:2]).logits, alone(images).logits[:2])


def test_the_papers_discriminator_features():
    with torch.device("meta"):
        model = HfkdStyleGan2DiscriminatorModel(HfkdStyleGan2DiscriminatorConfig.cifar(features="multi"))
        assert model(torch.zeros(2, 3, 32, 32)).pooler_output.shape == (2, 2048)
    assert model.config.mbstd_group_size == 32 and not any("skip" in name for name in model.state_dict())


def test_a_discriminator_of_classes():
    model = tiny_discriminator(num_classes=3)
    images, labels = torch.randn(2, 3, 16, 16).double(), torch.tensor([2, 0])
    output = model(images)
    assert output.logits is None and output.pooler_output.shape == (2, 10)
    embedding = model.mapping(None, labels)
    expected = (model.b4.out(output.pooler_output) * embedding).sum(dim=1) / math.sqrt(10)
    torch.testing.assert_close(model(images, labels).logits, expected)
    with pytest.raises(ValueError, match="leave labels out"):
        tiny_discriminator()(images, labels)


def test_unfit_inputs_and_fields_are_refused():
    with pytest.raises(ValueError, match="takes .N, 3, 16, 16."):
        tiny_discriminator()(torch.zeros(1, 3, 8, 8).double())
    grey = tiny_discriminator(num_channels=1)
    images = torch.randn(2, 1, 16, 16).double()
    torch.testing.assert_close(grey(images.expand(-1, 3, -1, -1)).logits, grey(images).logits)
    for config_class, fields, message in (
        (HfkdStyleGan2GeneratorConfig, {"image_size": 48}, "image_size=48 must be a power of two"),
        (HfkdStyleGan2GeneratorConfig, {"image_size": 2}, "image_size=2 must be a power of two"),
        (HfkdStyleGan2GeneratorConfig, {"latent_size": 0}, "latent_size=0 must be at least 1"),
        (HfkdStyleGan2GeneratorConfig, {"channel_base": 16}, "channel_base=16 must be at least 32"),
        (HfkdStyleGan2GeneratorConfig, {"conv_clamp": -1.0}, "conv_clamp=-1.0 must be above 0"),
        (HfkdStyleGan2GeneratorConfig, {"num_classes": 4, "num_labels": 3}, "the 3 names of id2label"),
        (HfkdStyleGan2GeneratorConfig, {"num_classes": 4, "num_labels": 2}, "the 2 names of id2label"),
        (
            HfkdStyleGan2GeneratorConfig,
            {"num_classes": 4, "id2label": {0: "cat", 1: "dog"}},
            "the 2 names of id2label",
        ),
        (HfkdStyleGan2DiscriminatorConfig, {"image_size": 4}, "image_size=4 must be at least 8"),
        (HfkdStyleGan2DiscriminatorConfig, {"architecture": "skip"}, "architecture='skip' is unknown"),
        (HfkdStyleGan2DiscriminatorConfig, {"features": "all"}, "features='all' is unknown"),
        (HfkdStyleGan2DiscriminatorConfig, {"mbstd_group_size": 0}, "mbstd_group_size=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            config_class(**fields)
        assert "\n" not in str(caught.value)


# -- saving ---------------------------------------------------------------------------------------


CODE = {
    "generator": {"configuration_stylegan2_generator.py", "modeling_stylegan2_generator.py", "generator.py"},
    "discriminator": {
        "configuration_stylegan2_discriminator.py",
        "configuration_convnet.py",
        "modeling_stylegan2_discriminator.py",
        "discriminator.py",
    },
}


LOAD = """
import torch
from transformers import AutoModel

torch.set_num_threads(1)
generator = AutoModel.from_pretrained("generator", trust_remote_code=True)
print(generator.sample(2, seed=3).flatten().tolist())
discriminator = AutoModel.from_pretrained("discriminator", trust_remote_code=True)
print(discriminator(generator.sample(2, seed=3)).pooler_output.flatten().tolist())
"""


def test_both_load_without_hfkd(tmp_path):
    models = {"generator": tiny_generator().float(), "discriminator": tiny_discriminator(features="multi").float()}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        shared = {"configuration_stylegan2.py", "stylegan2_layers.py"}
        assert {file.name for file in (tmp_path / name).glob("*.py")} == CODE[name] | shared
        loaded = AutoModel.from_pretrained(tmp_path / name)
        assert type(loaded) is type(model)
        assert all(getattr(loaded.config, field) == getattr(model.config, field) for field in SIZES)
        assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
    images = models["generator"].sample(2, seed=3)
    printed = run_clean(LOAD, {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}, tmp_path).splitlines()
    torch.testing.assert_close(torch.tensor(json.loads(printed[0])), images.flatten())
    with torch.no_grad():
        pooled = models["discriminator"](images).pooler_output
    torch.testing.assert_close(torch.tensor(json.loads(printed[1])), pooled.flatten(), atol=1e-5, rtol=1e-4)


def test_what_a_checkpoint_lacks_is_fresh_and_not_memory(tmp_path):
    tiny_generator().float().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    left = {key: value for key, value in state.items() if "filter" not in key and "conv0.weight" not in key}
    save_file(left, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = AutoModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items() if "conv0.weight" not in key)
    assert loaded["synthesis.b8.conv0.weight"].std().item() == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize("make", [tiny_generator, tiny_discriminator])
def test_published_files_import_only_what_everyone_has(make):
    check_imports(code_files(make()))
