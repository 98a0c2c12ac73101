"""Models of gradient features on small bases in float64, and their weights."""

import torch
from tiny_classifiers import FAMILIES

from hfkd.models import (
    ClassifierAdapter,
    HfkdBiganEncoderConfig,
    HfkdBiganEncoderForImageClassification,
    HfkdMlpConfig,
    HfkdMlpForImageClassification,
    HfkdVaeEncoderConfig,
    HfkdVaeEncoderForImageClassification,
    build_gradient_features,
)


NAMES = ["a", "b", "c", "d", "e"]
BASES = {
    **FAMILIES,
    "convnet": lambda: HfkdBiganEncoderForImageClassification(
        HfkdBiganEncoderConfig(
            hidden_sizes=[4, 6, 8], kernel_sizes=[5, 4, 4], strides=[2, 2, 1], initializer_range=0.2, num_labels=5
        )
    ),
    "mlp": lambda: HfkdMlpForImageClassification(HfkdMlpConfig(hidden_sizes=[8, 6], norm="batch", num_labels=5)),
    "vae_encoder": lambda: HfkdVaeEncoderForImageClassification(HfkdVaeEncoderConfig(depth=2, scales=2, num_labels=5)),
}


def trained_looking(name):
    """A base in float64 whose batch norms have statistics, scales and shifts that matter."""
    base = BASES[name]().double()
    for layer in base.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(std=0.3)
            layer.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
            torch.nn.init.normal_(layer.bias, std=0.3)
        elif hasattr(layer, "layer_scale_parameter"):
            torch.nn.init.uniform_(layer.layer_scale_parameter, 0.5, 1.5)  # 1e-6 when fresh: nothing to see
    return base.eval()


def build(base, theta2=1, **settings):
    model = build_gradient_features(base, theta2, class_names=NAMES, **settings)
    head = ClassifierAdapter(base).classifier
    model.start_from(head.weight, head.bias)
    return model


def weights(model):
    return list(model.backbone.gradient_weights.parameters())


def set_weights(model, values):
    with torch.no_grad():
        for parameter, value in zip(weights(model), values, strict=True):
            parameter.copy_(value)
