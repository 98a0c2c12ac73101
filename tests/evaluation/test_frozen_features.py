"""What probes read of each kind of network."""

import pytest
import torch
from tiny_classifiers import FAMILIES

from hfkd.errors import InputError
from hfkd.evaluation.frozen_features import frozen_features, has_classifier
from hfkd.models import ClassifierAdapter, HfkdDcganDiscriminatorConfig, HfkdDcganDiscriminatorModel
from hfkd.models.configuration_stylegan2_discriminator import HfkdStyleGan2DiscriminatorConfig
from hfkd.models.modeling_stylegan2_discriminator import HfkdStyleGan2DiscriminatorModel


IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def discriminator():
    return HfkdDcganDiscriminatorModel(HfkdDcganDiscriminatorConfig(width=4)).eval()


@torch.no_grad()
def test_a_discriminator_has_a_single_and_a_multi_feature(discriminator):
    outputs = discriminator(IMAGES)
    assert torch.equal(frozen_features(discriminator)(IMAGES), outputs.pooler_output)
    # Its pooled vector is the average of its last map, which does not count twice.
    pooled = [feature_map.mean(dim=(2, 3)) for feature_map in outputs.block_features]
    blocks = frozen_features(discriminator, "blocks")(IMAGES)
    assert blocks.shape == (3, 4 + 8 + 16)
    torch.testing.assert_close(blocks, torch.cat(pooled, dim=1))


@torch.no_grad()
def test_a_pooled_vector_of_its_own_counts_beside_the_blocks(discriminator, monkeypatch):
    forward = discriminator.forward

    def other(pixel_values):
        outputs = forward(pixel_values)
        outputs.pooler_output = outputs.pooler_output + 1
        return outputs

    monkeypatch.setattr(discriminator, "forward", other)
    assert frozen_features(discriminator, "blocks")(IMAGES).shape == (3, 4 + 8 + 16 + 16)


@torch.no_grad()
@pytest.mark.parametrize("features", ["single", "multi"])
def test_stylegans_discriminator_sees_each_batch_as_one_group(features):
    """The paper's multi feature: the averages of all blocks, and the last hidden layer."""
    config = HfkdStyleGan2DiscriminatorConfig(image_size=8, channel_base=64, mbstd_group_size=1, features=features)
    model, images = HfkdStyleGan2DiscriminatorModel(config).eval(), IMAGES[:, :, :8, :8]
    function = frozen_features(model, "blocks")
    alone, together = function(images[:1]), function(images)
    block, hidden = model(images).block_features
    torch.testing.assert_close(together, torch.cat([block.mean(dim=(2, 3)), hidden.flatten(1)], dim=1))
    assert not torch.allclose(alone[0], together[0])  # the other images of the group count


@torch.no_grad()
@pytest.mark.parametrize("family", ["hfkd_resnet", "vit"])
def test_of_a_classifier_they_are_what_its_last_layer_reads(family):
    model = FAMILIES[family]().eval()
    assert has_classifier(model) and not has_classifier(model.base_model)
    assert torch.equal(frozen_features(model)(IMAGES), ClassifierAdapter(model)(IMAGES).pooled)
    with pytest.raises(InputError, match="features=blocks needs a discriminator"):
        frozen_features(model, "blocks")(IMAGES)


@torch.no_grad()
def test_of_a_backbone_alone_they_are_its_pooled_output():
    backbone = FAMILIES["hfkd_resnet"]().base_model.eval()
    assert torch.equal(frozen_features(backbone)(IMAGES), backbone(IMAGES).pooler_output)
    without = FAMILIES["vit"]().base_model.eval()
    assert torch.equal(frozen_features(without)(IMAGES), without(IMAGES).last_hidden_state[:, 0])


@torch.no_grad()
def test_bf16(discriminator):
    exact = frozen_features(discriminator)(IMAGES)
    rounded = frozen_features(discriminator, bf16=True)(IMAGES)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.02, rtol=0.02)
