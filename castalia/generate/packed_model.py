"""A model in the form in which a CPU generates fastest: few kernels, each of which reads its weights at full speed.

    parallel block    x -> norm -> [qkv; up; gate] -> attention, activation -> [out, down] -> + x    2 products
    other blocks      x -> norm1 -> qkv -> attention -> out -> + -> norm2 -> [up; gate] -> down -> + 4 products

A mixture of experts and blocks without attention stay as they are, in the precision of their weights.

Products have the precision of the weights. All else is fp32, because CPU kernels for bf16 are slower than those for
fp32, above all attention of a single query. Of prompts all but norms and the residual stream is bf16, where the CPU is
faster at it (`prompts_are_bf16`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from castalia.generate.fastest import Ways, fastest
from castalia.generate.packed_matmul import Bf16Product, Fp32Product, RoundedProduct, SmallProduct, int8_product
from castalia.model.attention import Attention, Context
from castalia.model.layers import MLP, Linear, gelu_tanh
from castalia.model.transformer import Block, Transformer

ROOT = 2 * math.sqrt(2 / math.pi)
PIECE = 1 << 17  # elements that a core's cache keeps while several kernels pass over them
SMALL = 1 << 18  # elements; smaller matrices stay in a core's cache, where fp32 products have the least overhead

Affine = tuple[Tensor, Tensor | None]  # weight [out, in] and bias [out]
Maker = Callable[[Affine], Any]  # makes the module of a product


@torch.no_grad()
def pack(model: Transformer, int8: bool = False, rows: int = 1) -> None:
    """Convert a model on the CPU, in place, for inference only: afterwards it can no longer be trained or saved.

    Parameters must be fp32 or bf16. They keep their dtype, or with `int8` become int8 with a scale for each output.
    `rows` is the number of texts that will be generated at a time. A tied head gets its own copy of the embedding.
    """
    product = maker(model.embed.weight.dtype, int8, rows)
    if product is None:
        return
    for name, block in model.blocks.items():
        if isinstance(block, Block):
            model.blocks[name] = packed_block(block, product)
    model.head = product((model.head_weight, None if model.head is None else model.head.bias))  # type: ignore[assignment]
    if model.norm is not None:
        model.norm.float()
    model.compute_dtype = model.cache_dtype = torch.float32


def maker(dtype: torch.dtype, int8: bool, rows: int) -> Maker | None:
    """What makes a product of a weight of this dtype; None if other forms are no faster on this CPU."""
    if dtype == torch.bfloat16 and not (int8 or has_bf16_kernels()):
        return None
    kind = int8_product if int8 else {torch.float32: Fp32Product, torch.bfloat16: Bf16Product}[dtype]
    small = SmallProduct if kind is not Fp32Product and has_bf16_kernels() else Fp32Product
    return lambda affine: (small if affine[0].numel() < SMALL else kind)(*affine, rows)


@cache
def prompts_are_bf16() -> bool:
    """Whether a prompt goes through blocks with rounded weights faster in bf16: whether its attention does."""
    if not has_bf16_kernels():
        return False

    def ways() -> Ways:
        q = torch.ones(1, 8, 512, 64)  # [b, n, t, d]

        def in_bf16() -> Tensor:
            rounded = q.bfloat16()
            return F.scaled_dot_product_attention(rounded, rounded, rounded, is_causal=True).float()

        return {"fp32": lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True), "bf16": in_bf16}

    return fastest("attention of a prompt", ways) == "bf16"


def packed_block(block: Block, product: Maker) -> nn.Module:
    """The block in another form, which uses up its parts."""
    side_by_side = block.parallel and not block.drops_attention and isinstance(block.mlp, MLP)
    packed = SideBySide(block, product) if side_by_side else _packed(block, product)
    for part in packed.modules():
        if isinstance(part, RoundedProduct):
            part.narrow = prompts_are_bf16()
    return packed


def has_bf16_kernels() -> bool:
    """Whether oneDNN has bf16 products for this CPU."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class SideBySide(nn.Module):
    """A block with a parallel residual, whose attention and MLP share their first and their last product.

    Scale and shift of both norms have moved into the first product, so that one norm without parameters serves both.
    The last product takes the outputs of both branches side by side, and so also adds them.
    """

    def __init__(self, block: Block, product: Maker) -> None:
        super().__init__()
        attn, mlp = block.attn, block.mlp
        assert isinstance(mlp, MLP)
        self.attn, self.width, self.activate = attn, attn.qkv.out_features, _activation(mlp)
        assert block.norm1 is not None  # norms after a branch and parallel residuals do not go together
        norm2 = block.norm2 or block.norm1
        inner = (_behind(norm2, part) for part in _inner(mlp))
        self.first = product(_stacked(_by_kind(attn, _behind(block.norm1, attn.qkv)), *inner))
        self.last = product(_added(attn.out, mlp.down))
        self.norm = block.norm1.float()
        for name, parameter in self.norm.named_parameters():
            parameter.fill_(name == "weight" and not getattr(self.norm, "zero_centered", False))
        del attn.qkv, attn.out
        attn.float()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Residual stream [b, t, h] -> the same shape."""
        both = self.first(self.norm(x))  # [b, t, qkv + f, or qkv + 2 f if gated]
        qkv, inner = both.split((self.width, both.shape[-1] - self.width), dim=-1)
        heads = self.attn.attend_heads(qkv, context)  # [b, t, n d]
        return x + self.last(torch.cat((heads, self.activate(inner)), dim=-1))


class PackedMLP(nn.Module):
    """An MLP whose up and gate matrices are one product."""

    def __init__(self, mlp: MLP, product: Maker) -> None:
        super().__init__()
        self.inner, self.activate = product(_stacked(*map(_affine, _inner(mlp)))), _activation(mlp)
        self.down = product(_affine(mlp.down))

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> the same shape."""
        return self.down(self.activate(self.inner(x)))


def _packed(block: Block, product: Maker) -> Block:
    attn = block.attn
    attn.qkv, attn.out = product(_by_kind(attn, _affine(attn.qkv))), product(_affine(attn.out))
    if isinstance(block.mlp, MLP):
        block.mlp = PackedMLP(block.mlp, product)
    norms = (block.norm1, block.norm1_out, block.norm2, block.norm2_out, attn.qk_norm, attn.q_norm, attn.k_norm)
    for part in norms:
        if part is not None:
            part.float()
    return block


def _inner(mlp: MLP) -> list[Linear]:
    return [mlp.up] if mlp.gate is None else [mlp.up, mlp.gate]


def _activation(mlp: MLP) -> Callable[[Tensor], Tensor]:
    activation = _gelu_tanh if mlp.activation is gelu_tanh else mlp.activation
    if mlp.gate is None:
        return activation

    def gated(x: Tensor) -> Tensor:
        up, gate = x.chunk(2, dim=-1)
        return activation(gate) * up

    return gated


def _gelu_tanh(x: Tensor) -> Tensor:
    """`gelu_tanh`, of prompts as x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)): half as long as torch's kernel takes."""
    if x.numel() < 2 * PIECE:
        return gelu_tanh(x)
    out = x.new_empty(x.shape)
    rows = max(1, PIECE * torch.get_num_threads() // x.shape[-1])
    for part, outputs in zip(x.flatten(0, -2).split(rows), out.flatten(0, -2).split(rows), strict=True):
        wide = part.float()
        inner = torch.addcmul(torch.tensor(ROOT), wide, wide, value=0.044715 * ROOT).mul_(wide)
        outputs.copy_(inner.sigmoid_().mul_(wide))
    return out


def _by_kind(attn: Attention, qkv: Affine) -> Affine:
    """The product of queries, keys and values with its outputs by kind, which `attn` takes note of.

    A qk norm wants them by head.
    """
    if attn.qk_norm is not None or attn.q_norm is not None:
        return qkv
    attn.by_kind = True

    def ordered(rows: Tensor) -> Tensor:
        """[(n + 2 kv) d, ...] -> the same shape."""
        heads = rows.unflatten(0, (-1, attn.group_size + 2, attn.head_size))  # [kv, group + key + value, d, ...]
        return torch.cat([part.flatten(0, 2) for part in heads.split((attn.group_size, 1, 1), dim=1)])

    weight, bias = qkv
    return ordered(weight), None if bias is None else ordered(bias)


def _affine(linear: Linear) -> Affine:
    return linear.whole_weight, linear.bias


def _behind(norm: nn.Module, linear: Linear) -> Affine:
    """The linear map with scale and shift of the norm before it merged in: W (s x + t) + b = (W s) x + (W t + b)."""
    weight, bias = _affine(linear)
    scale, shift = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if shift is not None:
        shifted = weight.float() @ shift.float()
        bias = shifted if bias is None else bias + shifted
    if scale is None:
        return weight, bias
    return weight.float() * (scale.float() + getattr(norm, "zero_centered", False)), bias


def _stacked(*parts: Affine) -> Affine:
    """One product in place of several of the same input, whose outputs are concatenated."""
    weight = torch.cat([weight for weight, _ in parts])
    if all(bias is None for _, bias in parts):
        return weight, None
    return weight, torch.cat([weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in parts])


def _added(*linears: Linear) -> Affine:
    """One product of the concatenated inputs, in place of the sum of several products."""
    biases = [linear.bias for linear in linears if linear.bias is not None]
    return torch.cat([linear.whole_weight for linear in linears], dim=1), sum(biases[1:], biases[0]) if biases else None
