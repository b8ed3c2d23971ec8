"""Lazy tensors, which are read piece by piece: what all of them can do, and those that lie in memory.

Reading a slice reads only what the slice needs of the sources. A weight of a checkpoint may be such a tree:

    Cast bf16                              read([0:2, :])
      Joined along rows                      asks the first source alone
        Part of a FileTensor, rank 0's         reads its first two rows
        Part of a FileTensor, rank 1's

Tensors in files are in `extent`, those computed from others in `derived`. Every class is a `TensorRef` and lists its
`sources`, so that one can find out what lies below it without knowing the classes. A box is a part of a tensor as
(start, stop) for each dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

Slices = Sequence[slice]
Box = list[tuple[int, int]]  # first and one-past-last index of each dimension
ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1,
    "bool": 1,
}  # fmt: skip
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
