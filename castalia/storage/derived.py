"""Lazy tensors that are computed from others: parts, joins, rows in another order, casts.

Each reads of its sources no more than what it needs for the box that is asked of it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, Literal

from castalia.errors import CheckpointError
from castalia.storage.lazy import ITEM_BYTES, Box, ByteRun, TensorRef, as_slices, same_bits, sizes

if TYPE_CHECKING:
    import torch

CHUNK_ELEMENTS = 1 << 22  # of a vector that are read at once to take some columns from them


class Wrapper(TensorRef):
    """A tensor computed from one other, `source`. It has its shape and dtype unless the class says otherwise."""

    if TYPE_CHECKING:
        source: TensorRef

    @property
    def sources(self) -> tuple[TensorRef, ...]:  # type: ignore[override]
        """See `TensorRef`."""
        return (self.source,)

    @property
    def shape(self) -> tuple[int, ...]:
        """See `TensorRef`."""
        return tuple(self.source.shape)

    @property
    def dtype_name(self) -> str:
        """See `TensorRef`."""
        return self.source.dtype_name


@dataclass(frozen=True, repr=False)
class Part(Wrapper):
    """`source[..., start:stop, ...]` along one dimension."""

    source: TensorRef
    start: int
    stop: int
    dim: int = 0

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """See `TensorRef`."""
        shape = list(self.source.shape)
        shape[self.dim] = self.stop - self.start
        return tuple(shape)

    def runs(self) -> list[ByteRun]:
        """See `TensorRef`."""
        # Values for each index of the dimension. Exact for dimension 0; along others, a range of as many values.
        size = self.source.shape[self.dim]
        row = prod(self.source.shape) // size if size else 0
        return cut_runs(self.source.runs(), self.start * row, self.stop * row)

    def _inside(self, box: Box) -> list[slice]:
        """The slices of the source that a box of this part is."""
        first, last = box[self.dim]
        return as_slices([*box[: self.dim], (self.start + first, self.start + last), *box[self.dim + 1 :]])

    def _take(self, box: Box) -> torch.Tensor:
        return self.source.read(self._inside(box))

    def _fill(self, box: Box, out: torch.Tensor) -> None:
        self.source.read(self._inside(box), out)


def cut_runs(runs: Iterable[ByteRun], start: int, stop: int) -> list[ByteRun]:
    """The values from `start` to `stop`, counted through the runs one after another."""
    result, begin = [], 0
    for run in runs:
        first, last = max(start - begin, 0), min(stop - begin, run.count)
        if first < last:
            offset = run.offset + first * ITEM_BYTES[run.dtype_name]
            result.append(replace(run, offset=offset, count=last - first))
        begin += run.count
    return result


@dataclass(frozen=True, repr=False)
class Joined(TensorRef):
    """The sources concatenated along one dimension."""

    sources: tuple[TensorRef, ...]
    dim: int = 0

    @cached_property
    def ends(self) -> list[int]:
        """Where each source ends in the joined dimension."""
        return list(accumulate(source.shape[self.dim] for source in self.sources))

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """See `TensorRef`."""
        shape = list(self.sources[0].shape)
        shape[self.dim] = self.ends[-1]
        return tuple(shape)

    @property
    def dtype_name(self) -> str:
        """See `TensorRef`."""
        return self.sources[0].dtype_name

    def _parts(self, box: Box) -> Iterator[tuple[TensorRef, list[slice], int]]:
        """(source, its slices, where they begin in the box) for each source that overlaps the box."""
        first, last = box[self.dim]
        # The first source that ends beyond the box's start, and those after it.
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
        # One source alone is returned without copying it into a second tensor.
        return parts[0][0].read(parts[0][1]) if len(parts) == 1 else super()._take(box)

    def _fill(self, box: Box, out: torch.Tensor) -> None:
        for source, slices, start in self._parts(box):
            part = slices[self.dim]
            source.read(slices, out.narrow(self.dim, start, part.stop - part.start))


@dataclass(frozen=True, repr=False)
class Permuted(Wrapper):
    """The source with its rows seen as a grid of shape `view`, whose axes are put in `order`.

    The product of `view` is the number of rows. `castalia.checkpoint.rules.PermuteRows` has an example.
    """

    source: TensorRef
    view: tuple[int, ...]
    order: tuple[int, ...]

    def _take(self, box: Box) -> torch.Tensor:
        import torch

        # [number of rows]: row i of this tensor is row rows[i] of the source
        rows = torch.arange(prod(self.view)).view(self.view).permute(self.order).flatten()[slice(*box[0])]
        return _rows(self.source, rows, box)


@dataclass(frozen=True, repr=False)
class Reordered(Wrapper):
    """The source with row i taken from its row `order[i]`."""

    source: TensorRef
    order: torch.Tensor

    def _take(self, box: Box) -> torch.Tensor:
        return _rows(self.source, self.order[slice(*box[0])], box)


def _rows(source: TensorRef, rows: torch.Tensor, box: Box) -> torch.Tensor:
    """These rows of the source, cut to the box in the other dimensions.

    Reads all rows from the lowest to the highest, which is cheap where permutations are local.
    """
    import torch

    if rows.numel() == 0:
        return torch.empty(sizes(box), dtype=source.dtype)
    # One read of the whole range, from which the rows are picked in memory.
    low, high = int(rows.min()), int(rows.max()) + 1
    return source.read([slice(low, high), *as_slices(box[1:])])[rows - low]


@dataclass(frozen=True, repr=False)
class Transposed(Wrapper):
    """A matrix with rows and columns exchanged."""

    source: TensorRef

    @property
    def shape(self) -> tuple[int, ...]:
        """See `TensorRef`."""
        return tuple(reversed(self.source.shape))

    def _take(self, box: Box) -> torch.Tensor:
        return self.source.read(as_slices(box[::-1])).t().contiguous()


@dataclass(frozen=True, repr=False)
class Combined(TensorRef):
    """The sum or mean of sources of one shape, computed in fp64 so that the mean of equal copies has their bits."""

    sources: tuple[TensorRef, ...]
    how: Literal["sum", "mean"]

    @property
    def shape(self) -> tuple[int, ...]:
        """See `TensorRef`."""
        return tuple(self.sources[0].shape)

    @property
    def dtype_name(self) -> str:
        """See `TensorRef`."""
        return self.sources[0].dtype_name

    def _take(self, box: Box) -> torch.Tensor:
        slices = as_slices(box)
        total = self.sources[0].read(slices).double()
        for source in self.sources[1:]:
            total += source.read(slices)
        return (total / len(self.sources) if self.how == "mean" else total).to(self.dtype)

    def drift(self) -> float:
        """The largest absolute difference of any source from the first. Reads all of them."""
        first = self.sources[0].read().double()
        return max(((source.read() - first).abs().max().item() for source in self.sources[1:]), default=0.0)


@dataclass(frozen=True, repr=False)
class Weighted(TensorRef):
    """The sum of sources of one shape times their shares, computed in fp64, in fp32."""

    sources: tuple[TensorRef, ...]
    shares: tuple[float, ...]
    dtype_name = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        """See `TensorRef`."""
        return tuple(self.sources[0].shape)

    def _take(self, box: Box) -> torch.Tensor:
        slices = as_slices(box)
        total = self.sources[0].read(slices).double() * self.shares[0]
        for source, share in zip(self.sources[1:], self.shares[1:], strict=True):
            total += source.read(slices).double() * share
        return total.float()


@dataclass(frozen=True, repr=False)
class Scaled(Wrapper):
    """The source times `factor / divisor`, computed in fp64."""

    source: TensorRef
    divisor: int
    factor: int = 1

    def _take(self, box: Box) -> torch.Tensor:
        return (self.source.read(as_slices(box)).double() * self.factor / self.divisor).to(self.dtype)


@dataclass(frozen=True, repr=False)
class WithLora(TensorRef):
    """The source plus scale * B A, in fp32. Computed in fp64, so that a part has the same bits as in the whole."""

    source: TensorRef
    a: TensorRef  # [rank, in]
    b: TensorRef  # [out, rank]
    scale: float
    dtype_name = "float32"

    @property
    def sources(self) -> tuple[TensorRef, ...]:  # type: ignore[override]
        """See `TensorRef`."""
        return self.source, self.a, self.b

    @property
    def shape(self) -> tuple[int, ...]:
        """See `TensorRef`."""
        return tuple(self.source.shape)

    def runs(self) -> list[ByteRun]:
        """Those of the source, which has nearly all of the values."""
        return self.source.runs()

    def _take(self, box: Box) -> torch.Tensor:
        rows, columns = as_slices(box)
        # [rows, rank] @ [rank, columns]
        change = self.b.read([rows]).double() @ self.a.read([slice(None), columns]).double()
        return (self.source.read([rows, columns]).double() + change * self.scale).float()


@dataclass(frozen=True, repr=False)
class Padded(Wrapper):
    """The source with zeros added at its end, up to `rows` rows."""

    source: TensorRef
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        """See `TensorRef`."""
        return (self.rows, *self.source.shape[1:])

    def _fill(self, box: Box, out: torch.Tensor) -> None:
        start, stop = box[0]
        held = max(0, min(stop, self.source.shape[0]) - start)  # rows of the box that the source has
        if held:
            self.source.read([slice(start, start + held), *as_slices(box[1:])], out[:held])
        out[held:].zero_()


@dataclass(frozen=True, repr=False)
class Shaped(Wrapper):
    """A vector seen as a tensor of shape `view`. Reading some columns reads whole rows, a chunk at a time."""

    source: TensorRef
    view: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """See `TensorRef`."""
        return self.view

    def _take(self, box: Box) -> torch.Tensor:
        import torch

        lengths = sizes(box)
        row = prod(self.view[1:]) if self.view else 1  # elements of a row
        first, last = box[0] if box else (0, 1)
        if lengths[1:] == list(self.view[1:]):  # whole rows are consecutive in the vector
            return self.source.read([slice(first * row, last * row)]).view(lengths)
        result = torch.empty(lengths, dtype=self.dtype)
        step = max(1, CHUNK_ELEMENTS // max(row, 1))
        for start in range(first, last, step):
            stop = min(start + step, last)
            rows = self.source.read([slice(start * row, stop * row)]).view(stop - start, *self.view[1:])
            result[start - first : stop - first] = rows[(slice(None), *as_slices(box[1:]))]
        return result


@dataclass(frozen=True, repr=False)
class Flattened(Wrapper):
    """A tensor seen as a vector in row-major order. Reading a part reads the whole rows that it touches."""

    source: TensorRef

    @property
    def shape(self) -> tuple[int, ...]:
        """See `TensorRef`."""
        return (prod(self.source.shape),)

    def _take(self, box: Box) -> torch.Tensor:
        ((start, stop),) = box
        row = max(1, prod(self.source.shape[1:]))
        first = start // row  # the first row that is touched
        rows = self.source.read([slice(first, -(-stop // row))] if self.source.shape else None)
        return rows.reshape(-1)[start - first * row : stop - first * row]


@dataclass(frozen=True, repr=False)
class Cast(Wrapper):
    """The source in another dtype."""

    source: TensorRef
    to: str

    @property
    def dtype_name(self) -> str:
        """See `TensorRef`."""
        return self.to

    def _take(self, box: Box) -> torch.Tensor:
        return self.source.read(as_slices(box)).to(self.dtype)


@dataclass(frozen=True)
class Narrowed(Cast):
    """A cast that counts finite values which are too large for the dtype, in all boxes that have been read."""

    name: str
    infinite: dict[tuple[tuple[int, int], ...], int] = field(default_factory=dict, compare=False, repr=False)

    def _take(self, box: Box) -> torch.Tensor:
        value = self.source.read(as_slices(box))
        result = value.to(self.dtype)
        where = result.isinf()
        if bool(where.any()) and (count := int((where & value.isfinite()).sum())):
            self.infinite[tuple(box)] = count  # by box: a part that is read twice counts once
        return result


@dataclass
class RoundingProbe(Wrapper):
    """A master that is compared with its weight when it is read. `rounds`: whether the weight is the master rounded."""

    source: TensorRef
    weight: TensorRef
    rounds: bool = True

    @property
    def sources(self) -> tuple[TensorRef, ...]:  # type: ignore[override]
        """See `TensorRef`."""
        return self.source, self.weight

    def _take(self, box: Box) -> torch.Tensor:
        slices = as_slices(box)
        value = self.source.read(slices)
        # Once a difference is found, the weight need not be read any more.
        if self.rounds and not same_bits(value.to(self.weight.dtype), self.weight.read(slices)):
            self.rounds = False
        return value


def flat(source: TensorRef) -> TensorRef:
    """The tensor as a vector: `Flattened`, or the vector that it is a `Shaped` view of."""
    if isinstance(source, Shaped):
        return source.source
    return source if len(source.shape) == 1 else Flattened(source)


def float32(source: TensorRef) -> TensorRef:
    """The tensor in fp32: a `Cast`, or the source itself if it is in fp32."""
    return source if source.dtype_name == "float32" else Cast(source, "float32")


def part(source: TensorRef, start: int, stop: int, dim: int = 0) -> TensorRef:
    """`source[start:stop]` along a dimension: a `Part`, or the source itself if that is all of it."""
    return source if (start, stop) == (0, source.shape[dim]) else Part(source, start, stop, dim)


def join(sources: Sequence[TensorRef], dim: int = 0) -> TensorRef:
    """`Joined`, or the source itself if there is only one. Raises CheckpointError for shapes that do not fit."""
    if len(sources) == 1:
        return sources[0]
    shapes = [tuple(source.shape) for source in sources]
    if min(map(len, shapes)) <= dim or len({shape[:dim] + shape[dim + 1 :] for shape in shapes}) > 1:
        raise CheckpointError(
            f"tensors of shapes {', '.join(str(list(shape)) for shape in shapes)} cannot be parts of one"
        )
    return Joined(tuple(sources), dim)
