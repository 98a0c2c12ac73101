"""A fitted linear layer becomes the last layer of any image classifier."""

import pytest
import torch
from tiny_classifiers import FAMILIES

from hfkd.errors import InputError
from hfkd.models import ClassifierAdapter
from hfkd.models.heads import put_linear_head


NAMES = ["ape", "nut", "mary"]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_layer_on_the_pooled_features(family, tmp_path):
    model = FAMILIES[family]().eval()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pooled = ClassifierAdapter(model)(images).pooled
    weight, bias = torch.randn(3, pooled.shape[1], dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    put_linear_head(model, weight, bias, NAMES)
    expected = (pooled.double() @ weight.T + bias).float()
    with torch.no_grad():
        torch.testing.assert_close(model(images).logits, expected, atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert loaded.config.id2label == dict(enumerate(NAMES)) and loaded.config.label2id["mary"] == 2
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(images).logits, expected, atol=1e-5, rtol=1e-4)
    loss = loaded(images, labels=torch.tensor([0, 1, 2, 0])).loss
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(expected, torch.tensor([0, 1, 2, 0])))


@pytest.mark.parametrize(("width", "names"), [(7, NAMES), (16, NAMES[:2])])
def test_a_layer_that_does_not_fit_is_refused(width, names):
    model = FAMILIES["vit"]()
    with pytest.raises(InputError, match="on 16 features with a bias"):
        put_linear_head(model, torch.zeros(3, width), torch.zeros(3), names)
    assert model.classifier.out_features == 5
