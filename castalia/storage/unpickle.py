"""A pickle reader that cannot run code.

A pickle is a program for a stack machine. This is Python's own machine in Python, `pickle._Unpickler`, with the
instructions in `ALLOWED` alone: of those, Python's push plain values and build lists and tuples, and ours do whatever
looks names up, calls, or fills what is there already. Names are looked up in the table `GLOBALS`, nothing is imported,
and a name outside the table is refused where it is mentioned. Tensors become what the caller's storage objects make of
them; instances of other programs' classes become `Inert`. Source: Python's `pickletools`, which documents every
instruction. The class is private to Python; an instruction that it has under another name is refused.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from castalia.errors import CheckpointError
from castalia.storage.lazy import ITEM_BYTES

Buffer = Any  # bytes or mmap: indexing gives ints, slicing gives bytes
MAX_COPIED_ITEMS = 1 << 26  # by constructors: a small pickle could copy one long list over and over
DAMAGE = (
    IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError, struct.error, pickle.UnpicklingError,
)  # fmt: skip
_PythonsMachine: Any = pickle._Unpickler  # type: ignore[attr-defined]


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
    "accelerate.state.PartialState",
    "accelerate.utils.dataclasses.DistributedType",
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
    "torch.device",
    "torch.nn.parameter.Parameter",
    # training_args.bin of transformers and TRL
    "transformers.trainer_pt_utils.AcceleratorConfig",
    "transformers.trainer_utils.EvaluationStrategy",
    "transformers.trainer_utils.HubStrategy",
    "transformers.trainer_utils.IntervalStrategy",
    "transformers.trainer_utils.SaveStrategy",
    "transformers.trainer_utils.SchedulerType",
    "transformers.training_args.OptimizerNames",
    "transformers.training_args.TrainingArguments",
    "trl.trainer.dpo_config.DPOConfig",
    "trl.trainer.kto_config.KTOConfig",
    "trl.trainer.reward_config.RewardConfig",
    "trl.trainer.sft_config.SFTConfig",
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


def unpickle(data: Buffer, where: str, storage: Callable[[Sequence], Storage], start: int = 0) -> tuple[Any, int]:
    """The object pickled at `data[start:]` and the position after it.

    `where` names the file in errors; `storage` turns a persistent id into a storage. OrderedDicts become dicts.
    Raises CheckpointError for names outside the table and for damaged data.
    """
    reader = _Reader(data, start)
    machine = _Machine(reader, where, storage)
    try:
        value = machine.load()
        if machine.stack or machine.metastack:
            raise ValueError("more than one value")
    except DAMAGE as error:
        raise CheckpointError(
            f"{where}: damaged or not a checkpoint: the pickle cannot be read at byte {reader.at} ({error})"
        ) from error
    return value, reader.at


class _Reader:
    """Bytes as the file that Python's machine reads."""

    def __init__(self, data: Buffer, at: int):
        self.data, self.at = data, at

    def read(self, count: int) -> bytes:
        """The next `count` bytes. Raises IndexError beyond the end."""
        result = self.data[self.at : self.at + count]
        if len(result) != count:
            raise IndexError("truncated")
        self.at += count
        return result

    def readline(self) -> bytes:
        """The bytes up to and including the next newline. Raises IndexError without one."""
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise IndexError("truncated")
        return self.read(end + 1 - self.at)


class _Machine(_PythonsMachine):
    """Python's stack machine. Its methods `load_...` are the instructions."""

    def __init__(self, reader: _Reader, where: str, storage: Callable[[Sequence], Storage]):
        super().__init__(reader, encoding="latin1")
        self.where, self.persistent_load, self.copied = where, storage, 0

    def find_class(self, module: Any, name: Any) -> Any:
        """What a name stands for. Raises CheckpointError for names outside the table."""
        full = f"{module}.{name}"
        if full not in GLOBALS:
            raise CheckpointError(
                f"{self.where}: refused: the pickle asks for {full}, which no checkpoint needs and which could run "
                "code. Nothing of it was run. Get the file from a source that you trust, without this object in it."
            )
        return GLOBALS[full]

    def load_frame(self) -> None:
        """FRAME: ignore a frame's length, which is only of use for reading ahead."""
        self.read(8)

    def load_reduce(self) -> None:
        """REDUCE and NEWOBJ: call with arguments from the stack."""
        args = self.stack.pop()
        self._instantiate(self.stack.pop(), args)

    def _instantiate(self, target: Any, args: Sequence) -> None:
        # Push what a permitted name makes of these arguments. Python's INST and OBJ come here, too.
        if not isinstance(target, Global):
            raise TypeError(f"a call of {type(target).__name__}")
        # Constructors copy what they are given, which the pickle's size does not bound.
        self.copied += sum(len(arg) for arg in args if isinstance(arg, (str, bytes, list, tuple, set, dict)))
        if self.copied > MAX_COPIED_ITEMS:
            raise CheckpointError(f"{self.where}: refused: unpacking the pickle would fill the memory")
        self.append(target.build(*args))

    def load_build(self) -> None:
        """BUILD: set the attributes of an `Inert`. Plain dicts, which OrderedDicts become, ignore theirs."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Inert) and isinstance(state, dict):
            target.fields.update(state)
        elif not isinstance(target, (Inert, dict)):
            raise TypeError(f"state for {type(target).__name__}")

    def load_append(self) -> None:
        """APPEND: add the last value to the list before it."""
        item = self.stack.pop()
        self._last(list).append(item)

    def load_appends(self) -> None:
        """APPENDS: add what is above the mark to the list before it."""
        items = self.pop_mark()
        self._last(list).extend(items)

    def load_setitem(self) -> None:
        """SETITEM: add the last key and value to the dict before them."""
        value, key = self.stack.pop(), self.stack.pop()
        self._last(dict)[_key(key)] = value

    def load_setitems(self) -> None:
        """SETITEMS: add the keys and values above the mark to the dict before it."""
        items = self.pop_mark()
        self._last(dict).update(_pairs(items))

    def load_dict(self) -> None:
        """DICT: make a dict of the keys and values above the mark."""
        items = self.pop_mark()  # which changes `self.append`
        self.append(_pairs(items))

    def load_additems(self) -> None:
        """ADDITEMS: add what is above the mark to the set before it."""
        items = self.pop_mark()
        self._last(set).update(map(_key, items))

    def load_frozenset(self) -> None:
        """FROZENSET: make a set of what is above the mark."""
        items = self.pop_mark()
        self.append(set(map(_key, items)))

    def _last(self, kind: type) -> Any:
        target = self.stack[-1]
        if type(target) is not kind:
            raise TypeError(f"items for {type(target).__name__}")
        return target


def _key(key: Any) -> Any:
    """Keys of dicts and members of sets: only plain values, so that hashing them is cheap and runs no code."""
    if key is not None and type(key) not in (str, int, float, bool, bytes):
        raise TypeError(f"a key of type {type(key).__name__}")
    return key


def _pairs(items: Sequence) -> dict:
    if len(items) % 2:
        raise ValueError("a key without a value")
    return {_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)}


# What is not here is refused: extension codes, buffers outside of the file, calls with keyword arguments.
ALLOWED = {
    "proto", "frame", "mark", "stop", "pop", "pop_mark", "dup", "none", "true", "false", "int", "binint", "binint1",
    "binint2", "long", "long1", "long4", "float", "binfloat", "string", "binstring", "short_binstring", "unicode",
    "binunicode", "short_binunicode", "binunicode8", "binbytes", "short_binbytes", "binbytes8", "empty_list", "append",
    "appends", "list", "empty_tuple", "tuple", "tuple1", "tuple2", "tuple3", "empty_dictionary", "dict", "setitem",
    "setitems", "empty_set", "additems", "frozenset", "global", "stack_global", "reduce", "newobj", "build", "inst",
    "obj", "binpersid", "put", "binput", "long_binput", "memoize", "get", "binget", "long_binget",
}  # fmt: skip


def _refusal(code: int) -> Callable[[_Machine], None]:
    def refuse(machine: _Machine) -> None:
        raise CheckpointError(f"{machine.where}: refused: the pickle uses instruction {bytes([code])!r}")

    return refuse


def _instruction(code: int) -> Callable[[_Machine], None]:
    name = getattr(_PythonsMachine.dispatch.get(code), "__name__", "").removeprefix("load_")
    if name not in ALLOWED:
        return _refusal(code)
    return getattr(_Machine, "load_reduce" if name == "newobj" else f"load_{name}")


_Machine.dispatch = {code: _instruction(code) for code in range(256)}
