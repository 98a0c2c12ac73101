"""Multipliers of generated images: positive, one for each, and trainable."""

import torch
import torch.nn.functional as F

from hfkd.models.multiplier_network import ConstantMultiplier, MultiplierNetwork, learned_multipliers


LATENTS, CONDITIONS = torch.randn(50, 5, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 3


def test_network_is_positive_whatever_its_weights():
    network = MultiplierNetwork(5, 3, hidden_size=8)
    for size in (0.5, 2.0):
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=size)
        multipliers = network(LATENTS, CONDITIONS)
        assert multipliers.shape == (50,) and (multipliers > 0).all()


def test_network_is_the_documented_function():
    network = MultiplierNetwork(5, 3)
    one_hot = torch.eye(3)[CONDITIONS]
    hidden = network.layers(torch.cat([LATENTS, one_hot], dim=1))[:, 0]
    torch.testing.assert_close(network(LATENTS, CONDITIONS), F.softplus(hidden))
    with torch.no_grad():
        network.log_scale.fill_(2.0)
    torch.testing.assert_close(network(LATENTS, CONDITIONS), F.softplus(hidden) * torch.tensor(2.0).exp())
    assert network.double()(LATENTS.double(), CONDITIONS).dtype == torch.float64


def test_every_parameter_and_both_inputs_count():
    network = MultiplierNetwork(5, 3)
    latents = LATENTS.clone().requires_grad_()
    multipliers = network(latents, CONDITIONS)
    multipliers.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())
    torch.testing.assert_close(network.log_scale.grad, multipliers.sum())
    assert (latents.grad.abs().sum(dim=1) > 0).all()
    assert (network(LATENTS, (CONDITIONS + 1) % 3) != multipliers).all()


def test_constant():
    constant = ConstantMultiplier()
    assert torch.equal(constant(LATENTS, CONDITIONS), torch.ones(50))
    constant(LATENTS, CONDITIONS).mean().backward()
    assert constant.log_scale.grad.item() == 1


def test_one_for_each_classifier():
    networks = learned_multipliers("network", 5, [3, 4])
    assert [network.num_conditions for network in networks] == [3, 4] and networks[0].layers[0].in_features == 8
    assert [type(one) for one in learned_multipliers("constant", 5, [3, 4])] == [ConstantMultiplier] * 2
    assert len(learned_multipliers("ce", 5, [3, 4])) == 0
