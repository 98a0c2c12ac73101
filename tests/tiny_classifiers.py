"""Tiny members of every family, with random weights and five classes, for images of 32 x 32 pixels."""

from collections.abc import Callable

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
