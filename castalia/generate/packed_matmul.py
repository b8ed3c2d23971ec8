"""Products with weights in the form in which a CPU multiplies few rows by them fastest.

With one row, the time should be that of reading the weights; with more rows, their order in memory matters, too.
Weights have the precision in the name of the class; inputs and outputs are fp32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROUNDED = 1 << 22  # elements that are rounded to int8 at a time
FEW = 64  # rows; with more, arithmetic dominates, for which plain products are best


class Fp32Product(nn.Module):
    """fp32 weights [out, in].

    For one row, weights keep their order and each thread multiplies a share of them, since libraries use one thread.
    For several rows, they are in oneDNN's order, which takes half the time of MKL's, but a third more for one row.
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
        """[..., in] -> [..., out]."""
        if self.shares is None or x.numel() > x.shape[-1]:
            return self.multiply(x, self.weight, self.bias)
        # Any other view of x [in] as columns [shares, in, 1] is five times slower.
        columns = x.view(1, 1, -1).expand(len(self.shares), -1, -1).transpose(1, 2)
        return torch.baddbmm(self.biases, self.shares, columns).view(*x.shape[:-1], -1)


class Bf16Product(nn.Module):
    """bf16 weights in oneDNN's order; in any other, its kernels would reorder them in every call."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16(), rows)
        self.bias = None if bias is None else bias.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return onednn(x.bfloat16(), self.weight, self.bias).float()


class Int8Product(nn.Module):
    """int8 weights with a scale for each output, which is bf16 as the kernel needs it: weight = code * scale."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        super().__init__()
        # Some rows at a time: several fp32 copies of all would not fit beside a model that only just does.
        parts = [_rounded(some) for some in weight.split(max(1, ROUNDED // weight.shape[1]))]
        self.scale, self.codes = torch.cat([scale for scale, _ in parts]), torch.cat([codes for _, codes in parts])
        self.bias = None if bias is None else bias.float()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        if len(rows) > FEW:
            out = F.linear(rows, self.codes.bfloat16()) * self.scale
        else:
            out = torch._weight_int8pack_mm(rows, self.codes, self.scale)
        out = out.view(*x.shape[:-1], -1).float()
        return out if self.bias is None else out.add_(self.bias)


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The scale [out] and the codes [out, in] of rows."""
    wide = weight.float()
    scale = (wide.abs().amax(dim=1) / 127).clamp(min=1e-30).bfloat16()
    return scale, (wide / scale[:, None].float()).round().clamp(-127, 127).char()


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias by oneDNN. `weight` [out, in] may be in oneDNN's order or in the usual one."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
