"""Token ids as they are published, without a header, beside the same documents written as a corpus."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import castalia
from castalia.cli import data as data_verbs
from castalia.data.dataset_writer import DatasetWriter
from castalia.data.token_files import index_tokens, token_file_dtype
from castalia.errors import ConfigError, DataError

EOD = 0


def published(path: Path, dtype: str, last_ends: bool = True) -> list[np.ndarray]:
    """As OLMo's `np.memmap(path, mode="w+", dtype=dtype)` leaves a file; returns its documents."""
    numbers = np.random.default_rng(3)
    documents = [np.append(numbers.integers(1, 60, numbers.integers(1, 40)), EOD) for _ in range(50)]
    if not last_ends:
        documents[-1] = documents[-1][:-1]
    ids = np.concatenate(documents)
    file = np.memmap(path, mode="w+", dtype=dtype, shape=ids.shape)
    file[:] = ids
    file.flush()
    return documents


@pytest.mark.parametrize(("dtype", "ours"), [("uint16", "<u2"), ("uint32", "<i4")])
@pytest.mark.parametrize("last_ends", [True, False])
def test_the_index_is_that_of_the_same_documents(tmp_path, monkeypatch, dtype, ours, last_ends):
    monkeypatch.setattr("castalia.data.token_files.BLOCK_TOKENS", 7)
    documents = published(tmp_path / "part-0.npy", dtype, last_ends)
    corpus = index_tokens(tmp_path / "part-0.npy", tmp_path / "out" / "part-0", dtype, EOD, 64)
    assert (tmp_path / "out" / "part-0.bin").is_symlink()
    with DatasetWriter(tmp_path / "same", ours) as writer:
        for document in documents:
            writer.add(document)
    for ending in ("bin", "idx"):
        assert (tmp_path / f"same.{ending}").read_bytes() == (tmp_path / "out" / f"part-0.{ending}").read_bytes()
    assert [item.tolist() for item in corpus] == [document.tolist() for document in documents]
    index_tokens(tmp_path / "part-0.npy", tmp_path / "out" / "part-0", dtype, EOD)  # again
    written = (tmp_path / "same.idx").read_bytes()
    with pytest.raises(DataError, match=r"same\.idx exists already, so that .*same is a corpus as it is"):
        index_tokens(tmp_path / "same.bin", tmp_path / "same", dtype, 1)
    assert (tmp_path / "same.idx").read_bytes() == written


def test_a_run_trains_on_them(tmp_path: Path) -> None:
    published(tmp_path / "part-0.npy", "uint16")
    words = {"data": {"path": str(tmp_path / "part-0.npy"), "seq_length": 16}, "train": {"steps": 2, "batch_size": 2}}
    words |= {"model": {"num_layers": 1, "hidden_size": 8, "num_heads": 1, "vocab_size": 64}}
    words |= {"checkpoint": {"dir": str(tmp_path / "run")}, "precision": {"compute": "fp32"}}
    with pytest.raises(ConfigError, match=r"published token ids; `castalia data index .*part-0\.npy .*=tokens/part-0"):
        castalia.run_training(castalia.load_config([words]))
    options = ["--eod", "0", "--dtype", "uint16", "--output", str(tmp_path / "tokens"), "--json"]
    done = CliRunner().invoke(data_verbs.app, ["index", str(tmp_path / "part-0.npy"), *options])
    assert json.loads(done.output)[0]["documents"] == 50
    config = castalia.load_config([words], [f"data.path={tmp_path / 'tokens' / 'part-0'}"])
    run = castalia.run_training(config)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    path, out = tmp_path / "a.npy", tmp_path / "out"
    published(path, "uint16")

    def refused(match: str, *more: object) -> None:
        with pytest.raises(DataError, match=match):
            index_tokens(path, out, *(more or ("uint16", EOD)))  # type: ignore[arg-type]
        assert not out.with_suffix(".bin").exists() and not out.with_suffix(".idx").exists()

    refused("no id 63, which would end documents", "uint16", 63)
    refused(r"read as uint16 it holds the id 59, beyond the vocabulary of 30", "uint16", EOD, 30)
    refused("read as uint32 it holds the id", "uint32", EOD, 64)
    np.save(path, np.arange(9, dtype=np.uint16))
    refused("an array of NumPy with a header")
    path.write_bytes((20240520).to_bytes(4, "little") + bytes(1020))
    refused("a token file of llm.c")
    path.write_bytes(bytes(7))
    refused("7 bytes are not whole ids of uint16: truncated")
    path.unlink()
    refused("a.npy: No such file")
    published(path, "uint16")
    out.with_suffix(".bin").write_bytes(b"other")
    with pytest.raises(DataError, match="exists already, and is not"):
        index_tokens(path, out, "uint16", EOD)
    assert out.with_suffix(".bin").read_bytes() == b"other"


def test_the_dtype_is_the_one_that_olmo_chooses() -> None:
    assert [token_file_dtype(size) for size in (50280, 65536, 65537, 100278)] == ["uint16"] * 2 + ["uint32"] * 2
