"""StyleGAN2's networks, tiny and in float64."""

import torch

from hfkd.models import (
    HfkdStyleGan2DiscriminatorConfig,
    HfkdStyleGan2DiscriminatorModel,
    HfkdStyleGan2GeneratorConfig,
    HfkdStyleGan2GeneratorModel,
)


SIZES = {"image_size": 16, "channel_base": 128, "channel_max": 10, "mapping_layers": 2}


def tiny_generator(**settings):
    """Three blocks of 10, 10 and 8 channels, in float64, with noise that counts."""
    config = HfkdStyleGan2GeneratorConfig(**{"latent_size": 6, "w_dim": 5, **SIZES, **settings})
    model = HfkdStyleGan2GeneratorModel(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("noise_strength", "bias")):
                parameter.add_(torch.randn_like(parameter) / 5)
        model.mapping.w_avg.normal_()
    return model


def tiny_discriminator(**settings):
    return HfkdStyleGan2DiscriminatorModel(HfkdStyleGan2DiscriminatorConfig(**{**SIZES, **settings})).double()


def draws(model, n=3, seed=0):
    drawn = model.draw_inputs(n, torch.Generator().manual_seed(seed))
    return {name: value.double() for name, value in drawn.items()}
