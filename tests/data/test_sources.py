import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from castalia.data.sources import Chunk, _lines, chunks, documents, find_files, texts_of
from castalia.errors import DataError

TEXTS = ["First\ndocument.", "Zweites: äöü €", "third"]
JSONL = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def tar(members: dict[str, bytes], mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def long_window(content: bytes) -> bytes:
    """As `zstd --long=31` does: a frame whose header asks for a window of 2 GiB."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=31, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return stream.compress(content) + stream.flush()


MEMBERS = {f"{i}.txt": text.encode() for i, text in enumerate(TEXTS)}
FILES: dict[str, Callable[[], bytes]] = {
    "a.jsonl": lambda: JSONL,
    "a.jsonl.zst": lambda: zstandard.compress(JSONL[:40]) + zstandard.compress(JSONL[40:]),
    "a.jsonl.gz": lambda: gzip.compress(JSONL[:40]) + gzip.compress(JSONL[40:]),
    "a.json.gz": lambda: gzip.compress(JSONL),
    "a.json.zst": lambda: zstandard.compress(json.dumps(TEXTS).encode()),
    "a.dat.zst": lambda: zstandard.compress(b"".join(b"%016d" % len(t.encode()) + t.encode() for t in TEXTS)),
    "a.zip": lambda: zipped(MEMBERS),
    "a.tar.gz": lambda: tar(MEMBERS, "w:gz"),
    "a.tgz": lambda: tar(MEMBERS, "w:gz"),
    "a.tar": lambda: tar(MEMBERS),
    "padded.jsonl.gz": lambda: gzip.compress(JSONL[:40]) + bytes(700) + gzip.compress(JSONL[40:]) + bytes(400_000),
    "long.jsonl.zst": lambda: long_window(JSONL),
    "a.jsonl.zst.tar": lambda: tar({"x.jsonl.zst": zstandard.compress(JSONL)}),
    "openwebtext.tar.xz": lambda: tar({"openwebtext/urlsf_subset00-1_data.xz": tar(MEMBERS, "w:xz")}, "w:xz"),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name]())
    assert list(documents([tmp_path / name])) == TEXTS


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"one\r\ntwo\n\nthree"))
    assert list(documents([tmp_path / "a.txt", tmp_path / "b.gz"])) == ["one\ntwo\n", "one", "two", "three"]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    assert list(documents([tmp_path / "a.parquet"])) == TEXTS
    columns = {
        "title": ["T", None],
        "body": ["one", "two"],
        "turns": [[{"role": "user"}], []],
        "at": [date(1, 1, 1)] * 2,
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "b.parquet")
    (chunk,) = chunks([tmp_path / "b.parquet"], ("title", "body"))
    found = texts_of(chunk, ("title", "body"))
    assert found.texts == {"title": ["T"], "body": ["one", "two"]} and found.empty == 1
    (chunk,) = chunks([tmp_path / "b.parquet"], ("turns",))
    assert json.loads(chunk.records[0]) == {"turns": [{"role": "user"}]}
    with pytest.raises(DataError, match=r"b\.parquet:1: field 'at' is not text but dict"):
        list(documents([tmp_path / "b.parquet"], "at"))
    with pytest.raises(DataError, match="no column 'body'; it has 'text'"):
        list(documents([tmp_path / "a.parquet"], "body"))


def test_folders_and_unknown_endings(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.doc"):
        (tmp_path / name).write_text(name)
    assert list(documents(find_files([tmp_path]))) == ["a.txt", "b.txt"]
    with pytest.raises(DataError, match=r"c\.doc: unknown ending"):
        list(documents(find_files([tmp_path / "c.doc"])))
    with pytest.raises(DataError, match="does not exist"):
        find_files([tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no file"):
        find_files([tmp_path / "empty"])


def test_what_of_a_folder_is_taken_and_what_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("b.txt", "sub/deep/a.txt", "c.doc", "sub/d.doc", "README", ".hidden.txt", ".git/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert list(documents(find_files([tmp_path]))) == ["b.txt", "sub/deep/a.txt"]
    (line,) = caplog.messages
    assert line == f"folder {tmp_path}: 2 files are read, left out are 2 .doc, 2 hidden, 1 no ending"
    caplog.clear()
    find_files([tmp_path / "sub" / "deep"])
    assert not caplog.messages


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_null_text_is_an_empty_one_in_every_kind_of_file(tmp_path: Path, name: str) -> None:
    if name.endswith("parquet"):
        pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
        parquet.write_table(pyarrow.table({"text": ["one", None]}), tmp_path / name)
    else:
        (tmp_path / name).write_text('{"text": "one"}\n{"text": null}')
    found = [texts_of(chunk, ("text",)) for chunk in chunks([tmp_path / name])]
    assert sum((texts.texts["text"] for texts in found), []) == ["one"]
    assert sum(texts.empty for texts in found) == 1


def test_what_counts_as_a_text(tmp_path: Path) -> None:
    lines = ['{"text": ["a", "b"], "body": "x"}', '"bare"', "", '\ufeff{"text": "mark", "body": ""}\r']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    first, last = (texts_of(chunk, ("text", "body")) for chunk in chunks([tmp_path / "a.jsonl"]))
    assert first.texts == {"text": ["a\n\nb", "bare"], "body": ["x", "bare"]} and first.empty == 0
    assert last.texts == {"text": ["mark"], "body": []} and last.empty == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{not json", "not JSON"),
        (b'{"text": "\xff"}', r"invalid UTF-8 at byte 10: b'\\xff"),
        (b'{"body": "x"}', "no field 'text'; the record has 'body'"),
        (b'{"text": 7}', "not text but int"),
        (b"[1]", "not text but list"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b"[" * 100_000, "nested too deep"),
    ],
)
def test_bad_lines_are_named_or_counted(tmp_path: Path, line: bytes, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(DataError, match=rf"a\.jsonl:3: .*{message}"):
        list(documents([file]))
    (chunk,) = chunks([file])
    found = texts_of(chunk, ("text",), skip_bad=True)
    assert found.texts["text"] == ["good", "fine"] and len(found.bad) == 1 and "a.jsonl:3" in found.bad[0]


def test_line_numbers_go_on_over_chunks(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "some words"}\n' * 50_000 + b"bad\n")
    assert len(list(chunks([tmp_path / "a.jsonl"]))) > 3
    with pytest.raises(DataError, match=r"a\.jsonl:50001: not JSON"):
        list(documents([tmp_path / "a.jsonl"]))


@given(st.lists(st.binary(max_size=6).map(lambda b: b.replace(b"\0", b"\n")), max_size=12))
def test_cutting_at_newlines_loses_nothing(blocks: list[bytes]) -> None:
    whole = b"".join(blocks)
    found = list(_lines("x", [block for block in blocks if block], is_json=False))
    records = [record for chunk in found if chunk.lines for record in chunk.lines.split(b"\n")]
    assert [record for record in records if record] == [line for line in whole.split(b"\n") if line]
    for chunk in found:
        if chunk.lines:
            assert whole.split(b"\n")[chunk.first - 1] == chunk.lines.split(b"\n")[0]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.zst", zstandard.compress(JSONL)[:-4]),
        ("a.jsonl.zst", b"no zstandard at all"),
        ("a.jsonl.gz", gzip.compress(JSONL)[:-9]),
        ("a.tar.gz", tar(MEMBERS, "w:gz")[:60]),
        ("a.zip", zipped(MEMBERS)[:60]),
        ("a.tar.xz", lzma.compress(b"no tar" * 400)),
        ("a.json.zst", zstandard.compress(b'[{"text": ')),
        ("a.dat.zst", zstandard.compress(b"%016d" % 99 + b"short")),
        ("a.dat.zst", zstandard.compress(b"no length at all")),
        ("a.parquet", b""),
        ("a.parquet", b"PAR1 no parquet at all PAR1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # not the content, which holds the time
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes) -> None:
    files = [tmp_path / name, tmp_path / "whole.jsonl"]
    files[0].write_bytes(content)
    files[1].write_bytes(JSONL)
    with pytest.raises(DataError, match=rf"{name.replace('.', '[.]')} is damaged: "):
        list(documents(files))
    found = [texts_of(chunk, ("text",), skip_bad=True) for chunk in chunks(files)]
    bad = [message for texts in found for message in texts.bad]
    assert len(bad) == 1 and str(files[0]) in bad[0]
    assert found[-1].texts["text"] == TEXTS


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_members_of_archives_are_read_by_their_endings(tmp_path: Path, kind: str) -> None:
    pa, pq = pytest.importorskip("pyarrow", reason="needs pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": ["three"]}), tmp_path / "c.parquet")
    members = {"a.jsonl": b'{"text": "one"}\n{"text": "two"}\n', "c.parquet": (tmp_path / "c.parquet").read_bytes()}
    members |= {"d": b"four"}
    (tmp_path / f"x.{kind}").write_bytes({"zip": zipped, "tar": tar}[kind](members))
    assert list(documents([tmp_path / f"x.{kind}"])) == ["one", "two", "three", "four"]


def test_a_zip_with_a_password_names_the_member(tmp_path: Path) -> None:
    content = bytearray(zipped(MEMBERS))
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # of the second member, in both directories
        second = content.index(signature, content.index(signature) + 1)
        content[second + flags] |= 1
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.zip/1\.txt needs a password"):
        list(documents([tmp_path / "a.zip"]))
    assert list(documents([tmp_path / "a.zip"], skip_bad=True)) == [TEXTS[0], TEXTS[2]]


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file in files:
        file.write_bytes(JSONL)
    found: list[Chunk] = list(chunks(files))
    assert [chunk.done_bytes for chunk in found] == [len(JSONL), 2 * len(JSONL)]


def test_arrow_files_of_both_kinds(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    table = pyarrow.table({"text": TEXTS, "n": [1, 2, 3]})
    for name, new in (("stream", pyarrow.ipc.new_stream), ("file", pyarrow.ipc.new_file)):
        path = tmp_path / f"{name}.arrow"
        with path.open("wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        assert list(documents([path])) == TEXTS
    with pytest.raises(DataError, match=r"file\.arrow: no column 'body'; it has 'text', 'n'"):
        list(documents([path], "body"))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"file\.arrow is damaged: not arrow"):
        list(documents([path]))


def test_an_arrow_file_that_points_out_of_its_values_is_damaged(tmp_path: Path) -> None:
    """Pyarrow itself follows such offsets, and dies or reads what is not the file's."""
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    path = tmp_path / "a.arrow"
    table = pyarrow.table({"text": ["hello", "wo", "rld"]})
    with path.open("wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    good, content = np.array([0, 5, 7, 10], "<i4").tobytes(), path.read_bytes()
    assert content.count(good) == 1
    for bad in ([0, 5, 2**31 - 1, 2**31 - 1], [0, -5, 7, 10], [0, 9, 3, 10]):
        path.write_bytes(content.replace(good, np.array(bad, "<i4").tobytes()))
        with pytest.raises(DataError, match=r"a\.arrow is damaged: In column 0: .*offset"):
            list(documents([path]))
    size = len(content) - content.index(good) - 8  # of the body, in the header before it; the end is 8 bytes
    assert content.count(size.to_bytes(8, "little")) == 1
    path.write_bytes(content.replace(size.to_bytes(8, "little"), (1 << 62).to_bytes(8, "little")))
    with pytest.raises(DataError, match=r"a\.arrow is damaged: a batch is said to be larger than the memory"):
        list(documents([path]))
    twice = pyarrow.record_batch([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    with path.open("wb") as sink, pyarrow.ipc.new_stream(sink, twice.schema) as writer:
        writer.write_batch(twice)
    with pytest.raises(DataError, match=r"a\.arrow: several columns are called 'text'"):
        list(documents([path]))


def test_a_dataset_of_hugging_face_on_disk(tmp_path: Path) -> None:
    """As the real package writes it: rows in order over shards, and results of `map` beside them."""
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    rows = [f"text {n}" for n in range(30)]
    split = datasets.Dataset.from_dict({"text": rows, "url": rows})
    split.save_to_disk(tmp_path / "one", num_shards=12)
    datasets.load_from_disk(str(tmp_path / "one")).map(lambda row: {"text": row["text"].upper()})
    assert list((tmp_path / "one").glob("cache-*.arrow"))
    assert list(documents(find_files([tmp_path / "one"]))) == rows
    split.shuffle(seed=1).save_to_disk(tmp_path / "shuffled")
    shuffled = list(documents(find_files([tmp_path / "shuffled"])))
    assert sorted(shuffled) == sorted(rows) and shuffled != rows
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match=r"holds the splits test, train .* name one, .*both/train"):
        find_files([tmp_path / "both"])
    assert list(documents(find_files([tmp_path / "both" / "test"]))) == rows
    (tmp_path / "both" / "train" / "state.json").unlink()
    with pytest.raises(DataError, match=r"holds the splits test .* name one, .*both/test"):
        find_files([tmp_path / "both"])
    (tmp_path / "both" / "test" / "state.json").write_text('{"_data_files": []}')
    with pytest.raises(DataError, match="this dataset of Hugging Face has no rows"):
        find_files([tmp_path / "both" / "test"])
    next((tmp_path / "one").glob("data-00003*")).unlink()
    with pytest.raises(DataError, match=r"state\.json names data-00003-of-00012\.arrow, which is not there"):
        find_files([tmp_path / "one"])


@pytest.mark.parametrize(
    ("index", "name"),
    [
        ({"version": 2, "shards": [{"format": "mds"}]}, "MosaicML's streaming"),
        ({"chunks": [], "config": {}}, "litdata"),
    ],
)
def test_datasets_of_packages_that_are_not_read_are_refused_by_name(tmp_path: Path, index: dict, name: str) -> None:
    (tmp_path / "index.json").write_text(json.dumps(index))
    (tmp_path / "more.jsonl").write_bytes(JSONL)
    with pytest.raises(DataError, match=rf"is a dataset of {name}.*, which is not read; write its text as JSON lines"):
        find_files([tmp_path])


@pytest.mark.parametrize("index", ['[{"text": "a page"}]', "not JSON", '{"chunks": "x"}', "{}"])
def test_other_files_of_that_name_are_nothing_special(tmp_path: Path, index: str) -> None:
    (tmp_path / "index.json").write_text(index)
    (tmp_path / "more.jsonl").write_bytes(JSONL)
    assert list(documents(find_files([tmp_path]))) == TEXTS


def test_an_array_is_unpacked_as_far_as_it_has_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("castalia.data.sources.MAX_JSON_BYTES", 1 << 20)
    (tmp_path / "a.json.zst").write_bytes(zstandard.compress(b"[" + b" " * (50 << 20)))
    with pytest.raises(DataError, match=r"a\.json\.zst is damaged: a JSON array of more than 1 MB"):
        list(documents([tmp_path / "a.json.zst"]))


def test_dolma_has_records_a_line_in_any_of_its_endings(tmp_path: Path) -> None:
    fields = {"source": "wiki", "added": "2024-01-01", "metadata": {"a": 1}}
    lines = "".join(json.dumps({"id": str(n), "text": text, **fields}) + "\n" for n, text in enumerate(TEXTS)).encode()
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "b.json.zst").write_bytes(zstandard.compress(lines))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    (tmp_path / "d.json.gz").write_bytes(gzip.compress(b"\n" + json.dumps(TEXTS).encode()))
    assert list(documents(find_files([tmp_path]))) == TEXTS * 4


def test_fineweb_as_it_is_published(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    numbers = list(range(len(TEXTS)))
    words = dict.fromkeys(("id", "dump", "url", "date", "file_path", "language"), [str(n) for n in numbers])
    table = pyarrow.table({"text": TEXTS, **words, "language_score": [0.9] * len(TEXTS), "token_count": numbers})
    (tmp_path / "data" / "CC-MAIN-2024-10").mkdir(parents=True)
    for name in ("000_00000.parquet", "000_00001.parquet"):
        parquet.write_table(table, tmp_path / "data" / "CC-MAIN-2024-10" / name, row_group_size=2)
    assert list(documents(find_files([tmp_path]))) == TEXTS * 2


def test_a_text_too_long_for_one_document_is_cut_between_paragraphs(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr("castalia.data.sources.LONGEST_TEXT", 300)
    monkeypatch.setattr("castalia.data.sources.PIECE_BYTES", 100)
    paragraphs = [f"Absatz {n} über Flüße.\nZweite Zeile." for n in range(20)]
    text = "\n\n".join(paragraphs) + "\n\n" + "ü" * 200 + "\nend"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text(text[:200])
    found = list(documents([tmp_path / "a.txt"]))
    assert "".join(found) == text and max(len(piece.encode()) for piece in found) <= 100
    assert all(piece.startswith("Absatz") for piece in found[:10])
    assert "a.txt: longer than 0 MB, so it is cut between paragraphs" in caplog.text
    assert list(documents([tmp_path / "b.txt"])) == [text[:200]]


def test_urls_are_read_by_fsspec(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec", reason="needs fsspec")
    memory = fsspec.filesystem("memory")
    for name, content in {"a.jsonl": JSONL, "b.jsonl.gz": gzip.compress(JSONL), "notes.doc": b"?"}.items():
        memory.pipe_file(f"/bucket/{name}", content)
    assert list(documents(find_files(["memory://bucket/a.jsonl"]))) == TEXTS
    assert list(documents(find_files(["memory://bucket"]))) == TEXTS * 2
    assert list(documents(find_files(["memory://bucket/*.gz", (tmp_path / "x.txt")][:1]))) == TEXTS
    (tmp_path / "local.txt").write_text("here")
    assert list(documents(find_files([f"file://{tmp_path}/local.txt"]))) == ["here"]
    with pytest.raises(DataError, match="input memory://bucket/none.jsonl does not exist"):
        find_files(["memory://bucket/none.jsonl"])
    with pytest.raises(DataError, match="nosuch://x: .*nosuch"):
        find_files(["nosuch://x"])


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """The address of a server of files, which a password and a signature do not matter to."""

    class Files(SimpleHTTPRequestHandler):
        def log_message(self, *parts: object) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            if "forbidden" in self.path:
                return self.send_error(403)
            if "broken" in self.path and "Range" in self.headers:
                return self.send_error(500)
            return super().do_GET()

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=tmp_path)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_files_of_a_web_server(tmp_path: Path, site: str) -> None:
    pytest.importorskip("aiohttp", reason="needs aiohttp")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(JSONL))
    (tmp_path / "broken.jsonl").write_bytes(JSONL)
    assert list(documents(find_files([f"{site}/a.jsonl.gz"]))) == TEXTS
    secret = site.replace("//", "//me:PASSWORD@")
    (file,) = find_files([f"{site}/a.jsonl.gz?signature=SECRET"])
    assert list(documents([file])) == TEXTS and str(file) == f"{site}/a.jsonl.gz"
    for url, message in {
        f"{site}/none.jsonl?signature=SECRET": r"/none\.jsonl cannot be read: 404",
        f"{site}/forbidden.jsonl?signature=SECRET": r"/forbidden\.jsonl cannot be read: 403",
        f"{site}/broken.jsonl?signature=SECRET": r"/broken\.jsonl: 500",  # only when it is read
        f"{secret}/none.jsonl": r"input http://127\.0\.0\.1:\d+/none\.jsonl cannot be read: ",
        f"{site}/": "unknown ending",  # a page, whose links may lead anywhere
    }.items():
        with pytest.raises(DataError, match=message) as raised:
            list(documents(find_files([url])))
        assert "SECRET" not in str(raised.value) and "PASSWORD" not in str(raised.value)


def test_parquet_is_read_over_fsspec_too(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec", reason="needs fsspec")
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    fsspec.filesystem("memory").pipe_file("/p/a.parquet", (tmp_path / "a.parquet").read_bytes())
    assert list(documents(find_files(["memory://p/a.parquet"]))) == TEXTS
