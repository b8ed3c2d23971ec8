"""Products with weights in the form in which a CPU multiplies few rows by them fastest.

With one row, reading the weights is all that should count; with more, their order in memory does as well. Weights take
the stated precision; what goes in and comes out is fp32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEW = 64  # rows; with more it is the arithmetic that counts, which plain products do best


class Fp32Product(nn.Module):
    """For one row: the weights as they are, a share of them for each thread, since libraries leave it all to one.

    For several: in oneDNN's order, which takes half the time of MKL's products, but a third more for one row.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        super().__init__()
        self.weight, self.bias = weight.detach().float(), None if bias is None else bias.detach().float()
        self.multiply = onednn if torch.backends.mkldnn.is_available() else F.linear
        self.shares: Tensor | None = None
        if rows > 1 and self.multiply is onednn:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, rows)
        else:
            shares = math.gcd(len(weight), torch.get_num_threads())
            self.shares = self.weight.view(shares, -1, weight.shape[1])
            self.biases = torch.zeros(1) if self.bias is None else self.bias.view(shares, -1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.shares is None or x.numel() > x.shape[-1]:
            return self.multiply(x, self.weight, self.bias)
        columns = x.view(1, 1, -1).expand(len(self.shares), -1, -1).transpose(1, 2)  # viewed otherwise it is 5x slower
        return torch.baddbmm(self.biases, self.shares, columns).view(*x.shape[:-1], -1)


class Bf16Product(nn.Module):
    """In the order that oneDNN's kernels want, who otherwise would reorder the weight each time."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16(), rows)
        self.bias = None if bias is None else bias.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return onednn(x.bfloat16(), self.weight, self.bias).float()


class Int8Product(nn.Module):
    """The nearest of 255 multiples of each row's scale, which is bf16 as the kernel wants it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        super().__init__()
        wide = weight.float()
        self.scale = (wide.abs().amax(dim=1) / 127).clamp(min=1e-30).bfloat16()
        self.codes = (wide / self.scale[:, None].float()).round().clamp(-127, 127).char()
        self.bias = None if bias is None else bias.float()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        if len(rows) > FEW:
            out = F.linear(rows, self.codes.bfloat16()) * self.scale
        else:
            out = torch._weight_int8pack_mm(rows, self.codes, self.scale)
        out = out.view(*x.shape[:-1], -1).float()
        return out if self.bias is None else out.add_(self.bias)


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`weight` may be in oneDNN's own order or plain."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
