"""Write files that `torch.load` opens, tensor by tensor: only small values and pieces of tensors are in memory.

A value may consist of plain Python, `TensorRef`s, which become tensors, torch dtypes, `Size`, `Named` (an OrderedDict)
and `Instance`s, which become objects of other programs' classes. These classes are named in the file, never imported.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from castalia.bars import Tally, unseen
from castalia.storage.extent import row_major
from castalia.storage.lazy import TensorRef, as_bytes
from castalia.storage.torch_zip import StoredZip
from castalia.storage.unpickle import STORAGE_DTYPES

STORAGES = {dtype: name for name, dtype in STORAGE_DTYPES.items() if name != "Untyped"}


class Named(dict):
    """A dict that becomes an OrderedDict."""


class Size(tuple):
    """A tuple that becomes a torch.Size."""


@dataclass(frozen=True)
class Instance:
    """An object of the class with this dotted name: made from `args`, as enum members are, or with these attributes."""

    name: str
    args: tuple | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


class PtFile:
    """A file to be written as `torch.save` writes it. The value is pickled at once; tensors are read by `write`."""

    def __init__(self, value: Any) -> None:
        self._pickler = _Pickler(value)
        self.tensors = self._pickler.tensors

    @property
    def num_bytes(self) -> int:
        """The size of all tensors; the rest of the file is small and not counted."""
        return sum(ref.num_bytes for ref in self.tensors)

    def write(self, path: Path, title: str, advance: Tally) -> None:
        """Write the file. `title`: the folder inside the archive, by custom the file's name without its ending."""
        with open(path, "wb") as file:
            archive = StoredZip(file)

            def add_small(name: str, content: bytes) -> None:
                """Add a member whose bytes do not count as progress."""
                archive.add(f"{title}/{name}", len(content), [memoryview(content)], unseen)

            # The order of torch's own writer.
            add_small("data.pkl", self._pickler.content)
            add_small("byteorder", b"little")
            for key, ref in enumerate(self.tensors):
                archive.add(f"{title}/data/{key}", ref.num_bytes, map(as_bytes, ref.pieces()), advance)
            add_small("version", b"3\n")
            archive.finish()


class _Pickler:
    """A value in pickle protocol 2, with a persistent id for the storage of each tensor, as torch has it."""

    def __init__(self, value: Any):
        self.out = bytearray(pickle.PROTO + b"\x02")
        self.refs: list[TensorRef] = []
        self.put(value)
        self.content = bytes(self.out + pickle.STOP)
        self.tensors = tuple(self.refs)

    def put(self, value: Any) -> None:
        """Append the instructions that build a value. Raises TypeError for types that are not listed above."""
        kind = type(value)
        if value is None:
            self.out += pickle.NONE
        elif kind is bool:
            self.out += pickle.NEWTRUE if value else pickle.NEWFALSE
        elif kind is int:
            self._integer(value)
        elif kind is float:
            self.out += pickle.BINFLOAT + struct.pack(">d", value)  # big-endian, unlike all other numbers
        elif kind is str:
            text = value.encode()
            self.out += pickle.BINUNICODE + struct.pack("<I", len(text)) + text
        elif kind is torch.dtype:
            self._name(str(value))
        elif kind is list:
            self.out += pickle.EMPTY_LIST
            self._sequence(value, pickle.APPENDS)
        elif kind is dict:
            self.out += pickle.EMPTY_DICT
            self._items(value)
        elif kind is Named:
            self._call("collections.OrderedDict", ())
            self._items(value)
        elif kind is set:
            # Protocol 2 names modules as Python 2 did. Sorted, a set gives the same bytes each time.
            self._call("__builtin__.set", (sorted(value),))
        elif kind is Size:
            self._call("torch.Size", (tuple(value),))
        elif kind is tuple:
            self._tuple(value)
        elif kind is Instance:
            self._instance(value)
        elif isinstance(value, TensorRef):
            self._tensor(value)
        else:
            raise TypeError(f"a {kind.__name__} cannot be written")

    def _integer(self, value: int) -> None:
        if -(2**31) <= value < 2**31:
            self.out += pickle.BININT + struct.pack("<i", value)
        else:
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)  # + 1: room for the sign
            self.out += pickle.LONG1 + bytes([len(data)]) + data

    def _name(self, dotted: str) -> None:
        module, _, name = dotted.rpartition(".")
        self.out += pickle.GLOBAL + f"{module}\n{name}\n".encode()

    def _sequence(self, values: Iterable[Any], code: bytes) -> None:
        self.out += pickle.MARK
        for value in values:
            self.put(value)
        self.out += code

    def _tuple(self, values: tuple) -> None:
        if values:
            self._sequence(values, pickle.TUPLE)
        else:
            self.out += pickle.EMPTY_TUPLE

    def _items(self, values: Mapping) -> None:
        self._sequence((part for item in values.items() for part in item), pickle.SETITEMS)

    def _call(self, name: str, args: tuple) -> None:
        self._name(name)
        self._tuple(args)
        self.out += pickle.REDUCE

    def _instance(self, value: Instance) -> None:
        if value.args is not None:
            self._call(value.name, value.args)
            return
        self._name(value.name)
        self.out += pickle.EMPTY_TUPLE + pickle.NEWOBJ
        self.put(dict(value.fields))
        self.out += pickle.BUILD

    def _tensor(self, ref: TensorRef) -> None:
        shape = tuple(ref.shape)
        # _rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks); each tensor has its own storage.
        self._name("torch._utils._rebuild_tensor_v2")
        self.out += pickle.MARK + pickle.MARK
        self.put("storage")
        self._name(f"torch.{STORAGES[ref.dtype_name]}Storage")
        storage: tuple[Any, ...] = (str(len(self.refs)), "cpu", prod(shape))
        for part in storage:
            self.put(part)
        self.out += pickle.TUPLE + pickle.BINPERSID
        view = (0, shape, row_major(shape), False, Named())  # offset, shape, strides, requires_grad, hooks
        for part in view:
            self.put(part)
        self.out += pickle.TUPLE + pickle.REDUCE
        self.refs.append(ref)
