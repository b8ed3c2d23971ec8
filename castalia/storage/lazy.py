"""Lazy tensors: those that lie in files or in memory, and those made of others, read piece by piece.

Every class here is a `TensorRef`, which names what it is made of: a slice of it reads only what that slice needs of its
sources, and whoever wants to know what lies underneath follows `sources`, whatever the classes are.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from castalia.errors import CheckpointError

if TYPE_CHECKING:
    import torch

Slices = Sequence[slice]
Box = list[tuple[int, int]]  # first and one-past-last index of each dimension
ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1,
    "bool": 1,
}  # fmt: skip
CHUNK_ELEMENTS = 1 << 22
PIECE_BYTES = 4 << 20  # small enough for the processor's cache and for memory that is used again


@dataclass(frozen=True)
class ByteRun:
    """Consecutive values in a file."""

    path: Path
    offset: int  # of the first byte
    count: int
    dtype_name: str
    row: int  # values that belong together; a run begins with a whole row

    @property
    def num_bytes(self) -> int:
        return self.count * ITEM_BYTES[self.dtype_name]


class TensorRef:
    """A tensor that is read only when asked for. Opening and describing one goes without torch.

    A class has `shape`, `dtype_name` (a key of `ITEM_BYTES`), and one of `_take`, which gives a fresh tensor, and
    `_fill`, which reads into one that is there: each does the other's work where it is not defined.
    """

    if TYPE_CHECKING:  # alone, as dataclasses take what they inherit for the default of a field of the same name

        @property
        def sources(self) -> tuple[TensorRef, ...]:
            """What it is made of; leaves are made of nothing."""

        @property
        def shape(self) -> tuple[int, ...]: ...

        @property
        def dtype_name(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, self.dtype_name)

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype_name]

    def read(self, slices: Slices | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """A fresh CPU tensor: all of it, or the part that one slice for each dimension selects.

        `out`: a tensor of the part's shape, of any dtype and on any device, to be filled and returned instead. Raises
        CheckpointError for files that are missing, truncated or damaged.
        """
        box = bounds(self.shape, slices)
        if out is None:
            return self._take(box)
        if out.dtype == self.dtype and out.device.type == "cpu":
            self._fill(box, out)
        else:
            out.copy_(self._take(box))
        return out

    def pieces(self, piece_bytes: int = PIECE_BYTES) -> Iterator[torch.Tensor]:
        """The tensor in row-major order, some rows at a time."""
        if not self.shape:
            yield self.read()
            return
        step = max(1, piece_bytes // max(1, prod(self.shape[1:]) * ITEM_BYTES[self.dtype_name]))
        for start in range(0, self.shape[0], step):
            yield self.read([slice(start, min(start + step, self.shape[0]))])

    def runs(self) -> list[ByteRun]:
        """The stored values that it is made of, copies on other ranks included; their order may differ.

        Zeros, and what is in memory, have none.
        """
        return [run for source in self.sources for run in source.runs()]

    def _take(self, box: Box) -> torch.Tensor:
        import torch

        out = torch.empty([stop - start for start, stop in box], dtype=self.dtype)
        self._fill(box, out)
        return out

    def _fill(self, box: Box, out: torch.Tensor) -> None:
        out.copy_(self._take(box))


class Leaf(TensorRef):
    """A tensor that is not made of others."""

    sources = ()  # type: ignore[assignment]


def everything(tensors: Iterable[TensorRef]) -> Iterator[TensorRef]:
    """These tensors and all that they are made of, each once."""
    seen: set[int] = set()
    todo = list(tensors)
    while todo:
        each = todo.pop()
        if id(each) not in seen:
            seen.add(id(each))
            todo += each.sources
            yield each


def leaves(tensors: Iterable[TensorRef]) -> Iterator[TensorRef]:
    """What these tensors are made of in the end, each once."""
    return (each for each in everything(tensors) if not each.sources)


def name_of(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared."""
    import torch

    # a single value may have any stride and be contiguous
    return tensor.detach().contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def as_integers(tensor: torch.Tensor) -> np.ndarray:
    """The bits of a CPU tensor of any dtype, shared: integers of the same size. NumPy has no bfloat16."""
    import torch

    return tensor.view(getattr(torch, f"int{8 * tensor.dtype.itemsize}")).numpy()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype are equal, NaNs and signs of zeros included."""
    return np.array_equal(as_integers(a.contiguous()), as_integers(b.contiguous()))


def bounds(shape: Sequence[int], slices: Slices | None) -> Box:
    """(start, stop) for each dimension. Missing slices select everything; steps other than 1 raise ValueError."""
    if not slices:
        return [(0, size) for size in shape]
    slices = list(slices)
    if len(slices) > len(shape):
        raise ValueError(f"{len(slices)} slices for a tensor of shape {tuple(shape)}")
    slices += [slice(None)] * (len(shape) - len(slices))
    result = []
    for part, size in zip(slices, shape, strict=True):
        start, stop, step = part.indices(size)
        if step != 1:
            raise ValueError(f"slices with a step cannot be read lazily: {part}")
        result.append((start, max(start, stop)))
    return result


def as_slices(box: Box) -> list[slice]:
    return [slice(*pair) for pair in box]


def sizes(box: Box) -> list[int]:
    return [stop - start for start, stop in box]


@dataclass(frozen=True, eq=False)
class InMemory(Leaf):
    """A tensor that is in memory already. Equal is only the very same one."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype_name(self) -> str:
        return name_of(self.tensor.dtype)

    def pieces(self, piece_bytes: int = PIECE_BYTES) -> Iterator[torch.Tensor]:
        """The tensor itself, which takes no further memory."""
        yield self.tensor.detach().contiguous()

    def _fill(self, box: Box, out: torch.Tensor) -> None:
        out.copy_(self.tensor.detach()[tuple(as_slices(box))])


@dataclass(frozen=True)
class Zeros(Leaf):
    shape: tuple[int, ...]
    dtype_name: str = "float32"

    def _fill(self, box: Box, out: torch.Tensor) -> None:
        out.zero_()


class Wrapper(TensorRef):
    """A tensor made of one other, `source`, whose shape and dtype it has unless its class says otherwise."""

    if TYPE_CHECKING:
        source: TensorRef

    @property
    def sources(self) -> tuple[TensorRef, ...]:  # type: ignore[override]
        return (self.source,)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.source.shape)

    @property
    def dtype_name(self) -> str:
        return self.source.dtype_name


@dataclass(frozen=True)
class Part(Wrapper):
    """`source[..., start:stop, ...]` along one dimension."""

    source: TensorRef
    start: int
    stop: int
    dim: int = 0

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        shape = list(self.source.shape)
        shape[self.dim] = self.stop - self.start
        return tuple(shape)

    def runs(self) -> list[ByteRun]:
        size = self.source.shape[self.dim]
        row = prod(self.source.shape) // size if size else 0
        return cut_runs(self.source.runs(), self.start * row, self.stop * row)

    def _inside(self, box: Box) -> list[slice]:
        first, last = box[self.dim]
        return as_slices([*box[: self.dim], (self.start + first, self.start + last), *box[self.dim + 1 :]])

    def _take(self, box: Box) -> torch.Tensor:
        return self.source.read(self._inside(box))

    def _fill(self, box: Box, out: torch.Tensor) -> None:
        self.source.read(self._inside(box), out)


def cut_runs(runs: Iterable[ByteRun], start: int, stop: int) -> list[ByteRun]:
    """The values from `start` to `stop` of consecutive runs."""
    result, begin = [], 0
    for run in runs:
        first, last = max(start - begin, 0), min(stop - begin, run.count)
        if first < last:
            offset = run.offset + first * ITEM_BYTES[run.dtype_name]
            result.append(replace(run, offset=offset, count=last - first))
        begin += run.count
    return result


@dataclass(frozen=True)
class Joined(TensorRef):
    """The sources one after another along one dimension."""

    sources: tuple[TensorRef, ...]
    dim: int = 0

    @cached_property
    def ends(self) -> list[int]:
        """Where each source ends in the joined dimension."""
        return list(accumulate(source.shape[self.dim] for source in self.sources))

    @cached_property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.sources[0].shape)
        shape[self.dim] = self.ends[-1]
        return tuple(shape)

    @property
    def dtype_name(self) -> str:
        return self.sources[0].dtype_name

    def _parts(self, box: Box) -> Iterator[tuple[TensorRef, list[slice], int]]:
        """(source, its slices, where they begin in the box) for each source that has a part in it."""
        first, last = box[self.dim]
        for index in range(bisect_right(self.ends, first), len(self.sources)):
            begin, end = self.ends[index - 1] if index else 0, self.ends[index]
            start, stop = max(first, begin), min(last, end)
            if begin >= last:
                return
            if start < stop:
                inner = [*box[: self.dim], (start - begin, stop - begin), *box[self.dim + 1 :]]
                yield self.sources[index], as_slices(inner), start - first

    def _take(self, box: Box) -> torch.Tensor:
        parts = list(self._parts(box))
        return parts[0][0].read(parts[0][1]) if len(parts) == 1 else super()._take(box)

    def _fill(self, box: Box, out: torch.Tensor) -> None:
        for source, slices, start in self._parts(box):
            part = slices[self.dim]
            source.read(slices, out.narrow(self.dim, start, part.stop - part.start))


@dataclass(frozen=True)
class Permuted(Wrapper):
    """Rows seen as a grid of shape `view` (its product is the number of rows), with the grid's axes put in `order`."""

    source: TensorRef
    view: tuple[int, ...]
    order: tuple[int, ...]

    def _take(self, box: Box) -> torch.Tensor:
        import torch

        rows = torch.arange(prod(self.view)).view(self.view).permute(self.order).flatten()[slice(*box[0])]
        return _rows(self.source, rows, box)


@dataclass(frozen=True)
class Reordered(Wrapper):
    """Rows of the source in a given order."""

    source: TensorRef
    order: torch.Tensor

    def _take(self, box: Box) -> torch.Tensor:
        return _rows(self.source, self.order[slice(*box[0])], box)


def _rows(source: TensorRef, rows: torch.Tensor, box: Box) -> torch.Tensor:
    """These rows of the source, and of the other dimensions what the box has."""
    import torch

    if rows.numel() == 0:
        return torch.empty(sizes(box), dtype=source.dtype)
    low, high = int(rows.min()), int(rows.max()) + 1
    return source.read([slice(low, high), *as_slices(box[1:])])[rows - low]


@dataclass(frozen=True)
class Transposed(Wrapper):
    source: TensorRef

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(reversed(self.source.shape))

    def _take(self, box: Box) -> torch.Tensor:
        return self.source.read(as_slices(box[::-1])).t().contiguous()


@dataclass(frozen=True)
class Combined(TensorRef):
    """Sum or mean of equally shaped sources, computed in fp64: replicas that agree give their own bits back."""

    sources: tuple[TensorRef, ...]
    how: Literal["sum", "mean"]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.sources[0].shape)

    @property
    def dtype_name(self) -> str:
        return self.sources[0].dtype_name

    def _take(self, box: Box) -> torch.Tensor:
        slices = as_slices(box)
        total = self.sources[0].read(slices).double()
        for source in self.sources[1:]:
            total += source.read(slices)
        return (total / len(self.sources) if self.how == "mean" else total).to(self.dtype)

    def drift(self) -> float:
        """Largest difference between any source and the first one."""
        first = self.sources[0].read().double()
        return max(((source.read() - first).abs().max().item() for source in self.sources[1:]), default=0.0)


@dataclass(frozen=True)
class Scaled(Wrapper):
    source: TensorRef
    divisor: int
    factor: int = 1

    def _take(self, box: Box) -> torch.Tensor:
        return (self.source.read(as_slices(box)).double() * self.factor / self.divisor).to(self.dtype)


@dataclass(frozen=True)
class WithLora(TensorRef):
    """The source plus scale * B A, in fp32. Computed in fp64, so that a part has the bits that it has in the whole."""

    source: TensorRef
    a: TensorRef  # [rank, in]
    b: TensorRef  # [out, rank]
    scale: float
    dtype_name = "float32"

    @property
    def sources(self) -> tuple[TensorRef, ...]:  # type: ignore[override]
        return self.source, self.a, self.b

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.source.shape)

    def runs(self) -> list[ByteRun]:
        """Those of the matrix, which has nearly all of the values."""
        return self.source.runs()

    def _take(self, box: Box) -> torch.Tensor:
        rows, columns = as_slices(box)
        change = self.b.read([rows]).double() @ self.a.read([slice(None), columns]).double()
        return (self.source.read([rows, columns]).double() + change * self.scale).float()


@dataclass(frozen=True)
class Padded(Wrapper):
    """The source with rows of zeros added at the end."""

    source: TensorRef
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.source.shape[1:])

    def _fill(self, box: Box, out: torch.Tensor) -> None:
        start, stop = box[0]
        held = max(0, min(stop, self.source.shape[0]) - start)
        if held:
            self.source.read([slice(start, start + held), *as_slices(box[1:])], out[:held])
        out[held:].zero_()


@dataclass(frozen=True)
class Shaped(Wrapper):
    """A vector seen as a tensor of another shape. Rows are read in chunks, so that narrow columns stay cheap."""

    source: TensorRef
    view: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.view

    def _take(self, box: Box) -> torch.Tensor:
        import torch

        lengths = sizes(box)
        row = prod(self.view[1:]) if self.view else 1
        first, last = box[0] if box else (0, 1)
        if lengths[1:] == list(self.view[1:]):
            return self.source.read([slice(first * row, last * row)]).view(lengths)
        result = torch.empty(lengths, dtype=self.dtype)
        step = max(1, CHUNK_ELEMENTS // max(row, 1))
        for start in range(first, last, step):
            stop = min(start + step, last)
            rows = self.source.read([slice(start * row, stop * row)]).view(stop - start, *self.view[1:])
            result[start - first : stop - first] = rows[(slice(None), *as_slices(box[1:]))]
        return result


@dataclass(frozen=True)
class Flattened(Wrapper):
    """A tensor seen as a vector, in row-major order. Reads the whole rows in which lies what is asked for."""

    source: TensorRef

    @property
    def shape(self) -> tuple[int, ...]:
        return (prod(self.source.shape),)

    def _take(self, box: Box) -> torch.Tensor:
        ((start, stop),) = box
        row = max(1, prod(self.source.shape[1:]))
        first = start // row
        rows = self.source.read([slice(first, -(-stop // row))] if self.source.shape else None)
        return rows.reshape(-1)[start - first * row : stop - first * row]


@dataclass(frozen=True)
class Cast(Wrapper):
    """The source in another dtype."""

    source: TensorRef
    to: str

    @property
    def dtype_name(self) -> str:
        return self.to

    def _take(self, box: Box) -> torch.Tensor:
        return self.source.read(as_slices(box)).to(self.dtype)


@dataclass(frozen=True)
class Narrowed(Cast):
    """A cast that keeps count of the finite values, in all parts read so far, that are too large for the dtype."""

    name: str
    infinite: dict[tuple[tuple[int, int], ...], int] = field(default_factory=dict, compare=False, repr=False)

    def _take(self, box: Box) -> torch.Tensor:
        value = self.source.read(as_slices(box))
        result = value.to(self.dtype)
        where = result.isinf()
        if bool(where.any()) and (count := int((where & value.isfinite()).sum())):
            self.infinite[tuple(box)] = count
        return result


@dataclass
class RoundingProbe(Wrapper):
    """A master that is read beside its weight and notes whether the weight is its rounding."""

    source: TensorRef
    weight: TensorRef
    rounds: bool = True

    @property
    def sources(self) -> tuple[TensorRef, ...]:  # type: ignore[override]
        return self.source, self.weight

    def _take(self, box: Box) -> torch.Tensor:
        slices = as_slices(box)
        value = self.source.read(slices)
        if self.rounds and not same_bits(value.to(self.weight.dtype), self.weight.read(slices)):
            self.rounds = False
        return value


def flat(source: TensorRef) -> TensorRef:
    """`Flattened`, or the vector that the tensor is made of."""
    if isinstance(source, Shaped):
        return source.source
    return source if len(source.shape) == 1 else Flattened(source)


def part(source: TensorRef, start: int, stop: int, dim: int = 0) -> TensorRef:
    """`Part`, or the source itself when that is all of it."""
    return source if (start, stop) == (0, source.shape[dim]) else Part(source, start, stop, dim)


def join(sources: Sequence[TensorRef], dim: int = 0) -> TensorRef:
    """`Joined`, or the source itself when there is only one. Raises CheckpointError for shapes that do not fit."""
    if len(sources) == 1:
        return sources[0]
    shapes = [tuple(source.shape) for source in sources]
    if min(map(len, shapes)) <= dim or len({shape[:dim] + shape[dim + 1 :] for shape in shapes}) > 1:
        raise CheckpointError(
            f"tensors of shapes {', '.join(str(list(shape)) for shape in shapes)} cannot be parts of one"
        )
    return Joined(tuple(sources), dim)
