"""Closed forms (float64) of the classification loss, and the labels it refuses."""

import math

import pytest
import torch

from hfkd.errors import InputError
from hfkd.losses.gradient_features import classification_loss


LOGITS = torch.tensor([[math.log(2), 0.0, 0.0], [0.0, math.log(6), 0.0]], dtype=torch.float64)


def test_cross_entropy_of_class_numbers():
    # Probabilities 1/2 of class 0 and 1/8 of class 2.
    assert classification_loss(LOGITS, torch.tensor([0, 2])).item() == pytest.approx((math.log(2) + math.log(8)) / 2)


def test_binary_cross_entropy_of_several_labels():
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    # Sigmoids 2/3, 1/2, 1/2 and 1/2, 6/7, 1/2.
    expected = -(math.log(2 / 3) + 4 * math.log(1 / 2) + math.log(6 / 7)) / 6
    assert classification_loss(LOGITS, labels).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("several", [False, True])
def test_gradient_is_probability_minus_label(several):
    logits = LOGITS.clone().requires_grad_()
    hot = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(classification_loss(logits, hot if several else hot.argmax(1)), logits)
    probabilities = LOGITS.sigmoid() if several else LOGITS.softmax(1)
    torch.testing.assert_close(gradient, (probabilities - hot) / (6 if several else 2))


@pytest.mark.parametrize("labels", [torch.zeros(2), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 4)])
def test_labels_of_another_kind(labels):
    with pytest.raises(InputError, match="do not fit logits of shape \\(2, 3\\)"):
        classification_loss(LOGITS, labels)
