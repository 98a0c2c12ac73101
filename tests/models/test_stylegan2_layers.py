"""StyleGAN2's layers against its formulas, written out from the saved tensors alone, and its identities."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_stylegan2 import draws, tiny_discriminator, tiny_generator

from hfkd.models.stylegan2_layers import MinibatchStd, StyledConv


def filter_of(gain, dtype):
    """The outer product of [1, 3, 3, 1] with itself, whose sum is `gain`."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=dtype) / 8
    return torch.outer(taps, taps).view(1, 1, 4, 4) * gain


def linear_of(state, name, x, lr=1.0):
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return x @ (weight * lr / math.sqrt(weight.shape[1])).T + bias * lr


def act(x):
    return torch.where(x > 0, x, 0.2 * x) * math.sqrt(2)


def unit(x):
    """Rows with a mean square of 1."""
    return x / (x.square().mean(dim=1, keepdim=True) + 1e-8).sqrt()


def reference(state, config, latents, noise, labels=None):
    """Images and features from the state alone: weights of its own for each image, filters on zero-filled maps."""

    def linear(name, x, lr=1.0):
        return linear_of(state, name, x, lr)

    def double(x):
        """Zeros between the positions, then the filter [1, 3, 3, 1]/4 along both sides."""
        n, channels, side, _ = x.shape
        spread = x.new_zeros(n, channels, 2 * side, 2 * side)
        spread[:, :, ::2, ::2] = x
        padded = F.pad(spread, (2, 1, 2, 1)).flatten(0, 1)[:, None]
        return F.conv2d(padded, filter_of(4, x.dtype)).view(n, channels, 2 * side, -1)

    def conv(name, x, w, up, noise):
        style, weight = linear(f"{name}.affine", w), state[f"{name}.weight"]
        outputs = []
        for image, s in zip(x, style, strict=True):
            own = weight * s[None, :, None, None]
            own = own / (own.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8).sqrt()
            if up:
                grown = F.conv_transpose2d(image[None], own.transpose(0, 1), stride=2)
                padded = F.pad(grown, (1, 1, 1, 1)).transpose(0, 1)
                outputs.append(F.conv2d(padded, filter_of(4, x.dtype)).transpose(0, 1))
            else:
                outputs.append(F.conv2d(image[None], own, padding=1))
        x = torch.cat(outputs) + state[f"{name}.noise_strength"] * noise
        return act(x + state[f"{name}.bias"][:, None, None])

    def colours(name, x, w):
        style, weight = linear(f"{name}.affine", w) / math.sqrt(x.shape[1]), state[f"{name}.weight"][:, :, 0, 0]
        return torch.einsum("nihw,ni,oi->nohw", x, style, weight) + state[f"{name}.bias"][:, None, None]

    w = unit(latents)
    if labels is not None:
        one_hot = torch.eye(config.num_classes, dtype=w.dtype)[labels]
        w = torch.cat([w, unit(linear("mapping.embed", one_hot))], dim=1)
    for number in range(config.mapping_layers):
        w = act(linear(f"mapping.fc{number}", w, 0.01))
    x, image, features, used = state["synthesis.b4.const"].expand(len(w), -1, -1, -1), None, [], 0
    for r in config.resolutions:
        for k in (1,) if r == 4 else (0, 1):
            layer_noise = noise[:, used : used + r * r].view(-1, 1, r, r)
            x, used = conv(f"synthesis.b{r}.conv{k}", x, w, r > 4 and k == 0, layer_noise), used + r * r
        rgb = colours(f"synthesis.b{r}.torgb", x, w)
        image = rgb if image is None else double(image) + rgb
        features.append(x)
    return image, features


@pytest.mark.parametrize("num_classes", [0, 4])
def test_forward_equals_the_formulas(num_classes):
    model = tiny_generator(num_classes=num_classes)
    inputs = draws(model)
    if num_classes:
        inputs["labels"] = torch.tensor([2, 0, 3])
    output = model(**inputs)
    images, features = reference(model.state_dict(), model.config, **inputs)
    torch.testing.assert_close(output.images, images)
    torch.testing.assert_close(list(output.block_features), features)
    assert output.latents is inputs["latents"]
    assert torch.equal(model(**inputs, return_dict=False)[0], output.images)


def judged(state, config, images, labels=None):
    """Logits and last hidden layer from the state alone: filter and convolution are one larger kernel."""

    def conv(name, x, down=False):
        weight = state[f"{name}.weight"]
        outputs, inputs, side = weight.shape[:3]
        weight = weight / math.sqrt(inputs * side**2)
        if not down:
            return F.conv2d(x, weight, padding=side // 2)
        both = F.conv_transpose2d(weight.flatten(0, 1)[:, None], filter_of(1, x.dtype))
        return F.conv2d(x, both.view(outputs, inputs, side + 3, side + 3), stride=2, padding=1 + side // 2)

    def layer(name, x, down=False):
        return act(conv(name, x, down) + state[f"{name}.bias"][:, None, None])

    x = layer(f"b{config.image_size}.fromrgb", images)
    for r in reversed(config.resolutions[1:]):
        main = layer(f"b{r}.conv1", layer(f"b{r}.conv0", x), down=True)
        x = main if config.architecture == "orig" else (main + conv(f"b{r}.skip", x, down=True)) / math.sqrt(2)
    count = len(x) // config.mbstd_group_size
    groups = [x[n % count :: count] for n in range(len(x))]
    deviations = [((group - group.mean(dim=0)).square().mean(dim=0) + 1e-8).sqrt().mean() for group in groups]
    x = torch.cat([x, torch.stack(deviations)[:, None, None, None].expand(-1, 1, 4, 4)], dim=1)
    hidden = act(linear_of(state, "b4.fc", layer("b4.conv", x).flatten(1)))
    output = linear_of(state, "b4.out", hidden)
    if labels is None:
        return output[:, 0], hidden
    w = unit(linear_of(state, "mapping.embed", torch.eye(config.num_classes, dtype=x.dtype)[labels]))
    for number in range(config.mapping_layers):
        w = act(linear_of(state, f"mapping.fc{number}", w, 0.01))
    return (output * w).sum(dim=1) / math.sqrt(output.shape[1]), hidden


@pytest.mark.parametrize("num_classes", [0, 4])
@pytest.mark.parametrize("architecture", ["orig", "resnet"])
def test_the_discriminator_equals_the_formulas(architecture, num_classes):
    model = tiny_discriminator(architecture=architecture, num_classes=num_classes, mbstd_group_size=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 5)
    images, labels = torch.randn(4, 3, 16, 16).double(), torch.tensor([3, 0, 2, 0]) if num_classes else None
    output = model(images, labels)
    logits, hidden = judged(model.state_dict(), model.config, images, labels)
    torch.testing.assert_close(output.logits, logits)
    torch.testing.assert_close(output.pooler_output, hidden)


def test_a_small_clamp_limits_every_map():
    model = tiny_generator(conv_clamp=0.5)
    assert all(f.abs().max() == 0.5 for f in model(**draws(model)).block_features)


def test_mapping_takes_the_direction_of_latents_only():
    model, inputs = tiny_generator(), draws(tiny_generator())
    longer = model.mapping(7 * inputs["latents"], None)
    torch.testing.assert_close(longer, model.mapping(inputs["latents"], None), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("up", [False, True])
def test_demodulation_takes_the_scale_of_styles_away(up):
    layer = StyledConv(4, 3, 5, 8, up=up, clamp=None).double()
    layer.reset_parameters()
    layer.affine.reset_parameters()
    maps, w = torch.randn(2, 4, 4 if up else 8, 4 if up else 8).double(), torch.randn(2, 5).double()
    before = layer(maps, w, None)
    with torch.no_grad():
        layer.affine.weight.mul_(-3)
        layer.affine.bias.mul_(-3)
    torch.testing.assert_close(layer(maps, w, None), torch.where(before > 0, -0.2 * before, -5 * before))
    with torch.no_grad():
        layer.affine.weight.mul_(-1)
        layer.affine.bias.mul_(-1)
    torch.testing.assert_close(layer(maps, w, None), before, atol=1e-7, rtol=1e-6)
    assert before.shape == (2, 3, 8, 8)


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_float16_holds_what_a_clamp_lets_through(up, autocast):
    """Its largest number is 65504: sums over 256 channels of maps near the clamp, times styles of 16, are larger."""
    layer = StyledConv(256, 8, 4, 8, up=up, clamp=256.0)
    layer.reset_parameters()
    layer.affine.reset_parameters()
    with torch.no_grad():
        layer.affine.bias.fill_(16)
        maps, w = torch.randn(2, 256, 4 if up else 8, 4 if up else 8) * 100, torch.randn(2, 4)
        expected = layer(maps, w, None)
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            found = layer(maps, w, None) if autocast else layer.half()(maps.half(), w.half(), None)
    assert found.dtype == torch.float16 and found.isfinite().all() and expected.abs().max() > 100
    torch.testing.assert_close(found.float(), expected, atol=0.5, rtol=0.01)


def test_filters_keep_constants_inside():
    block = tiny_generator().synthesis.b8
    ones = torch.ones(1, 2, 6, 6).double()
    assert block.upsample(ones)[:, :, 2:-2, 2:-2].sub(1).abs().max() < 1e-12
    assert block.upsample(ones).shape[-1] == 12
    halved = block.smooth(ones, stride=2, padding=1)
    assert halved.shape[-1] == 3 and halved[0, 0, 1, 1] == 1


def test_deviation_within_groups():
    maps = torch.tensor([0.0, 10.0, 2.0, 30.0]).double().view(4, 1, 1, 1).expand(4, 2, 3, 3)
    added = {size: MinibatchStd(size)(maps)[:, -1] for size in (1, 2, 3, 4, None)}
    root = torch.tensor(1e-8).double().sqrt().item()
    assert added[1].flatten().tolist() == pytest.approx([root] * 36)
    assert added[2][:, 0, 0].tolist() == pytest.approx([1, 10, 1, 10])  # images 0 and 2, 1 and 3
    assert torch.equal(added[3], added[2])  # three do not divide four
    assert torch.equal(added[4], added[None])
    torch.testing.assert_close(added[4], maps[:, 0].std(dim=0, correction=0).expand(4, 3, 3))
    assert torch.equal(MinibatchStd(4)(maps)[:, :2], maps)


def test_a_shortcut_is_half_of_the_variance():
    model = tiny_discriminator()
    block, maps = model.b8, torch.randn(2, 10, 8, 8).double()
    with torch.no_grad():
        block.conv1.weight.zero_()
        expected = F.conv2d(F.pad(maps, (1, 1, 1, 1)), block.resample_filter.expand(10, 1, 4, 4), stride=2, groups=10)
        expected = F.conv2d(expected, block.skip.weight / math.sqrt(10)) * math.sqrt(0.5)
        torch.testing.assert_close(block(maps), expected)
