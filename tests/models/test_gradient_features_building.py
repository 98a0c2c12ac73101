"""Building, refusing, saving and sharing gradient features over bases of this package and of transformers."""

import json
import os

import pytest
import torch
from clean_process import run_clean
from published_files import check_imports
from sklearn.datasets import load_digits
from tiny_classifiers import FAMILIES
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.resnet.modeling_resnet import ResNetBasicLayer

from hfkd.errors import InputError
from hfkd.models import (
    HfkdBiganEncoderConfig,
    HfkdBiganEncoderForImageClassification,
    HfkdGradientFeaturesConfig,
    HfkdGradientFeaturesForImageClassification,
    HfkdGradientFeaturesModel,
    HfkdMlpConfig,
    HfkdMlpForImageClassification,
    HfkdVaeEncoderConfig,
    HfkdVaeEncoderForImageClassification,
    build_gradient_features,
    build_image_processor,
    build_student,
    code_files,
)
from hfkd.models.folding import find_foldable


NAMES = ["a", "b", "c", "d", "e"]
IMAGES = (2, 3, 32, 32)


def with_weights(model):
    """As after training: no weight is zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model


def build(name, theta2=1, **settings):
    return build_gradient_features(FAMILIES[name](), theta2, class_names=NAMES, **settings)


# -- what is linearised ----------------------------------------------------------------------------------------------


def test_theta2_are_the_last_blocks_with_folded_norms():
    layer = "resnet.encoder.stages.1.layers"
    names = [f"layer.{n}.convolution.{kind}" for n in (0, 1) for kind in ("weight", "bias")]
    assert build("resnet", 1).config.theta2 == [f"{layer}.1.{name}" for name in names]
    shortcut = [f"{layer}.0.shortcut.convolution.{kind}" for kind in ("weight", "bias")]
    both = [*shortcut, *(f"{layer}.0.{name}" for name in names), *(f"{layer}.1.{name}" for name in names)]
    assert build("resnet", 2).config.theta2 == both


def test_theta2_by_modules_parameters_and_patterns():
    block = "vit.layers.1"
    assert build("vit", [block]).config.theta2 == build("vit", 1).config.theta2
    assert build("vit", [f"{block}.mlp.fc?", "vit.layernorm.weight"]).config.theta2 == [
        *(f"{block}.mlp.fc{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")),
        "vit.layernorm.weight",
    ]
    everything = build("vit", ["*"]).config.theta2
    assert not any("cls_token" in name or "position_embeddings" in name for name in everything)
    assert "vit.embeddings.patch_embeddings.projection.weight" in everything


@pytest.mark.parametrize(
    ("theta2", "message"),
    [
        ([], "theta2 is empty"),
        (["vit.layers.7"], "'vit.layers.7' names no parameter of the base; the last one is 'vit.layernorm.bias'"),
        (["classifier"], "'classifier' names no parameter"),
        (["vit.layers.1", "vit.layers.1.mlp"], "'vit.layers.1' and 'vit.layers.1.mlp' overlap in"),
        (["vit.embeddings.cls_token"], "names no parameter"),
        (0, "k=0 top blocks"),
        (9, "k=9 top blocks of ViTForImageClassification: use 1 to 2"),
    ],
)
def test_refuses_selections(theta2, message):
    with pytest.raises(InputError, match=message) as caught:
        build("vit", theta2)
    assert "\n" not in str(caught.value)


def test_refuses_a_configuration_without_theta2():
    with pytest.raises(ValueError, match="theta2="):
        HfkdGradientFeaturesForImageClassification(HfkdGradientFeaturesConfig())


def test_numbers_of_parameters_are_the_documents():
    """ResNet-18: 4,719,616 in the last block, 3,671,552 in the one before; ResNet-50: 4,459,520."""
    counted = {}
    for name, blocks in (("resnet18", 1), ("resnet18", 2), ("resnet50", 1)):
        base = build_student(name, class_names=NAMES, image_size=64)
        model = build_gradient_features(base, blocks, class_names=NAMES)
        counted[name, blocks] = sum(p.numel() for p in model.backbone.gradient_weights.parameters())
    assert counted == {
        ("resnet18", 1): 4_719_616,
        ("resnet18", 2): 4_719_616 + 3_671_552,
        ("resnet50", 1): 4_459_520,
    }


# -- which bases -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "resnet", "hfkd_resnet"])
def test_backbones_without_a_classifier_become_one(kind):
    whole = FAMILIES[kind]().eval()
    backbone = {"vit": ViTModel, "resnet": ResNetModel}.get(kind, lambda config: whole.base_model)(whole.config).eval()
    backbone.load_state_dict(whole.base_model.state_dict(), strict=False)
    images = torch.randn(IMAGES)
    features = [
        build_gradient_features(base, class_names=NAMES).backbone(images).pooler_output for base in (whole, backbone)
    ]
    assert torch.equal(*features)


class ThirdPartyConfig(PreTrainedConfig):
    model_type = "third_party"


class ThirdParty(PreTrainedModel):
    config_class = ThirdPartyConfig


def test_refuses_third_party_code():
    with pytest.raises(InputError, match="ThirdParty is third-party remote code, which a saved model cannot carry"):
        build_gradient_features(ThirdParty(ThirdPartyConfig()), class_names=NAMES)


def test_our_own_bases_loaded_as_remote_code_are_taken(tmp_path, remote_modules):
    base = FAMILIES["hfkd_resnet"]().eval()
    base.save_pretrained(tmp_path / "base")
    remote_class = get_class_from_dynamic_module("modeling_resnet.HfkdResNetForImageClassification", tmp_path / "base")
    remote, images = remote_class.from_pretrained(tmp_path / "base"), torch.randn(IMAGES)
    models = [build_gradient_features(each, class_names=NAMES) for each in (base, remote)]
    assert torch.equal(*(model.backbone(images).pooler_output for model in models))


def test_refuses_another_architecture_for_the_gradient_branch():
    with pytest.raises(InputError, match="of another architecture than the base"):
        build("resnet", gradient_base=FAMILIES["convnext"]())


def test_refuses_a_base_that_was_changed_in_code():
    """Its configuration would build another network, which the weights fit as well."""
    base = FAMILIES["resnet"]()
    base.resnet.encoder.stages[1].layers[0].activation = torch.nn.GELU()
    with pytest.raises(InputError, match="computes other features than a network of its configuration"):
        build_gradient_features(base, class_names=NAMES)


class Scaled(torch.nn.BatchNorm2d):
    """A norm that does more than normalise, as those with an activation inside."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("reader", ["stack", "keyword"])
def test_folds_no_norm_whose_input_is_read_elsewhere(reader):
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)

        def forward(self, x):
            h = self.conv(x)
            other = torch.stack([h]).sum(0) if reader == "stack" else torch.relu(input=h)
            return self.norm(h) + other

    assert find_foldable(Network().eval(), torch.randn(1, 3, 8, 8)) == []
    chain = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
    assert find_foldable(chain, torch.randn(1, 3, 8, 8)) == [("0", "1")]
    assert find_foldable(torch.nn.Sequential(chain[0], Scaled(4)).eval(), torch.randn(1, 3, 8, 8)) == []


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_builds_where_gradients_are_off(context):
    with context():
        model = build("resnet")
    model(torch.randn(IMAGES), labels=torch.tensor([0, 1])).loss.backward()


def test_refuses_layers_without_effect():
    """A key's bias moves all scores of a query alike, which softmax does not see."""
    with pytest.raises(InputError, match="theta2 has no effect on the features"):
        build("vit", ["vit.layers.1.attention.k_proj.bias"])


def test_attention_is_that_of_the_base():
    settings = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(**settings, image_size=32, patch_size=8, attn_implementation="eager")
    model = build_gradient_features(ViTForImageClassification(config), class_names=NAMES)
    assert model.backbone.base.config._attn_implementation == "eager"


@pytest.mark.parametrize("names", [[], ["a"], ["a", "a"]])
def test_refuses_class_names(names):
    with pytest.raises(InputError, match="class_names has .* two or more different ones"):
        build_gradient_features(FAMILIES["resnet"](), class_names=names)


def test_other_arguments_reach_the_base():
    model, larger = build("vit"), torch.randn(2, 3, 48, 48)
    assert model(larger, interpolate_pos_encoding=True).logits.shape == (2, 5)


def test_features_of_tokens_and_maps_alike():
    """DINOv2's classifier reads the class token beside the mean of the patches; BEiT's has no map to speak of."""
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    base, images = Dinov2ForImageClassification(config).eval(), torch.randn(2, 3, 28, 28)
    model = build_gradient_features(base, class_names=["x", "y"])
    model.start_from(base.classifier.weight, base.classifier.bias)
    torch.testing.assert_close(model(images).logits, base(images).logits, rtol=1e-4, atol=1e-5)


class NoForwardDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_refuses_operations_without_forward_derivative(monkeypatch):
    original = ResNetBasicLayer.forward
    monkeypatch.setattr(ResNetBasicLayer, "forward", lambda self, x: NoForwardDerivative.apply(original(self, x)))
    with pytest.raises(InputError, match="without a forward-mode derivative .*attn_implementation='eager'") as caught:
        build("resnet")
    assert "\n" not in str(caught.value)
    build("resnet", mode="finetune")  # needs none


def test_refuses_a_base_that_detaches(monkeypatch):
    """The derivative would be right, and its gradient silently zero."""
    original = ResNetBasicLayer.forward

    def forward(self, x):
        with torch.no_grad():
            return original(self, x)

    monkeypatch.setattr(ResNetBasicLayer, "forward", forward)
    with pytest.raises(InputError, match="detaches a part of its forward pass"):
        build("resnet")


# -- real widths -----------------------------------------------------------------------------------------------------

REAL = {
    "resnet50": lambda: ResNetForImageClassification(ResNetConfig(num_labels=10)),
    "convnext_t": lambda: ConvNextForImageClassification(ConvNextConfig(num_labels=10)),
    "vit_b": lambda: ViTForImageClassification(ViTConfig(num_labels=10)),
}


@pytest.mark.parametrize("name", REAL)
def test_one_step_at_real_widths(name):
    model = build_gradient_features(REAL[name](), 1, class_names=NAMES)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    images, labels = torch.randn(2, 3, 224, 224), torch.tensor([0, 3])
    before = model(images, labels=labels)
    before.loss.backward()
    assert all(parameter.grad is not None for parameter in trained)
    optimizer.step()
    after = model(images, labels=labels)
    assert after.logits.shape == (2, 5)
    assert after.loss < before.loss


# -- saving and sharing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mode", ["full", "gradient", "activation", "finetune"])
def test_reloads_by_auto_class(tmp_path, name, mode):
    model, images = with_weights(build(name, mode=mode)), torch.randn(IMAGES)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is HfkdGradientFeaturesForImageClassification
    assert torch.allclose(loaded(images).logits, model(images).logits, rtol=0, atol=1e-6)
    trainable = [[n for n, p in each.named_parameters() if p.requires_grad] for each in (model, loaded)]
    assert trainable[0] == trainable[1]
    backbone = AutoModel.from_pretrained(tmp_path)
    assert type(backbone) is HfkdGradientFeaturesModel
    assert torch.allclose(backbone(images).pooler_output, model.backbone(images).pooler_output, rtol=0, atol=1e-6)
    assert str(tmp_path) not in (tmp_path / "config.json").read_text()


def test_saves_no_local_path_of_the_base(tmp_path):
    FAMILIES["vit"]().save_pretrained(tmp_path / "base")
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    build_gradient_features(base, class_names=NAMES).save_pretrained(tmp_path / "built")
    assert "base_config" in (text := (tmp_path / "built" / "config.json").read_text())
    assert str(tmp_path) not in text


def test_a_trained_model_keeps_its_parts_under_another_mode(tmp_path):
    """`mode` selects terms of equation 2; what the saved weights mean does not depend on it."""
    model, images = with_weights(build("resnet")), torch.randn(IMAGES)
    model.save_pretrained(tmp_path)
    both, activation, gradient = (
        AutoModelForImageClassification.from_pretrained(tmp_path, mode=mode)(images).logits
        for mode in ("full", "activation", "gradient")
    )
    torch.testing.assert_close(activation + gradient, both)
    torch.testing.assert_close(both, model(images).logits)


def test_published_files_import_only_what_everyone_has():
    files = code_files(build("vit"))
    assert "modeling_gradient_features.py" in {file.name for file in files}
    check_imports(files)


STRANGER = """
import json
import torch
from transformers import AutoModel, AutoModelForImageClassification, pipeline

torch.set_num_threads(1)
images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
found = {}
for name in NAMES:
    model = AutoModelForImageClassification.from_pretrained(name, trust_remote_code=True)
    backbone = AutoModel.from_pretrained(name, trust_remote_code=True)
    classify = pipeline("image-classification", model=name, trust_remote_code=True)
    from PIL import Image
    scores = classify(Image.new("RGB", (40, 40), "teal"))
    with torch.no_grad():
        found[name] = [model(images).logits.tolist(), backbone(images).tangent.tolist(), len(scores)]
print(json.dumps(found))
"""


SHARED = {
    **{name: FAMILIES[name] for name in ("hfkd_resnet", "hfkd_wide_resnet", "resnet", "convnext", "vit")},
    "bigan_encoder": lambda: HfkdBiganEncoderForImageClassification(
        HfkdBiganEncoderConfig(hidden_sizes=[4, 6, 8], kernel_sizes=[5, 4, 4], strides=[2, 2, 1], num_labels=5)
    ),
    "mlp": lambda: HfkdMlpForImageClassification(HfkdMlpConfig(hidden_sizes=[8, 6], norm="batch", num_labels=5)),
    "vae_encoder": lambda: HfkdVaeEncoderForImageClassification(HfkdVaeEncoderConfig(depth=2, scales=2, num_labels=5)),
}


def test_loads_without_hfkd(tmp_path):
    """Bases of this package and stock ones."""
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    expected = {}
    for name, base in SHARED.items():
        model = with_weights(build_gradient_features(base(), class_names=NAMES))
        model.save_pretrained(tmp_path / name)
        build_image_processor(32, 3, [0.5] * 3, [0.5] * 3).save_pretrained(tmp_path / name)
        with torch.no_grad():
            expected[name] = (model(images).logits, model.backbone(images).tangent)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    output = run_clean(STRANGER.replace("NAMES", repr(list(SHARED))), environment, tmp_path)
    found = json.loads(output.splitlines()[-1])
    for name in SHARED:
        logits, tangent, count = found[name]
        torch.testing.assert_close(torch.tensor(logits), expected[name][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.tensor(tangent), expected[name][1], rtol=1e-4, atol=1e-4)
        assert count == 5


def test_plain_trainer_fine_tunes_with_other_classes(tmp_path):
    base = build_student("resnet8", class_names=NAMES, image_size=8, num_channels=1)
    build_gradient_features(base, class_names=NAMES).save_pretrained(tmp_path / "saved")
    model = AutoModelForImageClassification.from_pretrained(
        tmp_path / "saved", num_labels=3, ignore_mismatched_sizes=True
    )
    images, labels = load_digits(n_class=3, return_X_y=True)
    data = [
        {"pixel_values": torch.tensor(image, dtype=torch.float32).view(1, 8, 8) / 16, "labels": int(label)}
        for image, label in zip(images[:64], labels[:64], strict=True)
    ]
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "tuned"),
        max_steps=10,
        per_device_train_batch_size=32,
        learning_rate=3e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    assert not trainer.model_accepts_loss_kwargs
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]
    assert frozen and all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())
    assert any(p.any() for p in model.backbone.gradient_weights.parameters())
    trainer.save_model()
    tuned = AutoModelForImageClassification.from_pretrained(tmp_path / "tuned")
    batch = torch.stack([row["pixel_values"] for row in data[:4]])
    assert torch.equal(tuned(batch).logits, model.eval()(batch).logits)
