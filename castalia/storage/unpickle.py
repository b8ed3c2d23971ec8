"""A pickle reader that cannot run code.

A pickle is a program for a stack machine. This is such a machine, rather than a restricted `pickle.Unpickler`: it has
instructions that build plain containers and that look names up in the table `GLOBALS`, but none that import, call or
set attributes of real objects. A name outside the table is refused where it is mentioned. Tensors become what the
caller's storage objects make of them; instances of other programs' classes become `Inert`. Source: Python's
`pickletools`, which documents every instruction. A subclass of `pickle._Unpickler` would be
shorter, but that class is private, and it calls and sets attributes unless each instruction that does is overridden.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from castalia.errors import CheckpointError
from castalia.storage.lazy import ITEM_BYTES

Buffer = Any  # bytes or mmap: indexing gives ints, slicing gives bytes
MAX_COPIED_ITEMS = 1 << 26  # by constructors: a small pickle could copy one long list over and over
DAMAGE = (IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError, struct.error)


class Storage(Protocol):
    """The bytes of one or more tensors, which a pickle refers to by a persistent id."""

    def tensor(self, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: str | None) -> object:
        """A tensor in these bytes. Offset and strides count elements; `dtype` None: the storage's own."""
        ...


@dataclass
class Inert:
    """An instance of another program's class: the class's name, the constructor's arguments and the attributes."""

    name: str
    args: tuple = ()
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def value(self) -> Any:
        """The number or text of an enum member."""
        return self.args[0]


@dataclass(frozen=True)
class Global:
    """A permitted name, and the function that stands for calling it."""

    name: str
    build: Callable[..., Any]


def _tensor(storage: Storage, offset: int, shape: Sequence, stride: Sequence, *rest: Any) -> object:
    return storage.tensor(offset, tuple(shape), tuple(stride), None)


def _tensor_v3(storage: Storage, offset: int, shape: Sequence, stride: Sequence, *rest: Any) -> object:
    return storage.tensor(offset, tuple(shape), tuple(stride), rest[2])  # rest: requires_grad, hooks, dtype


def _from_type(rebuild: Global, cls: object, args: tuple, state: object) -> object:
    return rebuild.build(*args)  # as a plain tensor, without its class and attributes


def _ordered(items: Sequence = ()) -> dict:
    return {_key(name): value for name, value in items}


def _encoded(text: str, encoding: str) -> bytes:
    if encoding != "latin1":  # protocol 2 has no bytes; Python writes them as text of this encoding
        raise ValueError(f"bytes encoded as {encoding}")
    return text.encode(encoding)


INERT_CLASSES = (
    "argparse.Namespace",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "megatron.enums.AttnMaskType",
    "megatron.enums.AttnType",
    "megatron.enums.LayerType",
    "megatron.enums.PositionEmbeddingType",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
)
STORAGE_DTYPES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64", "Int": "int32",
    "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool", "Untyped": "uint8",
}  # fmt: skip


def _table() -> dict[str, Any]:
    table: dict[str, Any] = {f"torch.{name}": name for name in ITEM_BYTES}  # dtypes, such as torch.float32
    for module in ("torch", "torch.cuda", "torch.storage"):
        table |= {f"{module}.{name}Storage": dtype for name, dtype in STORAGE_DTYPES.items()}
    builders: dict[str, Callable[..., Any]] = {
        "collections.OrderedDict": _ordered,
        "torch.Size": lambda sizes=(): tuple(sizes),
        "torch._utils._rebuild_tensor": _tensor,
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_tensor_v3": _tensor_v3,
        "torch._utils._rebuild_parameter": lambda tensor, *rest: tensor,
        "torch._tensor._rebuild_from_type_v2": _from_type,
        "_codecs.encode": _encoded,
        "__builtin__.set": lambda items=(): {_key(item) for item in items},
        "builtins.set": lambda items=(): {_key(item) for item in items},
    }
    builders |= {name: lambda *args, name=name: Inert(name, args) for name in INERT_CLASSES}
    return table | {name: Global(name, build) for name, build in builders.items()}


GLOBALS: Mapping[str, Any] = _table()


class _Mark:
    """The type of `MARK`, which pickles put on the stack before the items of a container."""


MARK = _Mark()


def unpickle(data: Buffer, where: str, storage: Callable[[Sequence], Storage], start: int = 0) -> tuple[Any, int]:
    """The object pickled at `data[start:]` and the position after it.

    `where` names the file in errors; `storage` turns a persistent id into a storage. OrderedDicts become dicts.
    Raises CheckpointError for names outside the table and for damaged data.
    """
    machine = _Machine(data, start, where, storage)
    try:
        return machine.run(), machine.at
    except DAMAGE as error:
        raise CheckpointError(
            f"{where}: damaged or not a checkpoint: the pickle cannot be read at byte {machine.at} ({error})"
        ) from error


def _key(key: Any) -> Any:
    """Keys of dicts and members of sets: only plain values, so that hashing them is cheap and runs no code."""
    if key is not None and type(key) not in (str, int, float, bool, bytes):
        raise TypeError(f"a key of type {type(key).__name__}")
    return key


class _Machine:
    """The stack machine. Each method without a leading underscore is an instruction, or a step of one."""

    def __init__(self, data: Buffer, start: int, where: str, storage: Callable[[Sequence], Storage]):
        self.data, self.at, self.where, self.storage = data, start, where, storage
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0

    def run(self) -> Any:
        """Run instructions up to STOP. Returns the one object that is then on the stack."""
        data, step = self.data, STEPS
        while (code := data[self.at]) != STOP:
            self.at += 1
            action = step.get(code)
            if action is None:
                raise CheckpointError(f"{self.where}: refused: the pickle uses instruction {bytes([code])!r}")
            action(self)
        self.at += 1
        (result,) = self.stack  # ValueError, as other damage, unless there is exactly one
        return result

    def take(self, count: int) -> bytes:
        """The next `count` bytes. Raises IndexError beyond the end."""
        result = self.data[self.at : self.at + count]
        if len(result) != count:
            raise IndexError("truncated")
        self.at += count
        return result

    def byte(self) -> int:
        """The next byte."""
        result = self.data[self.at]
        self.at += 1
        return result

    def number(self, layout: struct.Struct) -> Any:
        """The next number, in this layout."""
        return layout.unpack(self.take(layout.size))[0]

    def line(self) -> bytes:
        """The bytes up to the next newline. Raises IndexError without one."""
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise IndexError("truncated")
        result = self.data[self.at : end]
        self.at = end + 1
        return result

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    def pop_to_mark(self) -> list[Any]:
        """Take all values above the last mark, and the mark. Raises IndexError without one."""
        stack = self.stack
        for position in range(len(stack) - 1, -1, -1):
            if stack[position] is MARK:
                items = stack[position + 1 :]
                del stack[position:]
                return items
        raise IndexError("no mark")

    def find(self, module: str, name: str) -> None:
        """GLOBAL: push what a name stands for. Raises CheckpointError for names outside the table."""
        full = f"{module}.{name}"
        if full not in GLOBALS:
            raise CheckpointError(
                f"{self.where}: refused: the pickle asks for {full}, which no checkpoint needs and which could run "
                "code. Nothing of it was run. Get the file from a source that you trust, without this object in it."
            )
        self.push(GLOBALS[full])

    def stack_global(self) -> None:
        """STACK_GLOBAL: as `find`, with module and name from the stack."""
        name, module = self.stack.pop(), self.stack.pop()
        self.find(str(module), str(name))

    def build(self, target: Any, args: Sequence) -> None:
        """Push what a permitted name makes of these arguments. Raises CheckpointError if they copy too much."""
        if not isinstance(target, Global):
            raise TypeError(f"a call of {type(target).__name__}")
        # Constructors copy what they are given, which the pickle's size does not bound.
        self.copied += sum(len(arg) for arg in args if isinstance(arg, (str, bytes, list, tuple, set, dict)))
        if self.copied > MAX_COPIED_ITEMS:
            raise CheckpointError(f"{self.where}: refused: unpacking the pickle would fill the memory")
        self.push(target.build(*args))

    def reduce(self) -> None:
        """REDUCE and NEWOBJ: call with arguments from the stack."""
        args = self.stack.pop()
        self.build(self.stack.pop(), args)

    def set_state(self) -> None:
        """BUILD: set the attributes of an `Inert`. Plain dicts, which OrderedDicts become, ignore theirs."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Inert) and isinstance(state, dict):
            target.fields.update(state)
        elif not isinstance(target, (Inert, dict)):
            raise TypeError(f"state for {type(target).__name__}")

    def old_instance(self) -> None:
        """INST: call a name in the text with the arguments above the mark."""
        self.find(self.line().decode(), self.line().decode())
        target = self.stack.pop()
        self.build(target, self.pop_to_mark())

    def old_object(self) -> None:
        """OBJ: call the first value above the mark with the others."""
        target, *args = self.pop_to_mark()
        self.build(target, args)

    def extend(self, items: Sequence) -> None:
        """APPEND and APPENDS: add items to the list on the stack."""
        target = self.stack[-1]
        if type(target) is not list:
            raise TypeError(f"items for {type(target).__name__}")
        target.extend(items)

    def update(self, items: Sequence) -> None:
        """SETITEM and SETITEMS: add keys and values, one after another, to the dict on the stack."""
        target = self.stack[-1]
        if type(target) is not dict:
            raise TypeError(f"items for {type(target).__name__}")
        target.update(_pairs(items))

    def add(self, items: Sequence) -> None:
        """ADDITEMS: add members to the set on the stack."""
        target = self.stack[-1]
        if type(target) is not set:
            raise TypeError(f"members for {type(target).__name__}")
        target.update(_key(item) for item in items)

    def put(self, index: int) -> None:
        """PUT and MEMOIZE: remember the value on the stack by number."""
        self.memo[index] = self.stack[-1]

    def wrap(self, count: int) -> None:
        """TUPLE1 to TUPLE3: make a tuple of the last values."""
        items = tuple(self.stack[len(self.stack) - count :])
        if len(items) != count:
            raise IndexError("empty stack")
        del self.stack[len(self.stack) - count :]
        self.push(items)

    def set_item(self) -> None:
        """SETITEM: add one key and value from the stack."""
        value, key = self.stack.pop(), self.stack.pop()
        self.update((key, value))

    def pop(self) -> None:
        """POP: drop the last value."""
        self.stack.pop()

    def drop_to_mark(self) -> None:
        """POP_MARK: drop all values above the mark."""
        self.pop_to_mark()

    def skip(self, count: int) -> None:
        """Ignore bytes that change nothing: the protocol's number, a frame's length."""
        self.take(count)


def _pairs(items: Sequence) -> dict:
    if len(items) % 2:
        raise ValueError("a key without a value")
    return {_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)}


def _integer(text: bytes) -> int | bool:
    # In protocol 0 True is I01, False is I00, and a long integer ends with L.
    return text == b"01" if text in (b"00", b"01") else int(text.rstrip(b"L"))


U2, U4, U8 = (struct.Struct("<" + code) for code in "HIQ")
I4, F8 = struct.Struct("<i"), struct.Struct(">d")
STOP = ord(".")
# What is not here is refused: extension codes, buffers outside of the file, calls with keyword arguments.
STEPS: dict[int, Callable[[_Machine], None]] = {
    ord(code): action
    for code, action in {
        "\x80": lambda m: m.skip(1),  # protocol number
        "\x95": lambda m: m.skip(8),  # frame length
        "(": lambda m: m.push(MARK),
        "0": _Machine.pop,
        "1": _Machine.drop_to_mark,
        "2": lambda m: m.push(m.stack[-1]),
        "N": lambda m: m.push(None),
        "\x88": lambda m: m.push(True),
        "\x89": lambda m: m.push(False),
        "I": lambda m: m.push(_integer(m.line())),
        "J": lambda m: m.push(m.number(I4)),
        "K": lambda m: m.push(m.byte()),
        "M": lambda m: m.push(m.number(U2)),
        "L": lambda m: m.push(_integer(m.line())),
        "\x8a": lambda m: m.push(int.from_bytes(m.take(m.byte()), "little", signed=True)),
        "\x8b": lambda m: m.push(int.from_bytes(m.take(m.number(I4)), "little", signed=True)),
        "F": lambda m: m.push(float(m.line())),
        "G": lambda m: m.push(m.number(F8)),
        "S": lambda m: m.push(m.line().strip(b"'\"").decode("latin1")),
        "T": lambda m: m.push(m.take(m.number(I4)).decode("latin1")),
        "U": lambda m: m.push(m.take(m.byte()).decode("latin1")),
        "V": lambda m: m.push(m.line().decode("raw-unicode-escape")),
        "X": lambda m: m.push(m.take(m.number(U4)).decode("utf-8", "surrogatepass")),
        "\x8c": lambda m: m.push(m.take(m.byte()).decode("utf-8", "surrogatepass")),
        "\x8d": lambda m: m.push(m.take(m.number(U8)).decode("utf-8", "surrogatepass")),
        "B": lambda m: m.push(m.take(m.number(U4))),
        "C": lambda m: m.push(m.take(m.byte())),
        "\x8e": lambda m: m.push(m.take(m.number(U8))),
        "]": lambda m: m.push([]),
        "a": lambda m: m.extend([m.stack.pop()]),
        "e": lambda m: m.extend(m.pop_to_mark()),
        "l": lambda m: m.push(m.pop_to_mark()),
        ")": lambda m: m.push(()),
        "t": lambda m: m.push(tuple(m.pop_to_mark())),
        "\x85": lambda m: m.wrap(1),
        "\x86": lambda m: m.wrap(2),
        "\x87": lambda m: m.wrap(3),
        "}": lambda m: m.push({}),
        "d": lambda m: m.push(_pairs(m.pop_to_mark())),
        "s": _Machine.set_item,
        "u": lambda m: m.update(m.pop_to_mark()),
        "\x8f": lambda m: m.push(set()),
        "\x90": lambda m: m.add(m.pop_to_mark()),
        "\x91": lambda m: m.push({_key(item) for item in m.pop_to_mark()}),
        "c": lambda m: m.find(m.line().decode(), m.line().decode()),
        "\x93": _Machine.stack_global,
        "R": _Machine.reduce,
        "\x81": _Machine.reduce,  # NEWOBJ: a class and its arguments
        "b": _Machine.set_state,
        "i": _Machine.old_instance,
        "o": _Machine.old_object,
        "p": lambda m: m.put(int(m.line())),
        "q": lambda m: m.put(m.byte()),
        "r": lambda m: m.put(m.number(U4)),
        "\x94": lambda m: m.put(len(m.memo)),  # MEMOIZE: the next free number
        "g": lambda m: m.push(m.memo[int(m.line())]),
        "h": lambda m: m.push(m.memo[m.byte()]),
        "j": lambda m: m.push(m.memo[m.number(U4)]),
        "Q": lambda m: m.push(m.storage(m.stack.pop())),
    }.items()
}
