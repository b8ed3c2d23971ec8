"""Compare two tensors piece by piece: equality, figures, and how one that differs is related to the other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from castalia.config.schema import ModelConfig
from castalia.config.tensor_table import row_of
from castalia.storage.derived import Reordered, Scaled, Transposed, part
from castalia.storage.lazy import TensorRef, same_bits

PAIR_BYTES = 8 << 20
NUM_PROBES = 16  # rows that are compared first, so that most differences are found without reading everything
RELATED = 0.5  # two matrices with a larger correlation count as trained from the same weights
RANK_COUNTS = (2, 4, 8, 16)

Kind = Literal[
    "identical", "dtype", "padding", "layout", "transposed", "bias_summed", "halves_swapped",
    "moved", "unrelated", "shape", "not_finite",
]  # fmt: skip


@dataclass(frozen=True)
class Figures:
    """Statistics of two tensors of one shape, in fp64; of vocabularies, of the rows that both have."""

    count: int
    max_diff: float
    rms_diff: float
    rms_a: float
    rms_b: float
    std_a: float
    std_b: float
    correlation: float  # about zero, without subtracting means: 0 for independent draws around 0

    @property
    def relative(self) -> float:
        """RMS of the difference in units of A's RMS."""
        return self.rms_diff / self.rms_a if self.rms_a else math.inf if self.rms_diff else 0.0


@dataclass(frozen=True)
class Relation:
    """How tensor B is related to tensor A."""

    kind: Kind
    detail: str = ""
    figures: Figures | None = None  # None where shapes differ

    @property
    def exact(self) -> bool:
        """Whether B holds A's values, possibly rearranged, scaled or rounded."""
        return self.kind not in ("moved", "unrelated", "shape", "not_finite")

    @property
    def harmless(self) -> bool:
        """Whether a model computes the same with either, up to rounding."""
        return self.kind in ("identical", "dtype", "padding")


def relate(
    name: str, a: TensorRef, b: TensorRef, model: ModelConfig | None, others: Mapping[str, TensorRef] | None = None
) -> Relation:
    """How B's tensor `name` is related to A's.

    `model`: A's architecture, which tells how rows may be permuted; None: permutations are not tried. `others`: B's
    tensors, among which the other half of a gated MLP is looked for.
    """
    row, same_shape = row_of(name), tuple(a.shape) == tuple(b.shape)
    rows = min(a.shape[0], b.shape[0]) if a.shape and b.shape else 0
    only_rows = row.has_token_rows and tuple(a.shape[1:]) == tuple(b.shape[1:])  # they may be padded differently
    figures = measure(part(a, 0, rows), part(b, 0, rows)) if only_rows else measure(a, b) if same_shape else None
    if same_shape and equal(a, b):
        if a.dtype == b.dtype:
            return Relation("identical", figures=figures)
        return Relation("dtype", f"{a.dtype_name} here, {b.dtype_name} there", figures)
    if only_rows and (detail := _only_padding(a, b, model)):
        return Relation("padding", detail, figures)
    if len(a.shape) == 2 and tuple(a.shape) == tuple(reversed(b.shape)) and equal(a, Transposed(b)):
        return Relation("transposed", "[out, in] here, [in, out] there", figures)
    if figures is None:
        return Relation("shape", f"{list(a.shape)} here, {list(b.shape)} there")
    if ".attn.qkv." in name and model is not None:
        for detail, order in row_orders(model):
            if equal(Reordered(a, order), b):
                return Relation("layout", detail, figures)
            if equal(a, Reordered(b, order)):
                return Relation("layout", f"{detail}, undone", figures)
    if row.row_parallel_bias:
        for ranks in RANK_COUNTS:
            if close(a, Scaled(b, ranks)):
                return Relation("bias_summed", f"{ranks} times as large as here", figures)
            if close(Scaled(a, ranks), b):
                return Relation("bias_summed", f"1/{ranks} of what it is here", figures)
    twin = name.replace(".mlp.up.", ".mlp.gate.") if ".mlp.up." in name else name.replace(".mlp.gate.", ".mlp.up.")
    if others and twin != name and twin in others and equal(a, others[twin]):
        return Relation("halves_swapped", f"what is {twin} there", figures)
    if not math.isfinite(figures.rms_diff):
        return Relation("not_finite", figures=figures)
    kind: Kind = "moved" if figures.correlation > RELATED else "unrelated"
    return Relation(kind, "" if same_shape else f"{a.shape[0]} rows here, {b.shape[0]} there", figures)


def equal(a: TensorRef, b: TensorRef) -> bool:
    """Whether two tensors hold the same values, up to rounding to the coarser of their dtypes."""
    if tuple(a.shape) != tuple(b.shape):
        return False
    return all(_alike(*pair) for pair in _probes(a, b)) and all(_alike(*pair) for pair in pairs(a, b))


def close(a: TensorRef, b: TensorRef) -> bool:
    """Whether two tensors are equal up to a rounding error of the coarser dtype. False if both are all zero."""
    tolerance = 2 * max(torch.finfo(ref.dtype).eps for ref in (a, b))
    values = [(x.double(), y.double()) for x, y in pairs(a, b)]
    return any(bool(x.any()) for x, _ in values) and all(
        torch.allclose(x, y, rtol=tolerance, atol=tolerance * 1e-3) for x, y in values
    )


def measure(a: TensorRef, b: TensorRef) -> Figures:
    """The figures of two tensors of one shape, in one pass over both."""
    count, max_diff = 0, 0.0
    sums = torch.zeros(6, dtype=torch.float64)  # of a, b, a^2, b^2, a*b, (a-b)^2
    for left, right in pairs(a, b):
        x, y = left.double().flatten(), right.double().flatten()
        count += x.numel()
        max_diff = max(max_diff, float((x - y).abs().max()))
        sums += torch.stack([x.sum(), y.sum(), x.dot(x), y.dot(y), x.dot(y), (x - y).square().sum()])
    sum_a, sum_b, aa, bb, ab, dd = (sums / max(count, 1)).tolist()
    size = math.sqrt(aa * bb)
    return Figures(
        count=count,
        max_diff=max_diff,
        rms_diff=math.sqrt(dd),
        rms_a=math.sqrt(aa),
        rms_b=math.sqrt(bb),
        std_a=math.sqrt(max(aa - sum_a**2, 0.0)),
        std_b=math.sqrt(max(bb - sum_b**2, 0.0)),
        correlation=ab / size if size else 0.0,
    )


def pairs(a: TensorRef, b: TensorRef) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same rows of both tensors, about `PAIR_BYTES` at a time."""
    if not a.shape:
        yield a.read(), b.read()
        return
    width = max(1, math.prod(a.shape[1:]) * max(a.dtype.itemsize, b.dtype.itemsize))
    step = max(1, PAIR_BYTES // width)
    for start in range(0, a.shape[0], step):
        rows = [slice(start, min(start + step, a.shape[0]))]
        yield a.read(rows), b.read(rows)


def row_orders(model: ModelConfig) -> list[tuple[str, torch.Tensor]]:
    """Orders in which other programs store the rows of `attn.qkv`, each with its description.

    Row i of such a tensor is our row `order[i]`. Ours are grouped by key/value head: the group's queries, its key, its
    value (see `castalia.model.transformer`).
    """
    n, kv, d = model.num_heads, model.kv_heads, model.head_size
    group = n // kv
    grid = torch.arange((n + 2 * kv) * d).view(kv, group + 2, d)  # row numbers by group, head, dimension
    q, k, v = grid[:, :group].reshape(n, d), grid[:, group], grid[:, group + 1]  # [n, d], [kv, d], [kv, d]
    orders = []
    for ranks in (1, *RANK_COUNTS):
        if kv % ranks == 0:
            parts = [piece.chunk(ranks)[rank].flatten() for rank in range(ranks) for piece in (q, k, v)]
            over = f" on each of {ranks} tensor ranks" if ranks > 1 else ""
            orders.append((f"rows are all queries, all keys, all values{over}", torch.cat(parts)))
    if group == 1:
        orders.append(("rows of a head are query, key, value of each dimension", grid.permute(0, 2, 1).flatten()))
    elif d * kv % n == 0:
        per_head = [x.reshape(n, -1) for x in (q, k, v)]  # each query head with its share of a key and a value
        orders.append(("rows are in the old order of grouped queries", torch.cat(per_head, dim=1).flatten()))
    if model.position == "rotary" and model.rotary_size % 2 == 0:
        paired = grid.clone()
        # queries and keys: (first half, second half) of the rotating dimensions -> interleaved pairs
        turning = grid[:, :-1, : model.rotary_size].unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        paired[:, :-1, : turning.shape[-1]] = turning
        orders.append(("rotary dimensions are interleaved pairs, not halves", paired.flatten()))
    return orders


def _only_padding(a: TensorRef, b: TensorRef, model: ModelConfig | None) -> str:
    """A description of the padding if the rows of all tokens agree, else an empty text."""
    rows = min(a.shape[0], b.shape[0])
    if model is not None and model.vocab_size is not None:
        rows = min(rows, model.vocab_size)
    if rows == a.shape[0] == b.shape[0] or not equal(part(a, 0, rows), part(b, 0, rows)):
        return ""
    if a.shape[0] == b.shape[0]:
        return f"rows {rows} to {a.shape[0] - 1}, which belong to no token"
    return f"{a.shape[0]} rows here, {b.shape[0]} there, the first {rows} equal"


def _probes(a: TensorRef, b: TensorRef) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    if a.shape and a.shape[0] > NUM_PROBES:
        for row in torch.linspace(0, a.shape[0] - 1, NUM_PROBES).long().tolist():
            yield a.read([slice(row, row + 1)]), b.read([slice(row, row + 1)])


def _alike(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two pieces are equal after rounding to the coarser of their dtypes."""
    if x.dtype == y.dtype:
        return same_bits(x, y)
    if x.dtype == torch.float32 or y.dtype == torch.float32:
        coarser = y.dtype if x.dtype == torch.float32 else x.dtype
        return same_bits(x.to(coarser), y.to(coarser))
    eps = max(torch.finfo(dtype).eps for dtype in (x.dtype, y.dtype))  # both are roundings of something finer
    return torch.allclose(x.double(), y.double(), rtol=eps, atol=1e-7)
