"""Our two residual families: sizes, outputs, losses, norms, shortcuts, precision and refusals."""

import pytest
import torch
from torch.nn import functional as F

from hfkd.models import (
    HfkdResNetConfig,
    HfkdResNetForImageClassification,
    HfkdResNetModel,
    HfkdWideResNetConfig,
    HfkdWideResNetForImageClassification,
)
from hfkd.models.layers import PadShortcut


OURS = {
    "resnet": (HfkdResNetConfig, HfkdResNetForImageClassification, {"depths": [1, 1, 1]}),
    "wide_resnet": (HfkdWideResNetConfig, HfkdWideResNetForImageClassification, {"depth": 10, "widen_factor": 1}),
}


def build(name, **settings):
    config_class, model_class, tiny = OURS[name]
    return model_class(config_class(**{**tiny, "num_labels": 4, **settings}))


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(params=OURS)
def name(request):
    return request.param


@pytest.mark.parametrize(("depth", "parameters"), [(20, 278_324), (32, 472_756), (56, 861_620), (110, 1_736_564)])
def test_cifar_resnet_parameters(depth, parameters):
    config = HfkdResNetConfig(depths=[(depth - 2) // 6] * 3, num_labels=100)
    assert count(HfkdResNetForImageClassification(config)) == parameters


@pytest.mark.parametrize(
    ("depth", "widen_factor", "parameters"),
    [(16, 2, 703_284), (16, 4, 2_772_020), (28, 2, 1_479_220), (28, 4, 5_872_180)],
)
def test_wide_resnet_parameters(depth, widen_factor, parameters):
    config = HfkdWideResNetConfig(depth=depth, widen_factor=widen_factor, num_labels=100)
    assert count(HfkdWideResNetForImageClassification(config)) == parameters


def test_resnet18_cifar_and_resnet50_parameters():
    wide = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
    with torch.device("meta"):
        resnet18 = HfkdResNetModel(HfkdResNetConfig(**wide))
        resnet50 = HfkdResNetForImageClassification(
            HfkdResNetConfig(
                embedding_size=64,
                hidden_sizes=[256, 512, 1024, 2048],
                depths=[3, 4, 6, 3],
                layer_type="bottleneck",
                stem="imagenet",
                num_labels=1000,
            )
        )
    assert count(resnet18) == 11_168_832
    assert count(resnet50) == 25_557_032


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_resnet_output_shapes(stem, layer_type):
    model = build("resnet", stem=stem, layer_type=layer_type)
    output = model(torch.randn(2, 3, 32, 32), output_hidden_states=True)
    side = 32 if stem == "cifar" else 8
    assert output.logits.shape == (2, 4)
    assert [tuple(state.shape) for state in output.hidden_states] == [
        (2, 16, side, side),
        (2, 16, side, side),
        (2, 32, side // 2, side // 2),
        (2, 64, side // 4, side // 4),
    ]
    base = model.base_model(torch.randn(2, 3, 32, 32))
    assert base.hidden_states is None
    assert base.pooler_output.shape == (2, 64)
    torch.testing.assert_close(base.pooler_output, base.last_hidden_state.mean((2, 3)))


def test_wide_resnet_output_shapes():
    output = build("wide_resnet", widen_factor=2).base_model(torch.randn(2, 3, 16, 16), output_hidden_states=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [
        (2, 16, 16, 16),
        (2, 32, 16, 16),
        (2, 64, 8, 8),
        (2, 128, 4, 4),
    ]
    assert output.last_hidden_state.shape == (2, 128, 4, 4)
    assert output.last_hidden_state.min() == 0.0  # after the final ReLU


def test_return_dict_false_gives_tuples(name):
    model, images = build(name).eval(), torch.randn(2, 3, 8, 8)
    loss, logits = model(images, labels=torch.tensor([0, 1]), return_dict=False)
    torch.testing.assert_close(logits, model(images).logits)
    model.config.return_dict = False
    torch.testing.assert_close(model(images)[0], logits)
    assert loss.ndim == 0


def test_integer_labels_give_the_cross_entropy(name):
    model, labels = build(name), torch.tensor([3, 0])
    output = model(torch.randn(2, 3, 8, 8), labels=labels)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))


@pytest.mark.parametrize("problem_type", [None, "multi_label_classification"])
def test_float_labels_give_the_binary_cross_entropy(name, problem_type):
    model = build(name, problem_type=problem_type)
    labels = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    output = model(torch.randn(2, 3, 8, 8), labels=labels)
    torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, labels))


def test_shortcuts_differ_by_the_projections_only():
    with_b, with_a = build("resnet", shortcut="B"), build("resnet", shortcut="A")
    projections = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert count(with_b) - count(with_a) == projections
    images = torch.randn(2, 3, 8, 8)
    assert with_a(images).logits.shape == with_b(images).logits.shape


def test_pad_shortcut_subsamples_and_fills_with_zeros():
    state = torch.randn(2, 3, 6, 5)
    output = PadShortcut(3, 7, stride=2)(state)
    torch.testing.assert_close(output[:, :3], state[:, :, ::2, ::2])
    assert output.shape == (2, 7, 3, 3)
    assert not output[:, 3:].any()


def test_only_batch_norm_makes_samples_depend_on_each_other(name):
    images = torch.randn(4, 3, 8, 8)
    for norm in ("batch", "group", "none"):
        model = build(name, norm=norm).train()
        together, alone = model(images).logits[:2], model(images[:2]).logits
        assert torch.allclose(together, alone, atol=1e-5) == (norm != "batch")


def test_norms_and_biases(name):
    for norm, buffers, biased in (("batch", True, False), ("group", False, False), ("none", False, True)):
        model = build(name, norm=norm)
        convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
        assert bool(list(model.buffers())) == buffers
        assert all((conv.bias is not None) == biased for conv in convolutions)
        assert set(dict(model.named_buffers())) <= set(model.state_dict())  # persistent ones only


def test_group_count_divides_odd_widths():
    model = build("resnet", norm="group", embedding_size=6, hidden_sizes=[6, 12, 20])
    groups = {m.num_channels: m.num_groups for m in model.modules() if isinstance(m, torch.nn.GroupNorm)}
    assert groups == {6: 2, 12: 4, 20: 4}


def test_norm_free_depth_keeps_the_signal_and_reaches_every_parameter(name):
    deep = {"depths": [9, 9, 9]} if name == "resnet" else {"depth": 40}
    images = torch.randn(4, 3, 16, 16)
    shallow_std = build(name, norm="none")(images).logits.std()
    model = build(name, norm="none", **deep)
    output = model(images, labels=torch.arange(4))
    assert shallow_std / 10 < output.logits.std() < 10 * shallow_std
    output.loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_learns_eight_images(name, norm):
    model, images, labels = build(name, norm=norm), torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    first = model(images, labels=labels).loss.item()
    for _ in range(40):
        optimizer.zero_grad()
        model(images, labels=labels).loss.backward()
        optimizer.step()
    assert model(images, labels=labels).loss.item() < 0.3 * first


def test_he_initialisation_with_fan_out():
    model = HfkdResNetForImageClassification(HfkdResNetConfig())
    conv = model.backbone.stages[2][1].branch[0]
    assert conv.weight.shape == (64, 64, 3, 3)
    assert abs(conv.weight.std().item() - (2 / (64 * 9)) ** 0.5) < 2e-3
    assert abs(model.classifier.weight).max() <= 64**-0.5


def test_grey_network_averages_three_equal_channels(name):
    model, grey = build(name, num_channels=1).eval(), torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(model(grey).logits, model(grey.expand(-1, 3, -1, -1)).logits)


def test_precisions_and_layouts_agree(name):
    model, images = build(name).eval(), torch.randn(2, 3, 16, 16)
    logits = model(images).logits
    channels_last = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(channels_last(images.to(memory_format=torch.channels_last)).logits, logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(images, labels=torch.tensor([0, 1]))
    assert half.logits.dtype == torch.bfloat16
    assert half.loss.isfinite()
    torch.testing.assert_close(half.logits.float(), logits, atol=0.05, rtol=0.05)
    double = model.double()(images.double()).logits
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), logits, atol=1e-4, rtol=1e-4)


def test_builds_on_the_meta_device(name):
    with torch.device("meta"):
        model = build(name)
    assert all(tensor.is_meta for tensor in model.state_dict().values())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 2, 8, 8), "2 channels"),
        ((2, 1, 8, 8), "1 channels"),
        ((2, 3, 3, 8), "total stride 4"),
        ((3, 8, 8), "expected \\(N, C, H, W\\)"),
    ],
)
def test_refuses_images_it_cannot_take(name, shape, message):
    with pytest.raises(ValueError, match=message) as error:
        build(name)(torch.randn(shape))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config_class", "settings"),
    [
        (HfkdResNetConfig, {"norm": "layer"}),
        (HfkdResNetConfig, {"stem": "mnist"}),
        (HfkdResNetConfig, {"shortcut": "C"}),
        (HfkdResNetConfig, {"layer_type": "bottle"}),
        (HfkdResNetConfig, {"depths": [1, 1]}),
        (HfkdResNetConfig, {"depths": [1, 0, 1]}),
        (HfkdResNetConfig, {"num_channels": 0}),
        (HfkdWideResNetConfig, {"depth": 17}),
        (HfkdWideResNetConfig, {"depth": 4}),
        (HfkdWideResNetConfig, {"widen_factor": 0}),
    ],
)
def test_refuses_configurations(config_class, settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}=") as error:
        config_class(**settings)
    assert "\n" not in str(error.value)
