"""Squeeze module and projector: sizes of the public code, what they compute; features of any backbone."""

import pytest
import torch
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hfkd.models import ClassifierAdapter, HfkdResNetConfig, HfkdResNetForImageClassification, build_student
from hfkd.models.backbone import feature_size, pooled_features
from hfkd.models.squeeze_module import Projector, SqueezeModule


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def maps(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, width, side, side, generator=generator) for width, side in ((6, 4), (3, 8))]


def test_parameter_counts_of_the_code():
    with torch.device("meta"):
        assert parameters(SqueezeModule([512] * 4)) == 16_795_648
        assert parameters(Projector(512)) == 2_101_248
        assert parameters(Projector(2048)) == 20_987_904


def test_backbones_have_the_codes_parameter_counts():
    for name, size, count in (
        ("resnet18_cifar", 32, 11_168_832),
        ("resnet18", 64, 11_176_512),
        ("resnet50", 64, 23_508_032),
    ):
        student = build_student(name, class_names=("a", "b"), image_size=size)
        assert parameters(student.base_model) == count, name


def test_the_module_is_an_mlp_of_a_sum_of_linear_layers_on_averages():
    module = SqueezeModule([6, 3], representation_size=7, hidden_size=8).eval()
    layers = [linear(feature.mean(dim=(2, 3))) for linear, feature in zip(module.lateral, maps(), strict=True)]
    torch.testing.assert_close(module(maps()), module.mlp(layers[0] + layers[1]))
    kinds = [type(layer).__name__ for layer in module.mlp.modules() if not list(layer.children())]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    assert [layer.bias is not None for layer in module.modules() if isinstance(layer, torch.nn.Linear)] == [
        True, True, False, False, True,
    ]  # fmt: skip


def test_positions_do_not_matter_and_blocks_do():
    module = SqueezeModule([6, 6], representation_size=7, hidden_size=8).eval()
    one, other = maps()[0], maps(1)[0]
    shuffled = one.flatten(2)[:, :, torch.randperm(16, generator=torch.Generator().manual_seed(0))].view_as(one)
    torch.testing.assert_close(module([shuffled, other]), module([one, other]))
    assert (module([other, one]) - module([one, other])).abs().max() > 1e-3
    pooled = [feature.mean(dim=(2, 3)) for feature in (one, other)]
    torch.testing.assert_close(module(pooled), module([one, other]))


def test_depth_zero_has_no_parameters():
    module = SqueezeModule([6, 3], representation_size=7, depth=0)
    assert (parameters(module), module.out_features) == (0, 9)
    torch.testing.assert_close(module(maps()), torch.cat([feature.mean(dim=(2, 3)) for feature in maps()], dim=1))


def test_the_projector_has_no_bias_but_those_of_its_norms():
    projector = Projector(6, 9, layers=3)
    assert [type(m).__name__ for m in projector.modules() if isinstance(m, torch.nn.Linear)] == ["Linear"] * 3
    assert all(m.bias is None for m in projector.modules() if isinstance(m, torch.nn.Linear))
    assert projector(torch.randn(4, 6)).shape == (4, 9)
    assert parameters(Projector(6, 9, layers=1)) == 54


STOCK = {
    "ResNet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    ),
    "ViT": lambda: ViTForImageClassification(
        ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=32,
                  patch_size=8)
    ),
    "ConvNeXt": lambda: ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2)
    ),
    "MobileNetV2": lambda: MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.1)),
    "ours": lambda: HfkdResNetForImageClassification(HfkdResNetConfig(depths=[1, 1], hidden_sizes=[4, 8])),
}  # fmt: skip


@pytest.mark.parametrize("name", STOCK)
def test_features_are_what_a_classifier_on_the_backbone_reads(name):
    model = STOCK[name]().eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = pooled_features(model.base_model, pixels)
        torch.testing.assert_close(features, ClassifierAdapter(model)(pixels).pooled)
    assert feature_size(model.base_model, 32, 3) == features.shape[1]


def test_zero_initialised_residual_blocks_pass_their_input_on(tmp_path):
    config = HfkdResNetConfig(depths=[2], hidden_sizes=[16], zero_init_residual=True)
    model = HfkdResNetForImageClassification(config).eval()
    hidden = torch.rand(2, 16, 4, 4)
    torch.testing.assert_close(model.backbone.stages[0](hidden), hidden)
    plain = HfkdResNetForImageClassification(HfkdResNetConfig(depths=[2], hidden_sizes=[16])).eval()
    assert (plain.backbone.stages[0](hidden) - hidden).abs().max() > 0.1
    norms = [m.weight.abs().max().item() for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms == [1, 1, 0, 1, 0]
    with pytest.raises(ValueError, match="choose batch"):
        HfkdResNetConfig(zero_init_residual=True, norm="none")
