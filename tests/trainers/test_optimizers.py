"""Fused optimizers do not look at strides: gradients and moments are brought to the layout of their weights."""

import copy

import pytest
import torch
from torch import nn

from hfkd.trainers.optimizers import NamedOptimizers


KINDS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1, fused=True),
}


def weight():
    values = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    return nn.Parameter(values.contiguous(memory_format=torch.channels_last))


def step(optimizers, parameter, layout, number):
    gradient = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(number))
    optimizers.accumulate("main", [parameter], [gradient.contiguous(memory_format=layout)])
    optimizers.step()


@pytest.mark.parametrize("kind", KINDS)
def test_layout_of_gradients_and_loaded_moments_changes_nothing(kind):
    def steps(layout, reload):
        parameter = weight()
        optimizers = NamedOptimizers({"main": KINDS[kind]([parameter])}, max_grad_norm=0.0)
        step(optimizers, parameter, layout, 1)
        if reload:
            state = copy.deepcopy(optimizers.state_dict())
            for entries in state["main"]["state"].values():
                entries.update({name: value.contiguous() for name, value in entries.items() if value is not None})
            optimizers.load_state_dict(state)
        step(optimizers, parameter, layout, 2)
        return parameter.detach()

    expected = steps(torch.channels_last, reload=False)
    for layout in (torch.channels_last, torch.contiguous_format):
        for reload in (False, True):
            assert torch.equal(steps(layout, reload), expected), (layout, reload)
