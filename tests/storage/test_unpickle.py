"""The pickle reader builds plain values, agrees with the real one, and runs nothing."""

from __future__ import annotations

import collections
import contextlib
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from castalia.errors import CheckpointError
from castalia.storage.unpickle import ALLOWED, Inert, unpickle


def load(data: bytes):
    value, end = unpickle(data, "file.pt", lambda identity: pytest.fail("no storages here"))
    assert end == len(data)
    return value


PLAIN = {
    "numbers": [0, 1, 255, 256, 65536, -1, 2**31, -(2**40), 2**200, 1.5, True, False, None],
    "text": ["", "a", "ä€" * 100, "x" * 300, b"", b"bytes" * 100],
    "nested": ({"a": (1, 2, 3, 4), 5: [[], {}, ()]}, {1, 2}, frozenset({"x"})),
}


@pytest.mark.parametrize("protocol", range(5))
def test_plain_values_agree_with_the_real_unpickler(protocol):
    value = (
        dict(PLAIN) if protocol >= 4 else {"numbers": PLAIN["numbers"], "text": PLAIN["text"][:4], "d": {"a": ((1,),)}}
    )
    assert load(pickle.dumps(value, protocol)) == value
    shared = [1]
    both = load(pickle.dumps([shared, shared], protocol))
    assert both[0] is both[1]


def test_what_the_writers_use_becomes_plain_or_inert():
    value = collections.OrderedDict(
        size=torch.Size([2, 3]), names={"a"}, dtype=torch.bfloat16, rng=np.arange(4, dtype="u4")
    )
    result = load(pickle.dumps(value, 2))
    assert (result["size"], result["names"], result["dtype"]) == ((2, 3), {"a"}, "bfloat16")
    assert isinstance(result["rng"], Inert)


def instance(module: str, name: str, state: bytes) -> bytes:
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b")\x81" + state + b"b."


def test_foreign_instances_carry_their_fields():
    scaler = load(instance("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler", b"}X\x03\x00\x00\x00abcK\x07s"))
    assert scaler.name.endswith("DynamicLossScaler") and scaler.fields == {"abc": 7}
    stage = load(b"\x80\x02cdeepspeed.runtime.zero.config\nZeroStageEnum\nK\x03\x85R.")
    assert stage.value == 3


def executable(target: Path) -> dict[str, bytes]:
    """Pickles that would create `target` if anything in them ran."""
    text = f"touch {target}".encode()
    argument = b"X" + len(text).to_bytes(4, "little") + text
    name = b"c" + f"{os.name}\nsystem\n".encode()
    return {
        "reduce": b"\x80\x02" + name + argument + b"\x85R.",
        "stack global": b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + argument + b"\x85R.",
        "inst": b"(" + argument + b"i" + f"{os.name}\nsystem\n".encode() + b".",
        "obj": b"(" + name + argument + b"o.",
        "newobj": b"\x80\x02" + name + argument + b"\x85\x81.",
        "nested": b"\x80\x02}X\x01\x00\x00\x00a" + name + argument + b"\x85Rs.",
        "after a good one": b"\x80\x02]ccollections\nOrderedDict\n)Ra" + name + argument + b"\x85Ra.",
        "popped": b"\x80\x02" + name + argument + b"\x85R0N.",
    }


@pytest.mark.parametrize("kind", executable(Path("x")))
def test_executable_pickles_are_refused_by_name(kind, tmp_path):
    target = tmp_path / "ran"
    data = executable(target)[kind]
    with pytest.raises(CheckpointError, match=f"{os.name}.system"):
        load(data)
    assert not target.exists()


@pytest.mark.parametrize(
    "name", ["builtins.getattr", "builtins.eval", "builtins.__import__", "torch.load", "os.system"]
)
def test_other_names_are_refused(name):
    module, attribute = name.rsplit(".", 1)
    with pytest.raises(CheckpointError, match=name):
        load(b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b".")
    with pytest.raises(CheckpointError, match=r"torch\.Size\.x"):  # dotted names do not reach into permitted objects
        load(b"\x80\x04\x8c\x05torch\x8c\x06Size.x\x93.")


@pytest.mark.parametrize("code", [b"\x82\x01", b"\x83\x01\x00", b"P1\n", b"\x97", b"\x92"])
def test_extension_registry_and_buffers_are_refused(code):
    with pytest.raises(CheckpointError, match="instruction"):
        load(b"\x80\x02" + code + b".")


def test_this_python_has_all_permitted_instructions():
    names = {step.__name__.removeprefix("load_") for step in pickle._Unpickler.dispatch.values()}
    assert names >= ALLOWED


def test_only_one_value_may_be_left():
    for data in (b"\x80\x02NN.", b"\x80\x02N(N."):
        with pytest.raises(CheckpointError, match="more than one value"):
            load(data)


def test_state_cannot_change_permitted_functions():
    with pytest.raises(CheckpointError, match="state for Global"):
        load(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.")


def test_bombs_are_refused():
    with pytest.raises(CheckpointError, match="truncated"):
        load(b"\x80\x02B\xff\xff\xff\xff.")
    assert load(b"\x80\x02Nr\xff\xff\xff\x7f.") is None  # a huge memo index costs nothing
    copies = b"\x80\x02]q\x01(" + b"K\x01" * 100_000 + b"e0" + b"ctorch\nSize\nq\x02h\x01\x85R" * 1000 + b"."
    with pytest.raises(CheckpointError, match="fill the memory"):
        load(copies)


def test_damage_is_always_a_checkpoint_error():
    data = pickle.dumps(collections.OrderedDict(PLAIN, size=torch.Size([1, 2])), 2)
    generator = random.Random(0)
    for end in range(len(data)):
        with pytest.raises(CheckpointError):
            load(data[:end])
    for _ in range(3000):
        flipped = bytearray(data)
        for _ in range(generator.randint(1, 4)):
            flipped[generator.randrange(len(data))] = generator.randrange(256)
        with contextlib.suppress(CheckpointError):  # a changed value is just as fine: only other exceptions are not
            unpickle(bytes(flipped), "file.pt", lambda identity: identity)
