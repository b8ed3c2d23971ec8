"""Files of torch.save are opened without their tensors, read in part, and refused when damaged or unsafe."""

from __future__ import annotations

import os
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from castalia.errors import CheckpointError
from castalia.storage.extent import FileTensor
from castalia.storage.torch_file import open_pt

LEGACY = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def sample() -> OrderedDict:
    base = torch.arange(600, dtype=torch.float32).view(20, 30)
    return OrderedDict(
        base=base,
        view=base[5:15, 3:7],
        columns=base.t(),
        scalar=torch.tensor(2.5),
        empty=torch.empty(0, 4),
        half=torch.randn(7, 3).half(),
        brain=torch.randn(7, 3).bfloat16(),
        mask=torch.tensor([True, False]),
        parameter=torch.nn.Parameter(torch.ones(3)),
        big=torch.randn(100, 100),
        number=3,
    )


def save(value, path: Path, zipped: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


@LEGACY
def test_every_tensor_comes_back(zipped, tmp_path):
    value = sample()
    found = open_pt(save(value, tmp_path / "a.pt", zipped))
    assert list(found) == list(value) and found["number"] == 3
    for name, ref in found.items():
        if isinstance(ref, FileTensor):
            assert (ref.shape, ref.dtype) == (tuple(value[name].shape), value[name].dtype)
            assert torch.equal(ref.read(), value[name])


@LEGACY
def test_slices(zipped, tmp_path):
    value = sample()
    found = open_pt(save(value, tmp_path / "a.pt", zipped))
    for name in ("base", "view", "columns", "brain"):
        for part in [
            (slice(2, 5),),
            (slice(0, 4), slice(1, 3)),
            (slice(3, 3), slice(0, 2)),
            (slice(-2, None), slice(2)),
        ]:
            assert torch.equal(found[name].read(part), value[name][part])


def test_what_was_read_can_be_changed(tmp_path):
    path = save(sample(), tmp_path / "a.pt")
    first = open_pt(path)["base"].read()
    first.zero_()
    assert torch.equal(open_pt(path)["base"].read(), sample()["base"])


@LEGACY
def test_opening_maps_no_tensor(zipped, tmp_path, monkeypatch):
    path = save({"big": torch.zeros(1 << 18), "small": torch.ones(2)}, tmp_path / "a.pt", zipped)
    import castalia.storage.torch_file as container

    mapped = []
    real = container.Extent.map
    monkeypatch.setattr(
        container.Extent, "map", lambda extent, *part: mapped.append(extent.size) or real(extent, *part)
    )
    found = open_pt(path)
    assert sum(mapped) < 4000
    found["small"].read()
    assert sum(mapped) < 4000 + 8


@LEGACY
def test_truncated_files_say_so(zipped, tmp_path):
    data = save(sample(), tmp_path / "a.pt", zipped).read_bytes()
    short = tmp_path / "short.pt"
    for end in [0, 1, 10, 100, 1000, len(data) // 2, len(data) - 1]:
        short.write_bytes(data[:end])
        with pytest.raises(CheckpointError, match=r"truncated|damaged|empty|not written by torch"):
            open_pt(short)


def test_a_file_that_shrinks_after_opening_says_so(tmp_path):
    path = save(sample(), tmp_path / "a.pt", zipped=False)
    found = open_pt(path)
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(CheckpointError, match="truncated"):
        [ref.read() for ref in found.values() if isinstance(ref, FileTensor)]


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


def test_flipped_bits_are_found_even_by_partial_reads(tmp_path):
    path = save({"a": torch.zeros(1000)}, tmp_path / "a.pt")
    flip(path, open_pt(path)["a"].extent.offset + 3999)
    with pytest.raises(CheckpointError, match="checksum"):
        open_pt(path)["a"].read([slice(0, 2)])
    path = save({"a": torch.zeros(1000)}, tmp_path / "b.pt")
    flip(path, path.read_bytes().index(b"_rebuild_tensor_v2"))
    with pytest.raises(CheckpointError, match="checksum"):
        open_pt(path)


def test_files_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = save({"a": torch.ones(3)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(open_pt(path)["a"].read(), torch.ones(3))


class Runs:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@LEGACY
def test_executable_objects_are_refused_by_name(zipped, tmp_path):
    target = tmp_path / "ran"
    for value in (
        Runs(target),
        {"a": torch.ones(2), "b": [Runs(target)]},
        OrderedDict(a=Runs(target), b=torch.ones(2)),
    ):
        path = save(value, tmp_path / "a.pt", zipped)
        with pytest.raises(CheckpointError, match=f"{os.name}.system"):
            open_pt(path)
    assert not target.exists()


@pytest.mark.parametrize("position", range(5))
def test_executable_pickles_anywhere_in_a_legacy_file(position, tmp_path):
    import pickle

    target, good = tmp_path / "ran", [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {}, []]
    if position == 0:
        good[0] = (good[0], Runs(target))  # the file is recognised by its first bytes
    else:
        good[position] = Runs(target)
    data = [pickle.dumps(part, 2) for part in good]
    if position == 0:
        data[0] = pickle.dumps(0x1950A86A20F9469CFC6C, 2)[:-1] + data[0][2:]
    (tmp_path / "a.pt").write_bytes(b"".join(data))
    with pytest.raises(CheckpointError, match=f"{os.name}.system"):
        open_pt(tmp_path / "a.pt")
    assert not target.exists()


def archive(path: Path, members: dict[str, bytes], **options) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(name, data, **options)
    return path


@pytest.mark.parametrize("name", ["/etc/x", "a/../../x", "..", "C:/x", "a\\..\\x"])
def test_names_that_leave_the_folder_are_refused(name, tmp_path):
    path = archive(tmp_path / "a.pt", {"a/data.pkl": b"\x80\x02N.", name: b"x"})
    with pytest.raises(CheckpointError, match="refused"):
        open_pt(path)


def test_bombs_are_refused(tmp_path):
    path = archive(tmp_path / "a.pt", {"a/data.pkl": b"\x00" * 10_000_000}, compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        open_pt(path)


def test_tensors_larger_than_their_storage_are_refused(tmp_path):
    tensor = torch.ones(1).expand(1000, 1000)
    with pytest.raises(CheckpointError, match="does not fit"):
        open_pt(save({"a": tensor}, tmp_path / "a.pt"))


def test_other_files_are_named_for_what_they_are(tmp_path):
    path = tmp_path / "a.pt"
    for data, message in [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
        (b"hello", "not written by torch.save"),
    ]:
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            open_pt(path)
    with pytest.raises(CheckpointError, match="cannot read"):
        open_pt(tmp_path / "absent.pt")
    big = archive(path, {"a/data.pkl": b"\x80\x02N.", "a/byteorder": b"big"})
    with pytest.raises(CheckpointError, match="big-endian"):
        open_pt(big)


def test_every_genuine_file_agrees_with_torch(fixtures):
    """Tensors of layer files, which need no foreign class, are those of torch's own loader."""
    files = sorted((fixtures / "neox").glob("*/checkpoint/*/*.pt"))
    assert files
    for path in files:
        found = open_pt(path)
        if path.name.startswith("layer_"):
            expected = torch.load(path, weights_only=True, map_location="cpu")
            assert list(found) == list(expected)
            assert all(torch.equal(found[name].read(), tensor) for name, tensor in expected.items())
