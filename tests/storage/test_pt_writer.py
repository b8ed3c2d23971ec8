"""Our writer of torch's files: torch opens them, and so does our reader; nothing is held that could be streamed."""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.checkpoint.file_plan import pt_output
from castalia.errors import CheckpointError
from castalia.storage import torch_zip
from castalia.storage.derived import Flattened
from castalia.storage.extent import FileTensor
from castalia.storage.lazy import InMemory
from castalia.storage.pt_writer import Instance, Named, Size
from castalia.storage.torch_file import open_pt
from castalia.storage.unpickle import Inert

TENSORS = {
    "matrix": torch.arange(15.0).view(3, 5), "half": torch.tensor([1.5, -0.0], dtype=torch.float16),
    "bf16": torch.tensor([3e38], dtype=torch.bfloat16), "long": torch.tensor([[2**40]]), "bytes": torch.zeros(7).byte(),
    "scalar": torch.tensor(2.5), "empty": torch.empty(0), "cube": torch.rand(2, 3, 4).double(),
}  # fmt: skip
PLAIN = {
    "numbers": [0, 1, -1, 255, 2**31 - 1, -(2**31), 2**31, -(2**63), 10**30, 1.5, -0.0, 1e-320, True, False, None],
    "text": "Überraschung \n 🎈", "nested": {"a": ((), (1,), (1, (2, 3))), 5: [], "dtype": torch.bfloat16},
    "names": {"b", "a"}, "none": set(),
}  # fmt: skip


def write(path: Path, value: object) -> int:
    """Write a file; gives the bytes that were announced."""
    output, told = pt_output(path.name, value), []
    output.write(path, told.append)
    assert sum(told) == output.num_bytes
    return output.num_bytes


def test_torch_opens_plain_values(tmp_path: Path) -> None:
    held = Named({name: InMemory(tensor) for name, tensor in TENSORS.items()})
    assert write(tmp_path / "a.pt", {"tensors": held, "size": Size((3, 4)), **PLAIN}) == 8 * 24 + 60 + 4 + 2 + 8 + 7 + 4
    for mmap in (False, True):
        found = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap)
        tensors, size = found.pop("tensors"), found.pop("size")
        assert found == PLAIN and type(tensors) is OrderedDict and type(size) is torch.Size and size == (3, 4)
        assert list(tensors) == list(TENSORS)
        for name, tensor in TENSORS.items():
            assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)


@pytest.mark.parametrize("wide", [torch_zip.WIDE, 20])
def test_members_are_aligned_and_checked(wide: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also as files beyond 4 GB have it: with 64-bit sizes and offsets."""
    monkeypatch.setattr(torch_zip, "WIDE", wide)
    path = tmp_path / "a.pt"
    write(path, {name: InMemory(tensor) for name, tensor in TENSORS.items()})
    assert zipfile.ZipFile(path).testzip() is None
    assert torch.load(path, weights_only=True)["matrix"].sum() == 105
    opened = open_pt(path)
    for name, ref in opened.items():
        assert isinstance(ref, FileTensor) and ref.extent.offset % torch_zip.ALIGNMENT == 0
        assert torch.equal(ref.read(), TENSORS[name])
    data = bytearray(path.read_bytes())
    data[opened["matrix"].extent.offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        open_pt(path)["matrix"].read()


def test_objects_of_foreign_classes(tmp_path: Path) -> None:
    fields = {"cur_scale": 2.0, "dtype": torch.float16}
    scaler = Instance("deepspeed.runtime.fp16.loss_scaler.LossScaler", fields=fields)
    write(tmp_path / "a.pt", [scaler, Instance("deepspeed.runtime.zero.config.ZeroStageEnum", (1,))])
    found = open_pt(tmp_path / "a.pt")
    assert [type(each) for each in found] == [Inert, Inert]
    assert found[0].name == scaler.name and found[0].fields.keys() == fields.keys() and found[1].value == 1


def test_torch_unpickles_real_objects(tmp_path: Path) -> None:
    """Objects are written as pickle itself writes them: under a name that exists they come back as instances."""
    write(tmp_path / "a.pt", {"args": Instance("argparse.Namespace", fields={"lr": 0.5})})
    assert torch.load(tmp_path / "a.pt", weights_only=False)["args"].lr == 0.5


def test_files_are_the_same_every_time(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "a.pt", {**PLAIN, "tensors": {name: InMemory(t) for name, t in TENSORS.items()}})
    assert (tmp_path / "first" / "a.pt").read_bytes() == (tmp_path / "second" / "a.pt").read_bytes()


def test_what_cannot_be_written_is_refused() -> None:
    with pytest.raises(TypeError, match="a PosixPath cannot be written"):
        pt_output("a.pt", {"path": Path("a")})


@settings(max_examples=60, deadline=None)
@given(st.data(), st.lists(st.integers(1, 5), max_size=4))
def test_flattened(data: st.DataObject, shape: list[int]) -> None:
    tensor = torch.randn(shape)
    vector = Flattened(InMemory(tensor))
    start = data.draw(st.integers(0, tensor.numel()))
    stop = data.draw(st.integers(start, tensor.numel()))
    assert vector.shape == (tensor.numel(),)
    assert torch.equal(vector.read([slice(start, stop)]), tensor.flatten()[start:stop])
