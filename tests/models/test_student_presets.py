"""Students by name, from a folder, and every way in which the name or the data can be wrong."""

import pytest
import torch
from transformers import BertConfig, BertModel

from hfkd.errors import InputError
from hfkd.models import STUDENT_PRESETS, HfkdResNetForImageClassification, build_student


CLASSES = ["cat", "dog", "emu"]


def build(name, **settings):
    return build_student(str(name), **{"class_names": CLASSES, "image_size": 32, **settings})


@pytest.mark.parametrize(
    "name", [name for name in STUDENT_PRESETS if name not in ("resnet34", "resnet50", "resnet110")]
)
def test_presets_build_and_run(name):
    image_size = 32 if name in ("resnet18", "bigan_encoder", "bigan_encoder_svhn") else 8
    model = build(name, image_size=image_size, num_channels=1)
    assert model(torch.randn(2, 1, image_size, image_size)).logits.shape == (2, 3)
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "emu"}
    assert model.config.label2id == {"cat": 0, "dog": 1, "emu": 2}
    assert (model.config.image_size, model.config.num_channels) == (image_size, 1)


def test_preset_names_tell_the_depth():
    for name, preset in STUDENT_PRESETS.items():
        if "encoder" in name or name.startswith("mlp"):
            continue
        config = preset.model_class.config_class(**preset.settings)
        if name.startswith("wrn"):
            assert name == f"wrn_{config.depth}_{config.widen_factor}"
        else:
            convolutions = 3 if config.layer_type == "bottleneck" else 2
            assert name.removesuffix("_cifar") == f"resnet{convolutions * sum(config.depths) + 2}"


def test_seed_decides_the_weights_and_the_global_state_stays():
    torch.manual_seed(123)
    state = torch.get_rng_state()
    first = build("resnet8", seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(456)
    again, other = build("resnet8", seed=1).state_dict(), build("resnet8", seed=2).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_folder_gives_its_backbone_and_a_seeded_new_head(tmp_path, family, make_classifier):
    saved = make_classifier(family)
    saved.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    model, again, other = (build(tmp_path, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert type(model) is type(saved)
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "emu"}
    for name, tensor in saved.base_model.state_dict().items():
        assert torch.equal(model.base_model.state_dict()[name], tensor)
    heads = [list(each.children())[-1].state_dict() for each in (model, again, other)]
    weights = [next(tensor for name, tensor in head.items() if name.endswith("weight")) for head in heads]
    assert weights[0].shape[0] == 3
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_folder_with_the_same_classes_keeps_its_head(tmp_path):
    saved = build("resnet8")
    saved.save_pretrained(tmp_path)
    loaded = build(tmp_path, seed=5)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in saved.state_dict().items())


def test_settings_go_over_the_presets():
    plain = build("resnet8", settings={"norm": "none", "hidden_sizes": [4, 8, 8]}).config
    assert (plain.norm, plain.hidden_sizes, plain.depths) == ("none", [4, 8, 8], [1, 1, 1])
    assert build("mlp_small_first", settings={"initial_scales": [1, 2, 3]}).config.bias == "first"


def refused(name, message, **settings):
    with pytest.raises(InputError, match=message) as error:
        build(name, **settings)
    assert "\n" not in str(error.value)


def test_refuses_settings(tmp_path):
    refused("mlp", "preset 'mlp' has no depths", settings={"depths": [1]})
    refused("mlp_bn", "preset 'mlp_bn': norm='group' is unknown", settings={"norm": "group"})
    refused(tmp_path, "is a checkpoint, which has its own norm, bias", settings={"norm": "none", "bias": "all"})


def test_refuses_names():
    refused("resnet21", "'resnet21' is no preset \\(nearest: .*resnet20.*\\)")
    refused("wrn-16-2", "nearest: wrn_16_2, ")
    refused("./nowhere", "no such folder")
    refused("/nowhere/model", "no such folder")


def test_refuses_folders(tmp_path):
    refused(tmp_path, "cannot be loaded: .*config.json")
    build("resnet8").config.save_pretrained(tmp_path)
    refused(tmp_path, "cannot be loaded: .*model.safetensors")


def test_pickled_weights_are_never_opened(tmp_path):
    build("resnet8").config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    refused(tmp_path, "cannot be loaded: .*model.safetensors")


def test_refuses_what_is_no_image_classifier(tmp_path):
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    BertModel(config).save_pretrained(tmp_path)
    refused(tmp_path, "is of type 'bert', which has no image classifier")


def test_remote_code_needs_permission(tmp_path, remote_modules):
    source = tmp_path / "foreign"
    build("resnet8").save_pretrained(source)
    for file in source.iterdir():  # the same code under a model type that nobody has registered
        if file.suffix in (".json", ".py"):
            file.write_text(file.read_text().replace('"hfkd_resnet"', '"foreign_resnet"'))
    refused(source, "allow it with trust_remote_code=True")
    model = build(source, trust_remote_code=True)
    assert not isinstance(model, HfkdResNetForImageClassification)
    assert model(torch.randn(1, 3, 32, 32)).logits.shape == (1, 3)


def test_refuses_data_that_the_model_cannot_take(tmp_path, make_classifier):
    make_classifier("vit").save_pretrained(tmp_path)
    refused("resnet18", "cannot take images of 8x8 pixels with 3 channels: .*total stride 32", image_size=8)
    refused(tmp_path, "cannot take images of 16x16 pixels", image_size=16)
    refused(tmp_path, "cannot take images of 32x32 pixels with 1 channels", num_channels=1)
    refused("resnet8", "two or more different", class_names=["only"])
    refused("resnet8", "two or more different", class_names=["same", "same"])
