"""Spectral normalisation of convolutions, whose state is a plain weight and one vector."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SpectralConv2d(nn.Conv2d):
    """W / sigma(W) in place of W, the latter as a matrix of C_out rows (Miyato et al., ICLR 2018, arXiv 1802.05957).

    One power iteration in each training forward (their algorithm 1). `torch.nn.utils.parametrizations.spectral_norm`
    does the same; its modules hide the weight, which initialisation and loading by transformers would have to know.

    Attributes:
        direction: (C_out,), the estimate of the first left singular vector; a buffer. Evaluation leaves it alone.
    """

    direction: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        self.register_buffer("direction", torch.ones(self.out_channels))

    def forward(self, input: Tensor) -> Tensor:
        # The estimate is of full precision also under autocast.
        with torch.autocast(input.device.type, enabled=False):
            weight = self.weight / self._spectral_norm()
        return self._conv_forward(input, weight, self.bias)

    def _spectral_norm(self) -> Tensor:
        """u^T W v, with u and v as constants: its gradient is u v^T."""
        matrix = self.weight.flatten(1)
        with torch.no_grad():
            left = self.direction
            right = F.normalize(matrix.T @ left, dim=0)
            if self.training:
                left = F.normalize(matrix @ right, dim=0)
                self.direction.copy_(left)
        # A copy: the next forward overwrites the buffer before this one's backward.
        return left.clone() @ (matrix @ right)
