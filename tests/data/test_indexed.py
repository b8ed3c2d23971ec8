import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.data.dataset_writer import DatasetWriter, token_dtype
from castalia.data.indexed import open_dataset
from castalia.errors import DataError
from castalia.files import lock


def write(prefix: Path, items: list[list[int]], dtype: str = "u2") -> Path:
    with DatasetWriter(prefix, dtype) as writer:
        for item in items:
            writer.add(item)
    return prefix


def same_files(a: Path, b: Path) -> bool:
    return all(Path(f"{a}{end}").read_bytes() == Path(f"{b}{end}").read_bytes() for end in (".bin", ".idx"))


@pytest.mark.parametrize("name", ["genesis_text_document", "proverbs_text_document", "proverbs_int32_document"])
def test_genuine_files_are_written_again_byte_for_byte(corpora: Path, tmp_path: Path, name: str) -> None:
    corpus = open_dataset(corpora / name)
    with DatasetWriter(tmp_path / "copy", corpus.dtype) as writer:
        for item in corpus:
            writer.add(item)
    assert same_files(tmp_path / "copy", corpora / name)


def test_documents_of_several_items(corpora: Path, tmp_path: Path) -> None:
    corpus, short = (
        open_dataset(corpora / "proverbs_multi_item_document"),
        open_dataset(corpora / "proverbs_int32_document"),
    )
    assert len(corpus.doc_index) == 9 and len(corpus) > 8
    with DatasetWriter(tmp_path / "copy", corpus.dtype) as writer:
        for i, item in enumerate(corpus):
            writer.add(item, end_document=i + 1 in corpus.doc_index)
    assert same_files(tmp_path / "copy", corpora / "proverbs_multi_item_document")
    assert np.array_equal(np.concatenate(list(corpus)), np.concatenate(list(short)))


def test_the_older_layout_holds_the_same(corpora: Path) -> None:
    legacy, today = (
        open_dataset(corpora / "proverbs_legacy_document"),
        open_dataset(corpora / "proverbs_int32_document"),
    )
    assert legacy.dtype == np.int32 and np.array_equal(legacy.doc_index, today.doc_index)
    assert [item.tolist() for item in legacy] == [item.tolist() for item in today]


@settings(deadline=None)
@given(
    items=st.lists(st.lists(st.integers(0, 120), max_size=9), max_size=9),
    dtype=st.sampled_from(["u1", "i1", "i2", "i4", "i8", "f4", "f8", "u2"]),
)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, items: list[list[int]], dtype: str) -> None:
    corpus = open_dataset(write(tmp_path_factory.mktemp("corpus") / "x", items, dtype))
    assert [item.tolist() for item in corpus] == items and corpus.dtype == np.dtype(dtype)
    assert corpus.doc_index.tolist() == list(range(len(items) + 1))


def test_it_is_a_sequence_of_views(tmp_path: Path) -> None:
    corpus = open_dataset(write(tmp_path / "x", [[1, 2], [3], [4, 5, 6]]))
    assert corpus[-1].tolist() == [4, 5, 6] and [item.tolist() for item in corpus[1:]] == [[3], [4, 5, 6]]
    assert corpus[0].base is not None and not corpus[0].flags.writeable
    with pytest.raises(IndexError):
        corpus[3]
    assert open_dataset(f"{tmp_path}/x.bin")[1].tolist() == [3]


def test_dtype_follows_the_vocabulary() -> None:
    assert (token_dtype(65499), token_dtype(65500)) == (np.uint16, np.int32)


def test_an_error_while_writing_leaves_the_older_files(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1, 2]])
    with pytest.raises(RuntimeError), DatasetWriter(tmp_path / "x", "u2") as writer:
        writer.add([3])
        raise RuntimeError
    assert open_dataset(tmp_path / "x")[0].tolist() == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


def test_a_writer_that_comes_while_another_ends_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1, 2]])
    with open(tmp_path / "x.bin", "rb") as ending:  # its tokens have their name already, its index not yet
        assert lock(ending)
        with pytest.raises(DataError, match="another process is writing"):
            DatasetWriter(tmp_path / "x", "u2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


def patch(path: Path, at: int, value: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b, i: b.unlink(), r"x\.bin does not exist"),
        (lambda b, i: i.unlink(), r"x\.idx does not exist"),
        (lambda b, i: b.write_bytes(b.read_bytes()[:-1]), r"x\.bin is truncated: 11 bytes, its index describes 12"),
        (lambda b, i: b.write_bytes(b.read_bytes() + b"12"), r"x\.idx disagrees with .*x\.bin"),
        (lambda b, i: i.write_bytes(i.read_bytes()[:-3]), r"x\.idx is truncated"),
        (lambda b, i: i.write_bytes(i.read_bytes()[:20]), r"x\.idx is truncated: 20 bytes"),
        (lambda b, i: i.write_bytes(i.read_bytes() + b"1"), r"x\.idx is too long"),
        (lambda b, i: i.write_bytes(i.read_bytes() + bytes(3)), r"x\.idx is a multimodal index of Megatron"),
        (lambda b, i: i.write_bytes(b""), r"x\.idx is not the index"),
        (lambda b, i: patch(i, 0, b"NONSENSE"), r"x\.idx is not the index"),
        (lambda b, i: patch(i, 9, b"\2"), "version 2"),
        (lambda b, i: patch(i, 17, b"\x63"), "dtype code 99"),
        (lambda b, i: patch(i, 34 + 12 + 8, b"\2"), "do not lie back to back"),
        (lambda b, i: patch(i, 34, (-2).to_bytes(4, "little", signed=True)), r"x\.idx disagrees"),
    ],
)
def test_damaged_files(tmp_path: Path, damage, message: str) -> None:
    write(tmp_path / "x", [[1, 2], [3], [4, 5, 6]])
    damage(tmp_path / "x.bin", tmp_path / "x.idx")
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path / "x")


def test_two_corpora_mixed_up(corpora: Path, tmp_path: Path) -> None:
    shutil.copy(corpora / "genesis_text_document.idx", tmp_path / "x.idx")
    shutil.copy(corpora / "proverbs_text_document.bin", tmp_path / "x.bin")
    with pytest.raises(DataError, match="truncated"):
        open_dataset(tmp_path / "x")
