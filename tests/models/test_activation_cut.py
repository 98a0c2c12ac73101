"""The network in two parts gives what it gives as a whole."""

import pytest
import torch
from tiny_classifiers import FAMILIES
from torch import nn

from hfkd.errors import InputError
from hfkd.models import HfkdBiganEncoderConfig, HfkdBiganEncoderForImageClassification, build_gradient_features
from hfkd.models.activation_cut import ActivationCut


NAMES = ["a", "b", "c", "d", "e"]
BASES = {
    **FAMILIES,
    "bigan": lambda: HfkdBiganEncoderForImageClassification(
        HfkdBiganEncoderConfig(hidden_sizes=[4, 4, 6, 6, 8], initializer_range=0.2, num_labels=5)
    ),
}
# Blocks with a shortcut around their first layer are taken whole.
BOUNDARIES = {
    "hfkd_resnet": "backbone.stages.2.1",
    "hfkd_wide_resnet": "backbone.stages.2.0.preactivation.0",
    "resnet": "resnet.encoder.stages.1.layers.1",
    "convnext": "convnext.encoder.stages.1.layers.1",
    "vit": "vit.layers.1",
    "mobilenet_v2": "mobilenet_v2.layer.15.expand_1x1.convolution",
    "bigan": "backbone.stages.4.0.0",
}


def build(name, theta2=1, **settings):
    model = build_gradient_features(BASES[name]().double().eval(), theta2, class_names=NAMES, **settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def images():
    return torch.randn(3, 3, 32, 32, dtype=torch.float64)


def logits_and_gradients(model, features):
    logits = model.logits_of(features.pooler_output, features.tangent)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return logits, torch.autograd.grad(logits.square().sum(), trained)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("blocks", [1, 2])
def test_both_parts_together_are_the_whole(name, blocks):
    model, pixel_values = build(name, blocks), images()
    cut = ActivationCut(model.backbone)
    activations = cut.below(pixel_values)
    logits, gradients = logits_and_gradients(model, cut.above(activations))
    expected_logits, expected_gradients = logits_and_gradients(model, model.backbone(pixel_values))

    assert not activations.requires_grad
    torch.testing.assert_close(logits, expected_logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-12, atol=1e-12)
    if blocks == 1:
        assert cut.boundary == BOUNDARIES[name]


@pytest.mark.parametrize("mode", ["activation", "gradient", "finetune"])
def test_holds_in_every_mode(mode):
    model, pixel_values = build("resnet", mode=mode), images()
    cut = ActivationCut(model.backbone)
    logits, gradients = logits_and_gradients(model, cut.above(cut.below(pixel_values)))
    expected_logits, expected_gradients = logits_and_gradients(model, model.backbone(pixel_values))

    torch.testing.assert_close(logits, expected_logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-12, atol=1e-12)


def test_nothing_below_runs_above_and_nothing_above_runs_below():
    model, called = build("hfkd_resnet"), []
    cut = ActivationCut(model.backbone)
    for name, module in model.backbone.base.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, args, output, name=name: called.append(name))
    activations = cut.below(images())
    below = set(called)
    called.clear()
    cut.above(activations)

    assert all(name.startswith(cut.boundary) for name in called)
    assert not any(name.startswith(cut.boundary) for name in below)
    assert len(below | set(called)) == sum(isinstance(m, nn.Conv2d) for m in model.backbone.base.modules())


def test_leaves_the_network_as_it_was():
    model, pixel_values = build("resnet"), images()
    before = model(pixel_values).logits
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    cut = ActivationCut(model.backbone)
    activations = cut.below(pixel_values)
    with pytest.raises(RuntimeError):
        cut.above(activations[:, :1])  # fails half way: too few channels

    assert torch.equal(model(pixel_values).logits, before)
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_follows_the_weights_above_and_names_those_below():
    model, pixel_values = build("hfkd_resnet"), images()
    cut = ActivationCut(model.backbone)
    identity, activations = cut.identity(), cut.below(pixel_values)
    theta2 = next(iter(model.backbone.theta2().values()))
    with torch.no_grad():
        theta2.mul_(1.5)
    torch.testing.assert_close(
        cut.above(activations).pooler_output, model.backbone(pixel_values).pooler_output, rtol=1e-12, atol=1e-12
    )
    assert cut.identity() == identity

    with torch.no_grad():
        next(model.backbone.base.parameters()).mul_(1.5)
    changed = {part for part, value in cut.identity().items() if value != identity[part]}
    assert changed == {"weights below theta2"}


def test_takes_the_part_that_holds_all_ways_around_the_first_layer():
    model = build("hfkd_resnet", ["backbone.stages.1.0.branch.0", "backbone.stages.2.1.branch.0"])
    assert ActivationCut(model.backbone).boundary == "backbone.stages.1.0"

    class Detour(nn.Module):
        """What enters goes around the second stage too."""

        def __init__(self, stages):
            super().__init__()
            self.first, self.second = stages

        def forward(self, hidden_state):
            return self.second(self.first(hidden_state)) + 1e-3 * hidden_state.mean()

    model = build("hfkd_resnet")
    first, *others = model.backbone.base.backbone.stages
    model.backbone.base.backbone.stages = nn.ModuleList([first, Detour(others)])
    model.backbone.config.theta2 = ["backbone.stages.1.second.1.branch.0.weight"]
    assert ActivationCut(model.backbone).boundary == "backbone.stages.1"


def test_refuses_theta2_with_nothing_below():
    with pytest.raises(InputError, match="'backbone.stem.0', and nothing lies below it"):
        ActivationCut(build("hfkd_resnet", ["backbone.stem.0"]).backbone)


def test_refuses_two_bases():
    base = BASES["resnet"]().double().eval()
    model = build_gradient_features(base, class_names=NAMES, gradient_base=BASES["resnet"]().double())
    with pytest.raises(InputError, match="without gradient_base"):
        ActivationCut(model.backbone)
