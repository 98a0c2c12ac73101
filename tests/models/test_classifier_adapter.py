"""The adapter on six families: what it reads, what it leaves alone, where gradients go, and what it refuses."""

import copy

import pytest
import torch
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from hfkd.errors import InputError
from hfkd.models import ClassifierAdapter, HfkdResNetForImageClassification, build_student


SHAPES = {
    "hfkd_resnet": (64, 8, 8),
    "hfkd_wide_resnet": (64, 8, 8),
    "resnet": (16, 4, 4),
    "convnext": (16, 4, 4),
    "vit": (16, 4, 4),
    "mobilenet_v2": (1280, 1, 1),
}
LAST_BLOCKS = {
    "hfkd_resnet": ["backbone.stages.1.0", "backbone.stages.2.0", "backbone.stages.2.1"],
    "hfkd_wide_resnet": ["backbone.stages.0.0", "backbone.stages.1.0", "backbone.stages.2.0"],
    "resnet": [
        "resnet.encoder.stages.0.layers.0",
        "resnet.encoder.stages.1.layers.0",
        "resnet.encoder.stages.1.layers.1",
    ],
    "convnext": [f"convnext.encoder.stages.{at}" for at in ("0.layers.0", "1.layers.0", "1.layers.1")],
    "vit": ["vit.layers.0", "vit.layers.1"],
    "mobilenet_v2": ["mobilenet_v2.layer.13", "mobilenet_v2.layer.14", "mobilenet_v2.layer.15"],
}
WITHOUT_ACTIVATION = ("convnext", "vit")
IMAGES = (2, 3, 32, 32)


def tiny_vit(model_class=DeiTForImageClassification, config_class=DeiTConfig, **settings):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return model_class(config_class(**sizes, image_size=32, patch_size=8, num_labels=5, **settings))


def test_reads_exactly_what_the_model_computes(family, classifier):
    classifier.eval()
    images = torch.randn(IMAGES)
    features = ClassifierAdapter(classifier)(images)
    base = classifier.base_model(images)
    assert torch.equal(features.logits, classifier(images).logits)
    assert features.feature_map.shape == (2, *SHAPES[family])
    if family == "vit":
        patches = base.last_hidden_state[:, 1:]
        assert torch.equal(features.feature_map[1, :, 2, 3], patches[1, 2 * 4 + 3])
        assert torch.equal(features.pooled, base.last_hidden_state[:, 0])
    else:
        assert torch.equal(features.feature_map, base.last_hidden_state)
        assert torch.equal(features.pooled, base.pooler_output.flatten(1))


def count_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_runs_the_model_once_and_leaves_no_hook(classifier):
    calls = []
    classifier.base_model.register_forward_hook(lambda *_: calls.append(1))
    hooks = count_hooks(classifier)
    adapter = ClassifierAdapter(classifier)
    assert count_hooks(classifier) == hooks
    calls.clear()
    adapter(torch.randn(IMAGES))
    assert calls == [1]
    assert count_hooks(classifier) == hooks


def test_changes_nothing_in_the_model(classifier):
    classifier.train()
    next(classifier.base_model.children()).eval()
    modes = [module.training for module in classifier.modules()]
    state, rng = copy.deepcopy(classifier.state_dict()), torch.get_rng_state()
    adapter = ClassifierAdapter(classifier)
    adapter.feature_shape(32)
    assert [module.training for module in classifier.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert list(classifier.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in classifier.state_dict().items())


def test_head_maps_the_tap_to_the_logits(family, classifier):
    classifier.eval()
    adapter, images = ClassifierAdapter(classifier), torch.randn(IMAGES)
    features = adapter(images)
    tap = classifier.base_model(images).last_hidden_state if family == "vit" else features.feature_map
    torch.testing.assert_close(adapter.head(tap), features.logits)


def test_head_and_backbone_split_the_parameters(family, classifier):
    adapter = ClassifierAdapter(classifier)
    head, backbone = adapter.head_parameters(), adapter.backbone_parameters()
    names = {id(parameter): name for name, parameter in classifier.named_parameters()}
    assert {id(p) for p in head} | {id(p) for p in backbone} == set(names)
    assert len(head) + len(backbone) == len(names)
    expected = {name for name in names.values() if name.startswith("classifier.")}
    if family == "convnext":  # its norm of the pooled feature comes after the tap
        expected |= {"convnext.layernorm.weight", "convnext.layernorm.bias"}
    assert {names[id(parameter)] for parameter in head} == expected


def test_gradient_of_the_map_reaches_the_backbone_and_only_it(classifier):
    classifier.eval()
    adapter = ClassifierAdapter(classifier)
    feature_map = adapter(torch.randn(IMAGES)).feature_map
    (feature_map * torch.randn_like(feature_map)).sum().backward()
    assert all(parameter.grad is None for parameter in adapter.head_parameters())
    names = {id(parameter): name for name, parameter in classifier.named_parameters()}
    untouched = {
        names[id(parameter)]
        for parameter in adapter.backbone_parameters()
        if parameter.grad is None or not parameter.grad.any()
    }
    assert not untouched


def test_gradient_of_the_logits_reaches_everything(classifier):
    classifier.train()
    logits = ClassifierAdapter(classifier)(torch.randn(IMAGES)).logits
    (logits * torch.randn_like(logits)).sum().backward()
    assert all(parameter.grad is not None for parameter in classifier.parameters())


def test_pre_activation_is_the_input_of_the_last_activation(family, classifier):
    classifier.eval()
    if family in WITHOUT_ACTIVATION:
        with pytest.raises(InputError, match="no activation right before its feature map"):
            ClassifierAdapter(classifier, tap="pre_activation")
        return
    images = torch.randn(IMAGES)
    before, after = ClassifierAdapter(classifier, tap="pre_activation"), ClassifierAdapter(classifier)
    pre, post = before(images), after(images)
    assert pre.feature_map.min() < 0
    activation = torch.nn.functional.relu6 if family == "mobilenet_v2" else torch.relu
    assert torch.equal(activation(pre.feature_map), post.feature_map)
    torch.testing.assert_close(before.head(pre.feature_map), pre.logits)
    assert torch.equal(pre.logits, post.logits)


def test_top_blocks(family, classifier):
    adapter, expected = ClassifierAdapter(classifier), LAST_BLOCKS[family]
    blocks = adapter.top_blocks(len(expected))
    assert [name for name, _ in blocks] == expected
    assert all(classifier.get_submodule(name) is block for name, block in blocks)
    assert adapter.top_blocks(1) == blocks[-1:]


def test_top_blocks_are_counted(make_classifier):
    adapter = ClassifierAdapter(make_classifier("vit"))
    for k in (0, 3):
        with pytest.raises(InputError, match=f"k={k} .*use 1 to 2"):
            adapter.top_blocks(k)


def test_feature_shape(family, classifier):
    adapter = ClassifierAdapter(classifier)
    assert adapter.feature_shape(32) == SHAPES[family]
    if family == "vit":
        with pytest.raises(InputError, match="cannot take images of 16x16 pixels"):
            adapter.feature_shape(16)
    elif family == "hfkd_resnet":
        assert adapter.feature_shape((16, 32)) == (64, 4, 8)


def test_oblong_token_grid():
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=(24, 40),
            patch_size=8,
            num_labels=5,
        )
    )
    assert ClassifierAdapter(model).feature_shape((24, 40)) == (16, 3, 5)


def test_other_token_models():
    deit = tiny_vit()
    features = ClassifierAdapter(deit.eval())(torch.randn(IMAGES))
    assert features.feature_map.shape == (2, 16, 4, 4)  # without class and distillation token
    swin = SwinForImageClassification(
        SwinConfig(
            embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4, image_size=32, patch_size=2, num_labels=5
        )
    )
    assert ClassifierAdapter(swin).feature_shape(32) == (16, 8, 8)


def test_works_on_classes_loaded_as_remote_code(tmp_path, remote_modules):
    model = build_student("resnet8", class_names=["a", "b", "c"], image_size=16).eval()
    model.save_pretrained(tmp_path)
    remote_class = get_class_from_dynamic_module("modeling_resnet.HfkdResNetForImageClassification", tmp_path)
    remote = remote_class.from_pretrained(tmp_path)
    assert not isinstance(remote, HfkdResNetForImageClassification)
    images = torch.randn(2, 3, 16, 16)
    for tap in ("post_activation", "pre_activation"):
        ours, theirs = (ClassifierAdapter(each, tap=tap)(images) for each in (model, remote))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert ClassifierAdapter(remote).top_blocks(1)[0][0] == "backbone.stages.2.0"


def test_refuses_what_it_cannot_read(make_classifier):
    whole = make_classifier("hfkd_resnet")
    with pytest.raises(InputError, match="tap 'middle' is unknown"):
        ClassifierAdapter(whole, tap="middle")
    with pytest.raises(InputError, match="HfkdResNetModel has no base model"):
        ClassifierAdapter(whole.base_model)
    with pytest.raises(InputError, match="has 2 linear layers with num_labels=5"):
        ClassifierAdapter(tiny_vit(DeiTForImageClassificationWithTeacher))
    with pytest.raises(
        InputError, match="no head to be found"
    ):  # it joins the class token with the mean of the patches
        ClassifierAdapter(tiny_vit(Dinov2ForImageClassification, Dinov2Config))
    whole.classifier = torch.nn.Identity()
    with pytest.raises(InputError, match="has 0 linear layers"):
        ClassifierAdapter(whole)


def test_refuses_a_pre_activation_that_is_overwritten(make_classifier):
    model = make_classifier("hfkd_resnet")
    model.backbone.stages[-1][-1].activation = torch.nn.ReLU(inplace=True)
    with pytest.raises(InputError, match="overwrites its pre-activation: use tap='post_activation'"):
        ClassifierAdapter(model, tap="pre_activation")


def test_refuses_tokens_that_form_no_grid(make_classifier, monkeypatch):
    monkeypatch.setattr("hfkd.models.adapter.SPECIAL_TOKENS", ("register_tokens",))
    with pytest.raises(InputError, match="gives 17 patch tokens for 32x32 pixels, which form no grid"):
        ClassifierAdapter(make_classifier("vit"))


def resnet50():
    return build_student("resnet50", class_names=[str(i) for i in range(1000)], image_size=224)


def convnext_tiny():
    return ConvNextForImageClassification(ConvNextConfig(num_labels=1000))


def vit_base():
    return ViTForImageClassification(ViTConfig(num_labels=1000))


@pytest.mark.parametrize(
    ("make", "shape", "millions"),
    [(resnet50, (2048, 7, 7), 25.6), (convnext_tiny, (768, 7, 7), 28.6), (vit_base, (768, 14, 14), 86.6)],
)
def test_real_widths(make, shape, millions):
    model = make().eval()
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == millions
    adapter = ClassifierAdapter(model)
    features = adapter(torch.randn(1, 3, 224, 224))
    assert features.feature_map.shape == (1, *shape)
    features.feature_map.square().mean().backward()
    assert adapter.backbone_parameters()[0].grad is not None
    assert all(parameter.grad is None for parameter in adapter.head_parameters())
