"""Lazy tensors made of other lazy tensors: parts, joins, permutations and combinations, read piece by piece.

Every class here is a `TensorRef`: a slice of it reads only what that slice needs of its sources.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, Literal

from castalia.checkpoint.tensors import Slices, TensorRef, Typed, name_of
from castalia.errors import CheckpointError

if TYPE_CHECKING:
    import torch

CHUNK_ELEMENTS = 1 << 22


def bounds(shape: Sequence[int], slices: Slices | None) -> list[tuple[int, int]]:
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


@dataclass(frozen=True, eq=False)
class Held(Typed):
    """A tensor that is in memory already. Equal is only the very same one."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype_name(self) -> str:
        return name_of(self.tensor.dtype)

    def read(self, slices: Slices | None = None) -> torch.Tensor:
        import torch

        box = bounds(self.shape, slices)
        return self.tensor[tuple(slice(*pair) for pair in box)].clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Part(Typed):
    """`source[..., start:stop, ...]` along one dimension."""

    source: TensorRef
    start: int
    stop: int
    dim: int = 0

    @cached_property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.source.shape)
        shape[self.dim] = self.stop - self.start
        return tuple(shape)

    @property
    def dtype_name(self) -> str:
        return self.source.dtype_name

    def read(self, slices: Slices | None = None) -> torch.Tensor:
        box = bounds(self.shape, slices)
        first, last = box[self.dim]
        box[self.dim] = (self.start + first, self.start + last)
        return self.source.read([slice(*pair) for pair in box])


@dataclass(frozen=True)
class Joined(Typed):
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

    def read(self, slices: Slices | None = None) -> torch.Tensor:
        import torch

        box = bounds(self.shape, slices)
        lengths = [stop - start for start, stop in box]
        first, last = box[self.dim]
        result = None
        index = bisect_right(self.ends, first)  # of the first source that reaches beyond `first`
        while first < last and index < len(self.sources):
            begin, end = self.ends[index - 1] if index else 0, self.ends[index]
            start, stop = max(first, begin), min(last, end)
            if start >= last:
                break
            if start < stop:
                box[self.dim] = (start - begin, stop - begin)
                piece = self.sources[index].read([slice(*pair) for pair in box])
                if stop - start == last - first:
                    return piece
                result = torch.empty(lengths, dtype=self.dtype) if result is None else result
                result.narrow(self.dim, start - first, stop - start).copy_(piece)
            index += 1
        return torch.empty(lengths, dtype=self.dtype) if result is None else result


@dataclass(frozen=True)
class Permuted(Typed):
    """Rows seen as a grid of shape `view` (its product is the number of rows), with the grid's axes put in `order`."""

    source: TensorRef
    view: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.source.shape)

    @property
    def dtype_name(self) -> str:
        return self.source.dtype_name

    def read(self, slices: Slices | None = None) -> torch.Tensor:
        import torch

        box = bounds(self.shape, slices)
        rows = torch.arange(prod(self.view)).view(self.view).permute(self.order).flatten()[slice(*box[0])]
        if rows.numel() == 0:
            return torch.empty([stop - start for start, stop in box], dtype=self.dtype)
        low, high = int(rows.min()), int(rows.max()) + 1
        return self.source.read([slice(low, high), *(slice(*pair) for pair in box[1:])])[rows - low]


@dataclass(frozen=True)
class Transposed(Typed):
    source: TensorRef

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(reversed(self.source.shape))

    @property
    def dtype_name(self) -> str:
        return self.source.dtype_name

    def read(self, slices: Slices | None = None) -> torch.Tensor:
        box = reversed(bounds(self.shape, slices))
        return self.source.read([slice(*pair) for pair in box]).t().contiguous()


@dataclass(frozen=True)
class Combined(Typed):
    """Sum or mean of equally shaped sources, computed in fp64: replicas that agree give their own bits back."""

    sources: tuple[TensorRef, ...]
    how: Literal["sum", "mean"]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.sources[0].shape)

    @property
    def dtype_name(self) -> str:
        return self.sources[0].dtype_name

    def read(self, slices: Slices | None = None) -> torch.Tensor:
        total = self.sources[0].read(slices).double()
        for source in self.sources[1:]:
            total += source.read(slices)
        return (total / len(self.sources) if self.how == "mean" else total).to(self.dtype)

    def drift(self) -> float:
        """Largest difference between any source and the first one."""
        first = self.sources[0].read().double()
        return max(((source.read() - first).abs().max().item() for source in self.sources[1:]), default=0.0)


@dataclass(frozen=True)
class Scaled(Typed):
    source: TensorRef
    divisor: int
    factor: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.source.shape)

    @property
    def dtype_name(self) -> str:
        return self.source.dtype_name

    def read(self, slices: Slices | None = None) -> torch.Tensor:
        return (self.source.read(slices).double() * self.factor / self.divisor).to(self.dtype)


@dataclass(frozen=True)
class Adapted(Typed):
    """The source plus scale * B A, in fp32. Computed in fp64, so that a part has the bits that it has in the whole."""

    source: TensorRef
    a: TensorRef  # [rank, in]
    b: TensorRef  # [out, rank]
    scale: float
    dtype_name: str = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.source.shape)

    def read(self, slices: Slices | None = None) -> torch.Tensor:
        rows, columns = (slice(*pair) for pair in bounds(self.shape, slices))
        change = self.b.read([rows]).double() @ self.a.read([slice(None), columns]).double()
        return (self.source.read([rows, columns]).double() + change * self.scale).float()


@dataclass(frozen=True)
class Padded(Typed):
    """The source with rows of zeros added at the end."""

    source: TensorRef
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.source.shape[1:])

    @property
    def dtype_name(self) -> str:
        return self.source.dtype_name

    def read(self, slices: Slices | None = None) -> torch.Tensor:
        import torch

        box = bounds(self.shape, slices)
        start, stop = box[0]
        result = torch.zeros([last - first for first, last in box], dtype=self.dtype)
        held = min(stop, self.source.shape[0])
        if start < held:
            rest = [slice(*pair) for pair in box[1:]]
            result[: held - start] = self.source.read([slice(start, held), *rest])
        return result


@dataclass(frozen=True)
class Shaped(Typed):
    """A vector seen as a tensor of another shape. Rows are read in chunks, so that narrow columns stay cheap."""

    vector: TensorRef
    shape: tuple[int, ...]

    @property
    def dtype_name(self) -> str:
        return self.vector.dtype_name

    def read(self, slices: Slices | None = None) -> torch.Tensor:
        import torch

        box = bounds(self.shape, slices)
        lengths = [stop - start for start, stop in box]
        row = prod(self.shape[1:]) if self.shape else 1
        first, last = box[0] if box else (0, 1)
        if lengths[1:] == list(self.shape[1:]):
            return self.vector.read([slice(first * row, last * row)]).view(lengths)
        result = torch.empty(lengths, dtype=self.dtype)
        step = max(1, CHUNK_ELEMENTS // max(row, 1))
        for start in range(first, last, step):
            stop = min(start + step, last)
            rows = self.vector.read([slice(start * row, stop * row)]).view(stop - start, *self.shape[1:])
            result[start - first : stop - first] = rows[(slice(None), *(slice(*pair) for pair in box[1:]))]
        return result


@dataclass(frozen=True)
class Flattened(Typed):
    """A tensor seen as a vector, in row-major order. Reads the whole rows in which lies what is asked for."""

    source: TensorRef

    @property
    def shape(self) -> tuple[int, ...]:
        return (prod(self.source.shape),)

    @property
    def dtype_name(self) -> str:
        return self.source.dtype_name

    def read(self, slices: Slices | None = None) -> torch.Tensor:
        ((start, stop),) = bounds(self.shape, slices)
        row = max(1, prod(self.source.shape[1:]))
        first = start // row
        rows = self.source.read([slice(first, -(-stop // row))] if self.source.shape else None)
        return rows.reshape(-1)[start - first * row : stop - first * row]


@dataclass(frozen=True)
class Cast(Typed):
    """The source in another dtype."""

    source: TensorRef
    dtype_name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.source.shape)

    def read(self, slices: Slices | None = None) -> torch.Tensor:
        return self.source.read(slices).to(self.dtype)


@dataclass(frozen=True)
class Narrowed(Cast):
    """A cast that keeps count of the finite values, in all parts read so far, that are too large for the dtype."""

    name: str
    infinite: dict[tuple[tuple[int, int], ...], int] = field(default_factory=dict, compare=False, repr=False)

    def read(self, slices: Slices | None = None) -> torch.Tensor:
        value = self.source.read(slices)
        result = value.to(self.dtype)
        where = result.isinf()
        if bool(where.any()) and (count := int((where & value.isfinite()).sum())):
            self.infinite[tuple(bounds(self.shape, slices))] = count
        return result


@dataclass(frozen=True)
class Zeros(Typed):
    shape: tuple[int, ...]
    dtype_name: str = "float32"

    def read(self, slices: Slices | None = None) -> torch.Tensor:
        import torch

        return torch.zeros([stop - start for start, stop in bounds(self.shape, slices)], dtype=self.dtype)


def flat(source: TensorRef) -> TensorRef:
    """`Flattened`, or the vector that the tensor is made of."""
    if isinstance(source, Shaped):
        return source.vector
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
