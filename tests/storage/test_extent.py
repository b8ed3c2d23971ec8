"""Whatever part of a tensor is read, each byte that its checksums cover is verified; what has none is read as it is."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.errors import CheckpointError
from castalia.storage.checksum import BlockSums, crc32
from castalia.storage.derived import Part, Transposed
from castalia.storage.extent import Extent, FileTensor, Tile, tiled, verify, verifying
from castalia.storage.lazy import as_bytes
from castalia.storage.torch_file import open_pt

BLOCK = 24  # six values: more than a row, so that a block has parts of several


def sums_of(content: bytes, block: int) -> list[int]:
    return [crc32(content[start : start + block]) for start in range(0, len(content), block)]


def a_file(path: Path, whole: torch.Tensor, cuts: tuple[list[int], list[int]], block: int | None) -> list[Tile]:
    """Write a matrix in parts, cut at these rows and columns. `block` None: one checksum for each part."""
    tiles, content = [], b""
    for top, bottom in pairwise(cuts[0]):
        for left, right in pairwise(cuts[1]):
            part = bytes(as_bytes(whole[top:bottom, left:right].contiguous()))
            size = block or len(part)
            extent = Extent(path, len(content), len(part), sums_of(part, size), size, "it")
            tiles.append(Tile((top, left), FileTensor.of(extent, "float32", (bottom - top, right - left))))
            content += part
    path.write_bytes(content)
    return tiles


@st.composite
def cases(draw: st.DrawFn) -> tuple:
    cuts = tuple(sorted({0, size, *draw(st.sets(st.integers(1, size - 1), max_size=2))}) for size in (7, 5))
    box = [slice(*sorted((draw(st.integers(0, size)), draw(st.integers(0, size))))) for size in (7, 5)]
    return cuts, box, draw(st.sampled_from([None, BLOCK])), draw(st.integers(0, 4 * 35 - 1)), draw(st.randoms())


@settings(max_examples=150, deadline=None)
@given(cases())
def test_a_flipped_byte_is_noticed_by_every_part_that_contains_it(case: tuple) -> None:
    cuts, box, block, position, random = case
    whole = torch.randn(7, 5)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file")

        def fresh() -> FileTensor:
            tiles = a_file(path, whole, cuts, block)
            random.shuffle(tiles)
            return tiled("it", tiles, (7, 5), "float32")

        assert torch.equal(fresh().read(), whole)
        assert torch.equal(fresh().read(box), whole[tuple(box)])
        out = torch.full((5, 7), 9.0).t()[tuple(box)]  # one that is not contiguous
        assert torch.equal(fresh().read(box, out=out), whole[tuple(box)])
        double = torch.empty(whole.shape, dtype=torch.float64)
        assert torch.equal(fresh().read(out=double), whole.double())

        tensor = fresh()
        content = bytearray(path.read_bytes())
        content[position] ^= 1
        path.write_bytes(content)
        for attempt in (lambda: tensor.read(), lambda: verify([tensor])):
            with pytest.raises(CheckpointError, match="it: .*file is damaged: bytes .* have checksum"):
                attempt()
        damaged = torch.frombuffer(content, dtype=torch.float32)
        assert len(damaged) == whole.numel()
        try:
            found = tensor.read(box)
        except CheckpointError:
            pass  # the byte, or one of its block
        else:
            assert torch.equal(found, whole[tuple(box)])


@pytest.mark.parametrize("block", [None, BLOCK])
def test_pieces_are_verified_on_the_way_and_to_the_end(block: int | None, tmp_path: Path) -> None:
    whole = torch.randn(7, 5)
    for position in range(4 * 35):
        tiles = a_file(tmp_path / "file", whole, ([0, 4, 7], [0, 5]), block)
        content = bytearray((tmp_path / "file").read_bytes())
        content[position] ^= 1
        (tmp_path / "file").write_bytes(content)
        tensor = tiled("it", tiles, (7, 5), "float32")
        with pytest.raises(CheckpointError, match="damaged"), verifying([tensor]):
            for _ in tensor.pieces(20):
                pass


def test_only_the_blocks_in_question_are_read(tmp_path: Path) -> None:
    """A block that is damaged elsewhere does not keep anyone from the others."""
    whole = torch.randn(12, 3)
    tiles = a_file(tmp_path / "file", whole, ([0, 12], [0, 3]), BLOCK)
    content = bytearray((tmp_path / "file").read_bytes())
    content[-1] ^= 1
    (tmp_path / "file").write_bytes(content)
    tensor = tiled("it", tiles, (12, 3), "float32")
    assert torch.equal(tensor.read([slice(0, 10)]), whole[:10])
    with pytest.raises(CheckpointError, match="bytes 120 to 144"):
        tensor.read([slice(10, 11)])


def test_a_file_whose_header_is_damaged_is_refused_whatever_is_read(tmp_path: Path) -> None:
    content = b"headvalues..."
    (tmp_path / "file").write_bytes(content)
    head = Extent(tmp_path / "file", 0, 4, sums_of(b"hEad", 4), 4, "its header")
    extent = Extent(tmp_path / "file", 4, 4, sums_of(b"valu", 4), 4, "it", head)
    with pytest.raises(CheckpointError, match="its header: .* is damaged: bytes 0 to 4"):
        FileTensor.of(extent, "uint8", (4,)).read()


def test_what_was_read_in_part_is_verified_in_the_end(tmp_path: Path) -> None:
    torch.save({"it": torch.zeros(6, 5)}, tmp_path / "a.pt")
    extent = open_pt(tmp_path / "a.pt")["it"].extent
    damaged = bytearray(extent.path.read_bytes())
    damaged[extent.offset + extent.size - 1] ^= 1
    extent.path.write_bytes(damaged)
    tensor = Transposed(Part(open_pt(extent.path)["it"], 0, 2))
    with verifying([tensor]):
        pass  # nothing of it was used
    with pytest.raises(CheckpointError, match="damaged"), verifying([tensor]):
        tensor.read()
    with pytest.raises(CheckpointError, match="damaged"):
        tensor.read()


@pytest.mark.parametrize(
    "places",
    [
        [((0, 0), (2, 1)), ((0, 1), (1, 1))],  # a gap
        [((0, 0), (2, 2)), ((0, 1), (1, 1))],  # an overlap
        [((0, 0), (2, 1)), ((0, 2), (2, 1))],  # beyond the end
        [((0, 1), (2, 1)), ((0, 0), (1, 1)), ((0, 0), (1, 1))],  # one of them twice
        [((0,), (2,))],
        [],
    ],
    ids=str,
)
def test_parts_that_do_not_make_up_the_tensor_are_refused(places: list, tmp_path: Path) -> None:
    tiles = [Tile(start, FileTensor.of(Extent(tmp_path, 0, 0), "float32", shape)) for start, shape in places]
    with pytest.raises(CheckpointError, match=r"it: (its \d parts.*do not make up|a part of it has another)"):
        tiled("it", tiles, (2, 2), "float32")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3 << 19), max_size=6))
def test_checksums_of_blocks_do_not_depend_on_the_pieces(sizes: list[int]) -> None:
    content, sums = bytes(sum(sizes)), BlockSums()
    for size in sizes:
        sums.add(memoryview(bytes(size)))
    assert sums.sums == sums_of(content, 1 << 20) and sums.seen == len(content)
