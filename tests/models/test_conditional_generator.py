"""The class-conditional generator: its plans, its condition, its samples, and what is saved."""

import json
import math
import os
from collections import Counter

import pytest
import torch
from clean_process import run_clean
from torch import nn
from transformers import AutoModel

from hfkd.models import HfkdConditionalGeneratorConfig, HfkdConditionalGeneratorModel, code_files


PAIR = {"num_labels": 5, "class_counts": [2, 3]}


def generator(image_size=8, num_channels=1, **settings):
    config = HfkdConditionalGeneratorConfig.for_images(image_size, num_channels, **({"num_labels": 3} | settings))
    return HfkdConditionalGeneratorModel(config)


def draws(model, n):
    return torch.randn(n, model.config.latent_size)


@pytest.mark.parametrize(
    ("image_size", "channels", "maps"),
    [
        (1, 2, [(128, 1)]),
        (8, 1, [(32, 2), (32, 4), (16, 8)]),
        (28, 1, [(64, 7), (64, 14), (32, 28)]),
        (32, 3, [(128, 4), (128, 8), (64, 16)]),
        (64, 3, [(128, 8), (128, 16), (64, 32)]),
    ],
)
def test_plans(image_size, channels, maps):
    model = generator(image_size, channels)
    output = model(latents := draws(model, 2), torch.tensor([0, 2]))
    assert output.images.shape == (2, channels, image_size, image_size) and output.images.abs().max() < 1
    assert [tuple(f.shape) for f in output.block_features] == [(2, width, side, side) for width, side in maps]
    assert output.latents is latents
    assert len(model.layers) == 3 and len(model.blocks) + 1 == (1 if image_size == 1 else 3)


@pytest.mark.parametrize(("image_size", "mean"), [(1, [0.5, -0.25]), (8, [-0.9]), (32, [-0.5, 0.0, 1.0])])
def test_start_at_a_colour(image_size, mean):
    model = generator(image_size, len(mean))
    labels = torch.arange(64) % 3
    latents = draws(model, 64)
    before = model(latents, labels).images
    model.start_at(torch.tensor(mean))
    images = model(latents, labels).images
    assert torch.allclose(images.mean(dim=(0, 2, 3)), torch.tensor(mean), atol=0.15)
    assert 0 < images.std(dim=0).mean() < 0.3 * before.std(dim=0).mean()  # what differs still differs, but less


def test_the_defaults_are_the_plan_of_28_pixels():
    assert HfkdConditionalGeneratorConfig.for_images(28).to_dict() == HfkdConditionalGeneratorConfig().to_dict()


@pytest.mark.parametrize("image_size", [1, 28])
def test_fresh_weights_give_a_spread_of_order_one(image_size):
    """Kaiming's weights keep the variance, also through transposed convolutions; the last layer has no norm."""
    model = generator(image_size)
    last = list(model.modules())[-1]
    assert isinstance(last, nn.Linear | nn.ConvTranspose2d) and not last.bias.any()
    seen = []
    last.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    model(draws(model, 256), torch.arange(256) % 3)
    inside = seen[0][..., 2:-2, 2:-2] if image_size > 1 else seen[0]  # at the border fewer inputs are summed
    assert 0.4 < inside.std() < 1.6
    for layer in (module for module in model.modules() if isinstance(module, nn.ConvTranspose2d)):
        fan_in = layer.in_channels * layer.kernel_size[0] ** 2 / layer.stride[0] ** 2
        rel = 5 / layer.weight.numel() ** 0.5
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=rel)


def test_fully_connected_images_of_any_size():
    model = generator(8, hidden_sizes=[20], conv_sizes=[], strides=[])
    assert model(draws(model, 2), torch.tensor([0, 1])).images.shape == (2, 1, 8, 8)
    assert model.config.map_size == 1


# -- classes and classifiers -----------------------------------------------------------------------


def test_the_class_decides():
    model = generator().eval()
    latents = draws(model, 1).expand(3, -1)
    images = model(latents, torch.arange(3)).images
    assert min((images[a] - images[b]).abs().max() for a, b in ((0, 1), (0, 2), (1, 2))) > 1e-3
    assert model.layers[0][0].in_features == model.config.latent_size + 3


def test_the_classifier_decides():
    model = generator(**PAIR).eval()
    assert model.config.num_classifiers == 2 and model.layers[0][0].in_features == model.config.latent_size + 2 + 3
    latents, labels = draws(model, 2), torch.tensor([1, 1])
    first, second = (model(latents, labels, index).images for index in (0, 1))
    assert (first - second).abs().max() > 1e-3
    mixed = model(latents, labels, torch.tensor([0, 1])).images
    torch.testing.assert_close(mixed, torch.stack([first[0], second[1]]))
    names = {0: "cat", 1: "dog", 2: "ant", 3: "bee", 4: "fly"}
    config = HfkdConditionalGeneratorConfig.for_images(8, id2label=names, class_counts=[2, 3])
    assert (config.class_names(), config.class_names(1)) == (["cat", "dog"], ["ant", "bee", "fly"])


def test_forward_needs_to_know_what_to_make():
    model, several = generator(), generator(**PAIR)
    with pytest.raises(ValueError, match="give labels"):
        model(draws(model, 2))
    with pytest.raises(ValueError, match="knows 2 classifiers: give classifier_index"):
        several(draws(several, 2), torch.tensor([0, 1]))


# -- samples ---------------------------------------------------------------------------------------


def test_samples_are_balanced_unless_labels_are_given():
    model = generator()
    balanced = model.sample(7, seed=0)
    assert torch.equal(balanced, model.sample(7, labels=[0, 1, 2, 0, 1, 2, 0], seed=0))
    assert not torch.equal(balanced, model.sample(7, labels=[0] * 7, seed=0))
    several = generator(**PAIR)
    for index, count in ((0, 2), (1, 3)):
        labels = several.conditions(6, classifier_index=index)["labels"].tolist()
        assert Counter(labels) == dict.fromkeys(range(count), 6 // count)
    assert not torch.equal(several.sample(6, seed=0), several.sample(6, seed=0, classifier_index=1))


def test_a_sample_is_its_seeds_and_of_nothing_else_in_the_batch():
    model = generator().train()
    state = torch.random.get_rng_state()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    first, again, other = (model.sample(4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.random.get_rng_state()) and model.training
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    torch.testing.assert_close(model.sample(2, seed=0), first[:2])
    latents = model.draw_inputs(4, torch.Generator().manual_seed(0))["latents"]
    alone = model.eval()(latents[3:], torch.tensor([0])).images
    torch.testing.assert_close(alone, first[3:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": [0, 1, 3, 0]}, "label 3 is outside the 3 classes: give numbers from 0 to 2"),
        ({"labels": [0, -1, 1, 0]}, "label -1 is outside"),
        ({"labels": [0, 1]}, "4 images need 4 labels"),
        ({"classifier_index": 1}, "classifier_index=1 is unknown: there are 1 classifiers"),
    ],
)
def test_unknown_conditions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        generator().sample(4, **arguments)


def test_latent_skip_spreads_fresh_images_as_latents_do():
    plain, skipping = (generator(1, 2, latent_skip=skip).eval() for skip in (False, True))
    skipping.load_state_dict(plain.state_dict())
    latents, labels = draws(plain, 64), torch.zeros(64, dtype=torch.long)
    expected = plain(latents, labels).images.atanh() + latents[:, :2, None, None]
    torch.testing.assert_close(skipping(latents, labels).images.atanh(), expected, atol=1e-3, rtol=1e-3)


# -- refusals and saving ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 27}, "image_size=27 must be a map's side times strides"),
        ({"hidden_sizes": [10, 50]}, "a multiple of its positions"),
        ({"strides": [2, 2]}, "one of conv_sizes=.64, 32. for each transposed convolution but the last"),
        ({"hidden_sizes": []}, "must all be at least 1"),
        ({"latent_size": 0}, "must all be at least 1"),
        ({"num_labels": 4, "class_counts": [1, 2]}, "together the 4 names of id2label"),
        ({"latent_skip": True}, "needs a latent for each of the 784 values of an image"),
    ],
)
def test_unfit_fields_are_refused(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        HfkdConditionalGeneratorConfig(**settings)
    assert "\n" not in str(caught.value)


def test_sizes_without_a_plan_are_refused():
    with pytest.raises(
        ValueError, match="image_size=48 has no generator: resize the images to one of 1, 8, 28, 32, 64"
    ):
        HfkdConditionalGeneratorConfig.for_images(48)


LOAD = """
import torch
from transformers import AutoModel

torch.set_num_threads(1)
model = AutoModel.from_pretrained(".", trust_remote_code=True)
print(model.sample(4, seed=0, classifier_index=1).flatten().tolist())
print(type(model).__module__.split(".")[0], model.config.class_names(1))
"""


def test_loads_without_hfkd(tmp_path):
    model = generator(**PAIR)
    model.save_pretrained(tmp_path)
    names = {"configuration_conditional_generator.py", "modeling_conditional_generator.py", "generator.py"}
    assert {file.name for file in tmp_path.glob("*.py")} == names == {file.name for file in code_files(model)}
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.config.class_counts == [2, 3]
    expected = model.sample(4, seed=0, classifier_index=1)
    assert torch.equal(loaded.sample(4, seed=0, classifier_index=1), expected)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    images, facts = run_clean(LOAD, environment, tmp_path).splitlines()
    torch.testing.assert_close(torch.tensor(json.loads(images)), expected.flatten())
    assert facts == "transformers_modules ['LABEL_2', 'LABEL_3', 'LABEL_4']"
