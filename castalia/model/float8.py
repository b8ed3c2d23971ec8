"""Matrix products in float8, of whose operands each has one scale that follows from its own values.

    y  = x W^T      x and W in e4m3: 3 bits of fraction, up to 448
    dx = dy W       dy in e5m2: 2 bits of fraction, up to 57,344, as gradients have a wider range
    dW = dy^T x

Formats and their use: Micikevicius et al. 2022 (2209.05433). Scales are powers of two, so that a value's rounding does
not depend on the largest one beside it, but for values more than 2^14 times smaller: layouts and micro-batches, whose
tensors have other largest values, round alike. Nothing is kept from step to step, so a run resumes with the same bits.

GPUs multiply by `torch._scaled_mm`. CPUs have no such product (torch's takes a thousand times as long as one in bf16),
so there the same float8 values are multiplied in the dtype of the activations, which holds them exactly.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from castalia.config.float8_matrices import MULTIPLE

VALUES, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
SMALLEST = 2.0**-100  # takes the place of the largest value of a tensor of zeros
EXPONENT_BITS = 0x7F800000  # of fp32


def set_float8(model: nn.Module, names: Iterable[str]) -> None:
    """Let those of the named linear modules that this model, or stage, has multiply in float8 while it trains."""
    wanted = set(names)
    for name, module in model.named_modules():
        if name in wanted:
            module.float8 = True  # type: ignore[assignment]


def quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in float8, and the fp32 scalar by which to multiply it for the values of x. NaN and infinities give NaN."""
    least, most = torch.aminmax(x)
    largest = torch.maximum(-least, most).float().clamp(min=SMALLEST)
    # The largest power of two that keeps all values in range.
    factor = ((torch.finfo(dtype).max / largest).view(torch.int32) & EXPONENT_BITS).view(torch.float32)
    return (x * factor.to(x.dtype)).to(dtype), factor.reciprocal()


def scaled_product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(a a_scale) (b b_scale)^T of float8 tensors: [m, k], [n, k] -> [m, n]. Sums are rounded once, to `dtype`."""
    if a.device.type == "cpu":
        return (a.to(dtype) @ b.to(dtype).T) * (a_scale * b_scale).to(dtype)
    return torch._scaled_mm(a.contiguous(), b.contiguous().T, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype)


class _Float8Product(torch.autograd.Function):
    """x weight^T: [m, in], [out, in] -> [m, out]. The weight is quantized again in the backward pass: keeping it would
    take memory for all layers, and with sharded weights undo the sharding.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x8, x_scale = quantized(x, VALUES)
        ctx.save_for_backward(*(x8, x_scale) if ctx.needs_input_grad[1] else (None, None), weight)
        return scaled_product(x8, x_scale, *quantized(weight.to(x.dtype), VALUES), x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x8, x_scale, weight = ctx.saved_tensors
        dy8, dy_scale = quantized(dy, GRADIENTS)
        dx = d_weight = None
        if ctx.needs_input_grad[0]:
            w8, w_scale = quantized(weight.to(dy.dtype), VALUES)
            dx = scaled_product(dy8, dy_scale, w8.T, w_scale, dy.dtype)
        if ctx.needs_input_grad[1]:
            missing = -len(dy8) % MULTIPLE  # here tokens are the inner dimension
            if missing:
                dy8, x8 = (F.pad(part.view(torch.uint8), (0, 0, 0, missing)).view(part.dtype) for part in (dy8, x8))
            d_weight = scaled_product(dy8.T, dy_scale, x8.T, x_scale, dy.dtype).to(weight.dtype)
        return dx, d_weight


def float8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias in the dtype of x, by a product in float8: [..., in] -> [..., out].

    On GPUs both sizes of the weight must be multiples of 16.
    """
    y = _Float8Product.apply(x.flatten(0, -2), weight)
    y = y if bias is None else y + bias.to(x.dtype)
    return y.unflatten(0, x.shape[:-1])
