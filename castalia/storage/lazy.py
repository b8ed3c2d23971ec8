"""Lazy tensors: leaves in files or in memory, and operations on other lazy tensors. They are read piece by piece.

Reading a slice reads only what the slice needs of the sources. A weight of a checkpoint may be such a tree:

    Cast bf16                              read([0:2, :])
      Joined along rows                      asks the first source alone
        Part of a FileTensor, rank 0's         reads its first two rows
        Part of a FileTensor, rank 1's

Every class is a `TensorRef` and lists its `sources`, so that one can find out what lies below it without knowing the
classes. A box is a part of a tensor as (start, stop) for each dimension.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
CHUNK_ELEMENTS = 1 << 22  # of a vector that are read at once to take some columns from them
PIECE_BYTES = 4 << 20  # small enough for the processor's cache, and for the allocator to use the memory again


@dataclass(frozen=True)
class ByteRun:
    """Consecutive values of a tensor in a file."""

    path: Path
    offset: int  # of the first byte
    count: int
    dtype_name: str
    row: int  # values of a row; a run begins with a whole row

    @property
    def num_bytes(self) -> int:
        """The length in bytes."""
        return self.count * ITEM_BYTES[self.dtype_name]


class TensorRef:
    """A tensor that is read only when asked for. Opening and describing one does not import torch.

    A class defines `shape`, `dtype_name` (a key of `ITEM_BYTES`) and `_take`, which returns a new tensor, or `_fill`,
    which reads into an existing one. Each of the two has a default that uses the other.
    """

    if TYPE_CHECKING:  # at run time, dataclasses would take these for the defaults of their fields of the same names

        @property
        def sources(self) -> tuple[TensorRef, ...]:
            """The tensors that this one is computed from; empty for leaves."""

        @property
        def shape(self) -> tuple[int, ...]:
            """As of a torch tensor."""

        @property
        def dtype_name(self) -> str:
            """ "float32" for `torch.float32`: a key of `ITEM_BYTES`."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype as torch's own. Imports torch."""
        import torch

        return getattr(torch, self.dtype_name)

    @property
    def num_bytes(self) -> int:
        """The size of the tensor when it is read."""
        return prod(self.shape) * ITEM_BYTES[self.dtype_name]

    def read(self, slices: Slices | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor, or the part that the slices select, one for each dimension, as a new CPU tensor.

        `out`: a tensor of the part's shape, of any dtype and on any device, that is filled and returned instead. Raises
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

    def __repr__(self) -> str:
        return f"{self.dtype_name} {list(self.shape)}, not read"

    def __len__(self) -> int:
        """The size of the first dimension. Raises TypeError for a scalar."""
        if not self.shape:
            raise TypeError("a scalar has no length")
        return self.shape[0]

    def __bool__(self) -> bool:
        return True  # whatever its length: `ref or other` asks whether there is a tensor

    def __getitem__(self, index: Any) -> torch.Tensor:
        """A part, read now: whole numbers and slices with step 1, one for each of the first dimensions, or `...`."""
        given = index if isinstance(index, tuple) else (index,)
        if ... in given:
            at = given.index(...)
            given = given[:at] + (slice(None),) * (len(self.shape) - len(given) + 1) + given[at + 1 :]
        if len(given) > len(self.shape):
            raise IndexError(f"{len(given)} indices for a tensor of {len(self.shape)} dimensions")
        given += (slice(None),) * (len(self.shape) - len(given))
        box = []
        for part, size in zip(given, self.shape, strict=True):
            if isinstance(part, slice):
                start, stop, step = part.indices(size)
                if step != 1:
                    raise IndexError(f"slices have step 1 here, not {step}: read() the tensor first")
                box.append(slice(start, max(start, stop)))
            elif -size <= part < size:
                box.append(slice(part % size, part % size + 1))
            else:
                raise IndexError(f"index {part} is out of range for a dimension of {size}")
        part_read = self.read(box)
        return part_read[tuple(slice(None) if isinstance(part, slice) else 0 for part in given)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The values as NumPy has them; bfloat16, which it does not know, becomes float32."""
        values = self.read()
        array = (values.float() if self.dtype_name == "bfloat16" else values).numpy()
        return array if dtype is None else array.astype(dtype)

    def __dlpack__(self, **wanted: Any) -> Any:
        """The values for `torch.as_tensor`, which would take anything else that has a length for a list."""
        return self.read().__dlpack__(**wanted)

    def __dlpack_device__(self) -> tuple[int, int]:
        """The CPU, in DLPack's words."""
        return 1, 0

    def pieces(self, piece_bytes: int = PIECE_BYTES) -> Iterator[torch.Tensor]:
        """The tensor in row-major order, some rows at a time, of about `piece_bytes` each."""
        if not self.shape:
            yield self.read()
            return
        step = max(1, piece_bytes // max(1, prod(self.shape[1:]) * ITEM_BYTES[self.dtype_name]))
        for start in range(0, self.shape[0], step):
            yield self.read([slice(start, min(start + step, self.shape[0]))])

    def runs(self) -> list[ByteRun]:
        """The stored values that the tensor is made of, including copies on other ranks, in any order.

        Zeros and tensors in memory have none.
        """
        return [run for source in self.sources for run in source.runs()]

    def _take(self, box: Box) -> torch.Tensor:
        """The box as a new tensor."""
        import torch

        out = torch.empty([stop - start for start, stop in box], dtype=self.dtype)
        self._fill(box, out)
        return out

    def _fill(self, box: Box, out: torch.Tensor) -> None:
        """Read the box into a CPU tensor of the same dtype."""
        out.copy_(self._take(box))


class Leaf(TensorRef):
    """A tensor that is not computed from others."""

    sources = ()  # type: ignore[assignment]


def everything(tensors: Iterable[TensorRef]) -> Iterator[TensorRef]:
    """These tensors and all tensors below them, each once."""
    seen: set[int] = set()
    pending = list(tensors)
    while pending:
        ref = pending.pop()
        if id(ref) not in seen:
            seen.add(id(ref))
            pending += ref.sources
            yield ref


def leaves(tensors: Iterable[TensorRef]) -> Iterator[TensorRef]:
    """The leaves below these tensors, each once."""
    return (ref for ref in everything(tensors) if not ref.sources)


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype: "float32" for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without copying."""
    import torch

    # A tensor of one value counts as contiguous with any stride, which `view` would refuse.
    return tensor.detach().contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def as_integers(tensor: torch.Tensor) -> np.ndarray:
    """The bits of a CPU tensor as integers of the same size, without copying. NumPy has no bf16."""
    import torch

    return tensor.view(getattr(torch, f"int{8 * tensor.dtype.itemsize}")).numpy()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype have the same bits, so that NaN equals NaN, and 0.0 is not -0.0."""
    return np.array_equal(as_integers(a.contiguous()), as_integers(b.contiguous()))


def bounds(shape: Sequence[int], slices: Slices | None) -> Box:
    """The box that slices select. Missing slices select whole dimensions. Raises ValueError for steps other than 1."""
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
    """The slices that select a box."""
    return [slice(*pair) for pair in box]


def sizes(box: Box) -> list[int]:
    """The shape of a box."""
    return [stop - start for start, stop in box]


@dataclass(frozen=True, repr=False, eq=False)
class InMemory(Leaf):
    """A tensor that is in memory. Two of them are equal only if they are the same object."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """See `TensorRef`."""
        return tuple(self.tensor.shape)

    @property
    def dtype_name(self) -> str:
        """See `TensorRef`."""
        return name_of(self.tensor.dtype)

    def pieces(self, piece_bytes: int = PIECE_BYTES) -> Iterator[torch.Tensor]:
        """The tensor itself, which takes no further memory."""
        yield self.tensor.detach().contiguous()

    def _fill(self, box: Box, out: torch.Tensor) -> None:
        out.copy_(self.tensor.detach()[tuple(as_slices(box))])


@dataclass(frozen=True, repr=False)
class Zeros(Leaf):
    """A tensor of zeros that takes no memory."""

    shape: tuple[int, ...]
    dtype_name: str = "float32"

    def _fill(self, box: Box, out: torch.Tensor) -> None:
        out.zero_()


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
