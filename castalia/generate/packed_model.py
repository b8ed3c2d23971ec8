"""A model in the form in which a CPU writes fastest: few kernels, each of which reads its weights at full speed.

The products of a packed model take the weights' precision; whatever lies between them is fp32, because kernels for
bf16 rows are slower on CPUs than those for fp32, above all attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from castalia.generate.packed_matmul import Bf16Product, Fp32Product, Int8Product
from castalia.model.attention import Context
from castalia.model.layers import MLP, Linear
from castalia.model.transformer import Block, Transformer

SMALL = 1 << 18  # elements: such matrices stay in a core's cache as fp32, whose products start soonest

Affine = tuple[Tensor, Tensor | None]  # weight [out, in] and bias [out]
Maker = Callable[[Affine], Any]  # of a product's module


@torch.no_grad()
def pack(model: Transformer, int8: bool = False, rows: int = 1) -> None:
    """Change a model on the CPU, with parameters in fp32 or bf16, so that it can do nothing but write, faster.

    Weights keep their dtype, or become int8 with a scale for each row. `rows`: so many texts are written at a time.
    A tied head gets a copy of its own.
    """
    dtype = model.embed.weight.dtype
    if dtype == torch.bfloat16 and not (int8 or has_bf16_kernels()):
        return
    kind = Int8Product if int8 else {torch.float32: Fp32Product, torch.bfloat16: Bf16Product}[dtype]

    def product(affine: Affine) -> nn.Module:
        return (Fp32Product if affine[0].numel() < SMALL else kind)(*affine, rows)

    for name, block in model.blocks.items():
        assert isinstance(block, Block)
        side_by_side = block.parallel and not block.drops_attention
        model.blocks[name] = SideBySide(block, product) if side_by_side else _packed(block, product)
    model.head = product((model.head_weight, None))  # type: ignore[assignment]
    if model.norm is not None:
        model.norm.float()
    model.compute_dtype = torch.float32


def has_bf16_kernels() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class SideBySide(nn.Module):
    """A block whose attention and MLP begin with one product and end in one, which sums what both give.

    Scales and shifts of the two norms have moved into the first.
    """

    def __init__(self, block: Block, product: Maker) -> None:
        super().__init__()
        attn, mlp = block.attn, block.mlp
        self.attn, self.width, self.activate = attn, attn.qkv.out_features, _activation(mlp)
        norm2 = block.norm2 or block.norm1
        self.first = product(_stacked(_behind(block.norm1, attn.qkv), *(_behind(norm2, x) for x in _inner(mlp))))
        self.last = product(_added(attn.out, mlp.down))
        self.norm = block.norm1.float()
        for name, parameter in self.norm.named_parameters():
            parameter.fill_(name == "weight")
        del attn.qkv, attn.out
        attn.float()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        both = self.first(self.norm(x))
        mixed, inner = self.attn.attend_heads(both[..., : self.width], context), self.activate(both[..., self.width :])
        return x + self.last(torch.cat((mixed, inner), dim=-1))


class PackedMLP(nn.Module):
    """Gate and inner matrix are one product."""

    def __init__(self, mlp: MLP, product: Maker) -> None:
        super().__init__()
        self.inner, self.activate = product(_stacked(*map(_affine, _inner(mlp)))), _activation(mlp)
        self.down = product(_affine(mlp.down))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activate(self.inner(x)))


def _packed(block: Block, product: Maker) -> Block:
    block.attn.qkv, block.attn.out = product(_affine(block.attn.qkv)), product(_affine(block.attn.out))
    block.mlp = PackedMLP(block.mlp, product)  # type: ignore[assignment]
    for part in (block.norm1, block.norm2, block.attn.qk_norm):
        if part is not None:
            part.float()
    return block


def _inner(mlp: MLP) -> list[Linear]:
    return [mlp.up] if mlp.gate is None else [mlp.up, mlp.gate]


def _activation(mlp: MLP) -> Callable[[Tensor], Tensor]:
    activation = mlp.activation
    if mlp.gate is None:
        return activation

    def gated(x: Tensor) -> Tensor:
        up, gate = x.chunk(2, dim=-1)
        return activation(gate) * up

    return gated


def _affine(linear: Linear) -> Affine:
    return linear.whole_weight, linear.bias


def _behind(norm: nn.Module, linear: Linear) -> Affine:
    """What the linear map does to the norm's input when that lacks scale and shift."""
    weight, bias = _affine(linear)
    scale, shift = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if shift is not None:
        shifted = weight.float() @ shift.float()
        bias = shifted if bias is None else bias + shifted
    return weight if scale is None else weight.float() * scale.float(), bias


def _stacked(*parts: Affine) -> Affine:
    """All parts of the same input, one behind the other."""
    weight = torch.cat([weight for weight, _ in parts])
    if all(bias is None for _, bias in parts):
        return weight, None
    return weight, torch.cat([weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in parts])


def _added(*linears: Linear) -> Affine:
    """The sum of what they give, for their inputs one behind the other."""
    biases = [linear.bias for linear in linears if linear.bias is not None]
    return torch.cat([linear.whole_weight for linear in linears], dim=1), sum(biases[1:], biases[0]) if biases else None
