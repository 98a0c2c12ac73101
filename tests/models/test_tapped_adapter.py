"""Layers by stage and by path, of every family: their shapes, that they are the model's own, and what is refused."""

import pytest
import torch
from tiny_classifiers import FAMILIES

from hfkd.errors import InputError
from hfkd.models import ClassifierAdapter
from hfkd.models.tapped_adapter import POOLED, TappedAdapter, paired


STAGES = {
    "hfkd_resnet": [(16, 32, 32), (32, 16, 16), (64, 8, 8)],
    "hfkd_wide_resnet": [(16, 32, 32), (32, 16, 16), (64, 8, 8)],
    "resnet": [(8, 8, 8), (16, 4, 4)],
    "convnext": [(8, 8, 8), (16, 4, 4)],
    "vit": [(16, 4, 4), (16, 4, 4)],
}


def pixels():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def adapter(family):
    torch.manual_seed(0)
    return TappedAdapter(FAMILIES[family]().eval())


@pytest.mark.parametrize("family", STAGES)
def test_stages_end_where_the_shape_changes(family):
    tapped = adapter(family)
    stages = tapped.stages(32)
    shapes = tapped.tap_layers([*stages, POOLED], 32)
    assert [shapes[name] for name in stages] == STAGES[family]
    assert shapes[POOLED] == (tapped.classifier.in_features, 1, 1)
    with torch.no_grad():
        features, plain = tapped(pixels()), ClassifierAdapter(tapped.model)(pixels())
    assert torch.equal(features.logits, plain.logits) and torch.equal(features.feature_map, plain.feature_map)
    assert {name: tuple(layer.shape) for name, layer in features.layers.items()} == {
        name: (2, *shape) for name, shape in shapes.items()
    }
    assert torch.equal(features.layers[POOLED][:, :, 0, 0], features.pooled)
    assert not any(module._forward_hooks for module in tapped.model.modules())


def test_every_family_has_stages():
    tapped = adapter("mobilenet_v2")
    stages = tapped.stages(32)
    shapes = tapped.tap_layers(stages, 32)
    assert len(stages) == len(shapes) > 3
    assert all(shapes[a] != shapes[b] for a, b in zip(stages, stages[1:], strict=False))


def test_a_stage_is_its_last_block_and_tokens_are_laid_out_as_the_map():
    tapped = adapter("hfkd_resnet")
    last = tapped.path("-1", 32)
    assert tapped.path("3", 32) == last == tapped.path(last, 32)
    tapped.tap_layers([last], 32)
    features = tapped(pixels())
    assert torch.equal(features.layers[last], features.feature_map)

    vit = adapter("vit")
    vit.tap_layers([vit.path("2", 32)], 32)
    features = vit(pixels())
    (tokens,) = features.layers.values()
    normed = vit.model.base_model.layernorm(tokens.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(tokens.shape)
    torch.testing.assert_close(normed, features.feature_map)


def test_gradients_pass_through_taps():
    tapped = adapter("hfkd_resnet")
    first = tapped.path("1", 32)
    tapped.tap_layers([first], 32)
    tapped(pixels()).layers[first].sum().backward()
    reached = {name for name, p in tapped.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any(".stem." in name for name in reached) and not any(".stages.1." in name for name in reached)


def test_stages_of_unequal_number_are_paired_from_the_end():
    assert paired(3, 3) == [(1, 1), (2, 2), (3, 3)]
    assert paired(3, 12) == [(1, 4), (2, 8), (3, 12)]
    assert paired(12, 4) == [(3, 1), (6, 2), (9, 3), (12, 4)]
    assert paired(2, 3) == [(1, 2), (2, 3)]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("backbone.stage.1", r"nearest: 'backbone\.stages\.1'"),
        ("4", "has 3 stages: use 1 to 3"),
        ("0", "has 3 stages"),
        ("-4", "has 3 stages"),
        ("", "is no module"),
    ],
)
def test_what_is_not_there_is_refused(layer, message):
    with pytest.raises(InputError, match=message) as caught:
        adapter("hfkd_resnet").path(layer, 32)
    assert "\n" not in str(caught.value)


def test_a_layer_without_part_in_the_forward_pass_is_refused():
    tapped = adapter("hfkd_resnet")
    tapped.model.unused = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match="'unused' of HfkdResNetForImageClassification takes no part"):
        tapped.tap_layers(["unused"], 32)


class Named(torch.nn.Identity):
    """Gives a tensor by its name."""

    def forward(self, tensor):
        return {"tensor": tensor}


def test_a_layer_that_returns_no_tensor_is_refused():
    tapped = adapter("hfkd_resnet")
    named = tapped.model.base_model.named = Named()

    def pass_on(module, args, output):
        named(output)

    tapped.model.base_model.stem.register_forward_hook(pass_on)
    with pytest.raises(InputError, match="'backbone.named' .* returns no tensor: name another"):
        tapped.tap_layers(["backbone.named"], 32)
