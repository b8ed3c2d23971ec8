"""Weights in the form in which a CPU multiplies few rows by them fastest: reading them once is all that should count.

The products of a packed model take the weights' precision; whatever lies between them is fp32, because kernels for
bf16 rows are slower on CPUs than those for fp32, above all attention.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from castalia.model.layers import Embedding, Linear
from castalia.model.transformer import Transformer

SMALL = 1 << 17  # elements: such matrices stay in a core's cache as fp32, whose products start soonest
FEW = 64  # rows; with more it is the arithmetic that counts, which plain products do best


def pack(model: Transformer, int8: bool = False) -> None:
    """Change a model on the CPU, with parameters in fp32 or bf16, so that it can do nothing but write, faster.

    Weights keep their dtype, or become int8 with a scale for each row. A tied head gets a copy of its own.
    """
    dtype = model.embed.weight.dtype
    if dtype == torch.bfloat16 and not (int8 or has_bf16_kernels()):
        return
    kind = Int8Product if int8 else {torch.float32: Fp32Product, torch.bfloat16: Bf16Product}[dtype]
    if model.head is None:
        model.head = cast(Linear, product(kind, model.embed.weight, None))
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Linear):
                setattr(module, name, product(kind, child.weight, child.bias))
            elif not isinstance(child, Embedding) and not list(child.children()):
                child.float()
    model.compute_dtype = torch.float32


def has_bf16_kernels() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def product(kind: type[nn.Module], weight: Tensor, bias: Tensor | None) -> nn.Module:
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    return (Fp32Product if weight.numel() < SMALL else kind)(weight, bias)


class Fp32Product(nn.Module):
    """A share of the rows for each thread, since libraries leave products with few rows to one.

    Wide matrices lie column by column: read row by row they would not get near the memory's bandwidth.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        size, inner = weight.shape
        self.weight = weight.float().T.contiguous().T if size > inner else weight.float()
        self.bias = None if bias is None else bias.float()
        shares = math.gcd(size, torch.get_num_threads())
        self.shares = self.weight.view(shares, size // shares, inner).transpose(1, 2)
        self.biases = torch.zeros(1) if self.bias is None else self.bias.view(shares, 1, -1)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) > FEW:
            return F.linear(x, self.weight, self.bias)
        out = torch.baddbmm(self.biases, rows.expand(len(self.shares), -1, -1), self.shares)
        return out.transpose(0, 1).reshape(*x.shape[:-1], -1)


class Bf16Product(nn.Module):
    """In the order that oneDNN's kernels want, who otherwise would reorder the weight each time."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight, 1), bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.bfloat16(), self.weight, self.bias, "none", [], "").float()


class Int8Product(nn.Module):
    """The nearest of 255 multiples of each row's scale, which is bf16 as the kernel wants it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
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
