"""What a network costs where it is used: parameters, floating-point operations, and time."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hfkd.models.probing import undisturbed

from .timing import measure


def parameter_count(network: nn.Module) -> int:
    """Numbers that a network has learned, the frozen ones too."""
    return sum(parameter.numel() for parameter in network.parameters())


def forward_flops(network: nn.Module, pixel_values: Tensor) -> int:
    """Floating-point operations of one forward pass, in evaluation mode, on `pixel_values` (N, C, H, W).

    Two for each multiply-add of matrix products, convolutions and attention; what else there is (norms, activations,
    pooling) is not counted.
    """
    counter = FlopCounterMode(display=False)
    # The counter does not know the CPU's fused attention: it is counted as the products that it consists of.
    with undisturbed(network), sdpa_kernel(SDPBackend.MATH), counter:
        network(pixel_values)
    return int(counter.get_total_flops())


def forward_seconds(
    networks: Mapping[str, Callable[[Tensor], Any]], pixel_values: Tensor, rounds: int
) -> dict[str, float]:
    """Median seconds of a forward pass of each network on `pixel_values` (N, C, H, W), taken in turn in one run.

    Nothing is put into evaluation mode, and gradients are not recorded.
    """
    with torch.no_grad():
        timings = measure(
            {name: partial(network, pixel_values) for name, network in networks.items()}, repeats=rounds, warmup=1
        )
        return {name: timings.median(name) for name in networks}
