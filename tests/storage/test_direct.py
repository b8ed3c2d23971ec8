"""Reads past the page cache give the bytes of the file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from castalia.errors import CheckpointError
from castalia.storage import direct
from castalia.storage.direct import WINDOW_BYTES, DirectFile
from castalia.storage.extent import DIRECT_BYTES, Extent, FileTensor, read_past_cache

SIZE = WINDOW_BYTES + 3 * DIRECT_BYTES + 77


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("direct") / "bytes"
    path.write_bytes(os.urandom(1 << 16) * (SIZE >> 16) + os.urandom(SIZE & 0xFFFF))
    return path


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(0, SIZE), st.integers(0, SIZE), st.integers(1, 1 << 20), st.booleans())
def test_any_part_is_read(path: Path, a: int, b: int, step: int, is_direct: bool) -> None:
    """Without direct reads, too, as on file systems that lack them."""
    start, stop = sorted((a, b))
    done, found = 0, bytearray(stop - start)
    with DirectFile(path, stop) as file:
        file.is_direct = file.is_direct and is_direct
        while done < len(found):
            done += file.read_into(memoryview(found)[done : done + step], start + done)
    assert bytes(found) == path.read_bytes()[start:stop]


def test_a_refused_direct_read_is_repeated_through_the_cache(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv

    def refusing(descriptor, buffers, offset):
        if direct_flag(descriptor):
            raise OSError(22, "Invalid argument")
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(direct.os, "preadv", refusing)
    out = bytearray(1000)
    with DirectFile(path, SIZE) as file:
        assert file.read_into(memoryview(out), 5000) == 1000
    assert bytes(out) == path.read_bytes()[5000:6000]


def direct_flag(descriptor: int) -> bool:
    flags = next(line for line in Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines() if "flags" in line)
    return bool(int(flags.split()[1], 8) & os.O_DIRECT)


def test_a_file_that_ends_early_is_truncated(path: Path) -> None:
    ref = FileTensor.of(Extent(path, 100, SIZE), "uint8", (SIZE,))
    read_past_cache([ref])
    with pytest.raises(CheckpointError, match="truncated"):
        ref.read()
    assert torch.equal(
        ref.read([slice(0, SIZE - 100)]), torch.frombuffer(bytearray(path.read_bytes()[100:]), dtype=torch.uint8)
    )
