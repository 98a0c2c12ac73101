"""Tiny members of every family, with random weights and five classes, for images of 32 x 32 pixels."""

import sys
from collections.abc import Callable

import pytest
import torch
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    dynamic_module_utils,
)

from hfkd.models import (
    HfkdResNetConfig,
    HfkdResNetForImageClassification,
    HfkdWideResNetConfig,
    HfkdWideResNetForImageClassification,
)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "hfkd_resnet": lambda: HfkdResNetForImageClassification(HfkdResNetConfig(depths=[1, 1, 2], num_labels=5)),
    "hfkd_wide_resnet": lambda: HfkdWideResNetForImageClassification(
        HfkdWideResNetConfig(depth=10, widen_factor=1, num_labels=5)
    ),
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=5)
    ),
    "convnext": lambda: ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, image_size=32, num_labels=5)
    ),
    "vit": lambda: ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=8,
            num_labels=5,
        )
    ),
    "mobilenet_v2": lambda: MobileNetV2ForImageClassification(
        MobileNetV2Config(depth_multiplier=0.1, min_depth=4, depth_divisible_by=4, image_size=32, num_labels=5)
    ),
}


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def classifier(family):
    return FAMILIES[family]()


@pytest.fixture
def make_classifier():
    """Builds a tiny classifier of the named family."""
    return lambda name: FAMILIES[name]()


def remote_module_names():
    return [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]


@pytest.fixture
def remote_modules(tmp_path, monkeypatch):
    """Remote code is copied into and imported from a folder of this test."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in remote_module_names():
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in remote_module_names():
        del sys.modules[name]
