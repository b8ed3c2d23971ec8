import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from castalia.config.schema import DataConfig, RunConfig, TrainConfig
from castalia.data.config_corpora import open_data

STEM = "genesis_text_document_train_indexmap_200ns_64sl_1234s_packedpi_ac"
PARTS = ("doc_idx", "sample_idx", "shuffle_idx")


def run(folder: Path, split: str = "969,30,1", **data) -> RunConfig:
    path = str(folder / "genesis_text_document")
    return RunConfig(
        data=DataConfig(path=path, split=split, holdout="contiguous", seq_length=64, **data),
        train=TrainConfig(steps=200, batch_size=1),
    )


@pytest.fixture
def folder(corpora: Path, tmp_path: Path) -> Path:
    for end in ("bin", "idx"):
        shutil.copyfile(corpora / f"genesis_text_document.{end}", tmp_path / f"genesis_text_document.{end}")
    return tmp_path


def stamps(folder: Path) -> list[int]:
    return [(folder / f"{STEM}_{part}.npy").stat().st_mtime_ns for part in PARTS]


def test_index_files_are_the_originals_and_are_reused(fixtures: Path, folder: Path) -> None:
    first = open_data(run(folder)).corpora[0].index
    for part in PARTS:
        name = f"{STEM}_{part}.npy"
        assert (folder / name).read_bytes() == (fixtures / "data" / "index" / name).read_bytes()
        os.utime(folder / name, ns=(0, 0))
    again = open_data(run(folder)).corpora[0].index
    assert np.array_equal(first.bounds, again.bounds) and stamps(folder) == [0, 0, 0]


@pytest.mark.parametrize("name", [STEM, STEM.removesuffix("_packedpi_ac")])
def test_files_of_the_original_are_adopted(fixtures: Path, folder: Path, name: str) -> None:
    for part in PARTS:
        shutil.copyfile(fixtures / "data" / "index" / f"{STEM}_{part}.npy", folder / f"{name}_{part}.npy")
    open_data(run(folder)).build_index()
    assert (folder / f"{name}_fingerprint.txt").is_file() and len(list(folder.glob("*.npy"))) == 3


def test_files_of_another_split_are_noticed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    open_data(run(folder)).build_index()
    with caplog.at_level(logging.WARNING):
        other = open_data(run(folder, split="50,50,0")).corpora[0].index
    assert "another split: built anew" in caplog.text and other.documents.max() == 24
    assert np.array_equal(np.load(folder / f"{STEM}_doc_idx.npy"), other.documents)


def test_damaged_files_are_built_anew(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = np.array(open_data(run(folder)).corpora[0].index.order)
    file = folder / f"{STEM}_shuffle_idx.npy"
    good = file.read_bytes()
    bombs = (b"", b"\x93NUMPY", b"PK\3\4", good[:-1], good[:10] + b"(" * 100 + good[110:])
    flipped = [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in (3, 60, 150, len(good) - 1)]
    for content in (*bombs, *flipped):
        caplog.clear()
        file.write_bytes(content)
        assert np.array_equal(open_data(run(folder)).corpora[0].index.order, expected)
        assert "are damaged: built anew" in caplog.text
        assert file.read_bytes() == good


@pytest.mark.parametrize("content", [b"", b"\xff\n\n", None], ids=repr)
def test_fingerprints_that_do_not_tell_are_written_again(folder: Path, content: bytes | None) -> None:
    open_data(run(folder)).build_index()
    file = folder / f"{STEM}_fingerprint.txt"
    good = file.read_bytes()
    file.write_bytes(good.split(b"\n")[0] + b"\n" if content is None else content)  # None: an older release's
    open_data(run(folder)).build_index()
    assert file.read_bytes() == good


def test_a_folder_of_ones_own(folder: Path, tmp_path: Path) -> None:
    open_data(run(folder, cache_dir=str(tmp_path / "deep" / "cache"))).build_index()
    assert len(list((tmp_path / "deep" / "cache").glob("*.npy"))) == 3 and not list(folder.glob("*.npy"))


def test_read_only_data(folder: Path, own_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.chmod(0o555)
    try:
        open_data(run(folder)).build_index()
    finally:
        folder.chmod(0o755)
    assert "is not writable: index files go to" in caplog.text
    assert not list(folder.glob("*.npy")) and len(list(own_cache.rglob("*.npy"))) == 3
