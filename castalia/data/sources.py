"""Documents from files of many kinds, as a stream of chunks that are cheap to read and to send to another process.

The ending of a file decides how it is read: see `READERS`. Readers cut raw bytes into records; JSON and UTF-8 are
parsed by `texts_of`, in the process that works on the chunk.
"""

from __future__ import annotations

import json
import logging
import lzma
import re
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from importlib import import_module
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import IO, Any

import zstandard

from castalia.data.dataset_folders import files_of_dataset
from castalia.data.remote_files import RemoteFile, find_remote, is_remote, without_secrets
from castalia.errors import DataError, refuse_pointer
from castalia.reading import MAX_JSON_BYTES, plain_json

log = logging.getLogger(__name__)
BLOCK_BYTES = 1 << 18  # read at a time; chunks are about as large
LONGEST_TEXT = 64 << 20  # bytes of a text file that is one document
PIECE_BYTES = 4 << 20  # of a longer one
ROWS_AT_ONCE = 1000  # of parquet and arrow files; a row may be a book
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can escape half of a pair, and Python keeps it so


class BadRecord(DataError):
    """A record from which no document can be read."""


class MissingField(BadRecord, ValueError):
    """A record without the field that was asked for."""


class Damaged(Exception):
    """The rest of a file, or a member of an archive, that cannot be read."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive records of one file: either `lines`, which are cut at newlines when they are parsed, or `records`.

    `damage` stands in place of records, and says why the rest of the file cannot be read.
    """

    path: str
    first: int  # number of the first record: a line, an entry or a member, counted from 1
    is_json: bool
    lines: bytes = b""
    records: tuple[bytes, ...] = ()
    damage: str = ""
    done_bytes: int = 0  # bytes of all inputs read so far


@dataclass
class Texts:
    """The texts of a chunk by key, and messages about its bad records."""

    texts: dict[str, list[Any]]  # strings, or the results of `parse`
    bad: list[str] = field(default_factory=list)
    empty: int = 0


InputFile = Path | RemoteFile


def find_files(inputs: Iterable[str | Path]) -> list[InputFile]:
    """The files among `inputs`, and the files with a known ending in folders and their subfolders, in order of path.

    An input may be a URL that fsspec reads, of a file, a folder or a pattern. A warning counts the files of a folder
    that are left out. Raises DataError for an input that does not exist, for a folder without files of a known ending,
    and for one of another program whose files are not read.
    """
    files: list[InputFile] = []
    for given in inputs:
        path = Path(given)
        if is_remote(given):
            files += _remote_files(str(given))
        elif path.is_dir():
            files += _files_inside(path)
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"input {path} does not exist")
    return files


def _remote_files(url: str) -> list[InputFile]:
    found, single = find_remote(url)
    if single:
        return list(found)
    url = without_secrets(url)
    known: list[InputFile] = [file for file in found if _reader(file) is not None]
    if not known:
        raise DataError(f"{url} holds no file with a known ending: {', '.join(READERS)}")
    if len(known) < len(found):
        log.warning("%s: %d files are read, %d of other endings are left out", url, len(known), len(found) - len(known))
    return known


def _files_inside(folder: Path) -> list[Path]:
    if (files := files_of_dataset(folder)) is not None:
        return files
    known, left_out = walk(folder)
    if not known:
        raise DataError(f"folder {folder} holds no file with a known ending: {', '.join(READERS)}")
    if left_out:
        counts = ", ".join(f"{count} {ending}" for ending, count in left_out.most_common())
        log.warning("folder %s: %d files are read, left out are %s", folder, len(known), counts)
    return known


def walk(folder: Path) -> tuple[list[Path], Counter[str]]:
    """Files with a known ending in a folder and its subfolders, by path, and how many others there are of each ending.

    Hidden files, and those in hidden folders, count as such.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    hidden = {file for file in files if any(part.startswith(".") for part in file.relative_to(folder).parts)}
    seen = [file for file in files if file not in hidden]
    left_out = Counter(file.suffix or "no ending" for file in seen if _reader(file) is None)
    if hidden:
        left_out["hidden"] = len(hidden)
    return [file for file in seen if _reader(file) is not None], left_out


DAMAGE = (Damaged, zstandard.ZstdError, zlib.error, lzma.LZMAError, EOFError, tarfile.TarError, zipfile.BadZipFile)


def chunks(files: Sequence[InputFile], keys: Sequence[str] = ("text",)) -> Iterator[Chunk]:
    """All chunks of the files in order. `keys` are the columns of parquet files, all of them if there are none.

    A damaged file ends with a chunk that says so. Raises DataError for an unknown kind and for columns that lack.
    """
    before = 0
    for path in files:
        reader = _reader(path) or (_read_json if path.suffix == ".json" else None)
        if reader is None:
            raise DataError(f"{path}: unknown ending; known are {', '.join(READERS)}")
        with path.open("rb") as file:
            try:
                refuse_pointer("it", file.peek(64), Damaged)  # of Git LFS, in place of the file
                for chunk in reader(file, str(path), keys):
                    yield replace(chunk, done_bytes=before + file.tell())
            except DAMAGE as error:
                done = before + path.stat().st_size
                yield Chunk(str(path), 1, False, damage=f"{path} is damaged: {error}", done_bytes=done)
        before += path.stat().st_size


def texts_of(
    chunk: Chunk,
    keys: Sequence[str],
    skip_bad: bool = False,
    parse: Callable[[Any, Sequence[str]], dict[str, Any]] | None = None,
) -> Texts:
    """Parse a chunk. A bad record raises BadRecord with file and line, or with `skip_bad` becomes a message in `bad`.

    `parse` turns a JSON value into something other than one text for each key; it raises ValueError for a bad value.
    """
    result = Texts({key: [] for key in keys})
    if chunk.damage:
        if not skip_bad:
            raise BadRecord(chunk.damage)
        result.bad.append(f"{chunk.damage}; what is left of it is left out")
        return result
    records = [line.removesuffix(b"\r") for line in chunk.lines.split(b"\n")] if chunk.lines else chunk.records
    for number, record in enumerate(records, start=chunk.first):
        if chunk.is_json and not record.strip():
            continue  # a blank line, or the end of the file after the last newline
        try:
            if chunk.is_json:
                texts = (parse or _texts)(_json(record), keys)
            elif parse is None:
                texts = dict.fromkeys(keys, _decode(record))
            else:
                raise ValueError("expected JSON records, found plain text")
        except ValueError as error:
            message = f"{chunk.path}:{number}: {error}"
            if not skip_bad:
                kind = MissingField if isinstance(error, MissingField) else BadRecord
                raise kind(f"{message}; mend it or take it out") from None
            result.bad.append(message)
            continue
        for key, text in texts.items():
            if text:
                result.texts[key].append(text)
            else:
                result.empty += 1
    return result


def documents(files: Sequence[InputFile], key: str = "text", skip_bad: bool = False) -> Iterator[str]:
    """The texts of all files, parsed in this process. Raises BadRecord unless `skip_bad`."""
    for chunk in chunks(files, (key,)):
        yield from texts_of(chunk, (key,), skip_bad).texts[key]


def _decode(record: bytes) -> str:
    try:
        return record.decode("utf-8-sig")  # without the mark that Windows puts in front
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start}: {record[error.start : error.start + 4]!r}") from None


def _json(record: bytes) -> Any:
    text = _decode(record)
    try:
        return plain_json(text)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None


def field_of(value: Any, key: str) -> Any:
    """A field of a record; of `text|body` the first that it has. Raises MissingField.

    A record that is not a JSON object counts as the field itself.
    """
    if not isinstance(value, dict):
        return value
    for name in key.split("|"):
        if name in value:
            return value[name]
    raise MissingField(f"no field {key!r}; the record has {', '.join(map(repr, value)) or 'none'}")


def _texts(value: Any, keys: Sequence[str]) -> dict[str, str]:
    texts = {}
    for key in keys:
        text = field_of(value, key)
        if text is None:
            text = ""
        if isinstance(text, list) and all(isinstance(part, str) for part in text):
            text = "\n\n".join(text)
        if not isinstance(text, str):
            raise ValueError(f"field {key!r} is not text but {type(text).__name__}")
        if not text.isascii() and SURROGATE.search(text):
            raise ValueError(f"field {key!r} holds half of a surrogate pair, which no UTF-8 can express")
        texts[key] = text
    return texts


# --- bytes ---


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(BLOCK_BYTES):
        yield block


def _decompress(file: IO[bytes], new: Callable) -> Iterator[bytes]:
    """Decompressed blocks of one stream or several back to back. Zeros may follow, by which tapes and disks pad files.

    Raises EOFError if the last stream is incomplete.
    """
    stream, begun = None, False
    for block in _blocks(file):
        while block:
            if stream is None and begun and not (block := block.lstrip(b"\0")):
                break
            stream, begun = stream or new(), True
            yield stream.decompress(block)
            block = stream.unused_data if stream.eof else b""
            stream = None if stream.eof else stream
    if stream is not None:
        raise EOFError("it ends in the middle of its compressed data")


def _gunzip(file: IO[bytes]) -> Iterator[bytes]:
    return _decompress(file, lambda: zlib.decompressobj(wbits=31))  # 31: gzip's header and checksum, not zlib's


def _unzstd(file: IO[bytes]) -> Iterator[bytes]:
    """Decompress zstd, even with the longest window, `zstd --long=31`."""
    return _decompress(file, lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj())


# --- records: each reader takes (open file, path for messages, keys) ---


def _lines(path: str, blocks: Iterable[bytes], is_json: bool) -> Iterator[Chunk]:
    first, pending = 1, []
    for block in blocks:
        head, newline, rest = block.rpartition(b"\n")
        if not newline:
            pending.append(block)  # a line longer than a block
            continue
        lines = b"".join([*pending, head])
        yield Chunk(path, first, is_json, lines=lines)
        first += lines.count(b"\n") + 1  # + 1: the newline after `head`
        pending = [rest]
    if rest := b"".join(pending):
        yield Chunk(path, first, is_json, lines=rest)


def _read_jsonl(file: IO[bytes], path: str, keys: Sequence[str]) -> Iterator[Chunk]:
    return _lines(path, _blocks(file), is_json=True)


def _read_jsonl_zst(file: IO[bytes], path: str, keys: Sequence[str]) -> Iterator[Chunk]:
    return _lines(path, _unzstd(file), is_json=True)


def _read_json_gz(file: IO[bytes], path: str, keys: Sequence[str]) -> Iterator[Chunk]:
    return _lines_or_array(path, _gunzip(file))


def _read_gz(file: IO[bytes], path: str, keys: Sequence[str]) -> Iterator[Chunk]:
    return _lines(path, _gunzip(file), is_json=False)


def _read_json(file: IO[bytes], path: str, keys: Sequence[str]) -> Iterator[Chunk]:
    """An array of records, or a record a line. Not among `READERS`: in folders such files are mostly settings."""
    start = file.read(64).lstrip()[:1]
    file.seek(0)
    if start != b"[":
        return _lines(path, _blocks(file), is_json=True)
    return _grouped(path, _array_records(file.read()), is_json=True)


def _read_txt(file: IO[bytes], path: str, keys: Sequence[str]) -> Iterator[Chunk]:
    """A text is one document, unless it is so long that it would not fit into memory with its token ids."""
    text = file.read(LONGEST_TEXT + 1)
    if len(text) <= LONGEST_TEXT:
        yield Chunk(path, 1, is_json=False, records=(text,))
        return
    log.warning(
        "%s: longer than %d MB, so it is cut between paragraphs, or else lines, into documents of at most %d MB",
        path, LONGEST_TEXT >> 20, PIECE_BYTES >> 20,
    )  # fmt: skip
    for number, piece in enumerate(_pieces(chain((text,), _blocks(file))), start=1):
        yield Chunk(path, number, is_json=False, records=(piece,))


def _pieces(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """A text in pieces of at most `PIECE_BYTES`, cut after a blank line, else a line, else a character."""
    rest = bytearray()
    for block in blocks:
        rest += block
        start = 0
        while len(rest) - start > PIECE_BYTES:
            end = start + PIECE_BYTES
            cut = max(rest.rfind(b"\n\n", start, end) + 2, rest.rfind(b"\r\n\r\n", start, end) + 4)
            if cut <= start + 4:
                cut = rest.rfind(b"\n", start, end) + 1
            if cut <= start:
                cut = end
                while rest[cut] & 0xC0 == 0x80 and cut > end - 4:  # within a character
                    cut -= 1
            yield bytes(rest[start:cut])
            start = cut
        del rest[:start]
    if rest:
        yield bytes(rest)


class _Page(HTMLParser):
    """Collects the visible text of a page, one line for each block."""

    UNSEEN = frozenset({"script", "style", "template", "noscript", "head"})
    INLINE = frozenset({"a", "abbr", "b", "cite", "code", "em", "font", "i", "kbd", "mark", "q", "s", "samp", "small"})
    INLINE |= frozenset({"span", "strong", "sub", "sup", "time", "tt", "u", "var", "wbr"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.unseen: str | None = None  # the open tag whose content is not shown

    def handle_starttag(self, tag: str, attrs: object) -> None:
        """Note the start of an element; elements that are not inline begin a new line."""
        if tag == "body":  # it ends the head, even if that was not closed
            self.unseen = None
        if self.unseen is None and tag in self.UNSEEN:
            self.unseen = tag
        elif tag not in self.INLINE:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        """Note the end of an element."""
        if tag == self.unseen:
            self.unseen = None
        elif tag not in self.INLINE:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        """Keep text that a reader of the page would see."""
        if self.unseen is None:
            self.parts.append(re.sub(r"\s+", " ", data))


def page_text(html: str) -> str:
    """The visible text of an HTML page, one line for each block."""
    page = _Page()
    page.feed(html)
    page.close()
    lines = (" ".join(line.split()) for line in "".join(page.parts).split("\n"))
    return "\n".join(line for line in lines if line)


def _read_html(file: IO[bytes], path: str, keys: Sequence[str]) -> Iterator[Chunk]:
    """A page is one document. Bytes that are not UTF-8 are kept, and refused when the chunk is parsed."""
    raw = file.read()
    with suppress(UnicodeDecodeError):
        raw = page_text(raw.decode("utf-8-sig")).encode()
    yield Chunk(path, 1, is_json=False, records=(raw,))


def _read_json_zst(file: IO[bytes], path: str, keys: Sequence[str]) -> Iterator[Chunk]:
    return _lines_or_array(path, _unzstd(file))


def _lines_or_array(path: str, blocks: Iterator[bytes]) -> Iterator[Chunk]:
    """A record a line, as Dolma and C4 have it, or one JSON array of records."""
    first = next(blocks, b"")
    if first.lstrip()[:1] == b"[":
        return _grouped(path, _array_records(_whole(chain((first,), blocks))), is_json=True)
    return _lines(path, chain((first,), blocks), is_json=True)


def _whole(blocks: Iterable[bytes]) -> bytes:
    """What is unpacked, as far as an array has room in memory."""
    content = bytearray()
    for block in blocks:
        content += block
        if len(content) > MAX_JSON_BYTES:
            raise Damaged(f"a JSON array of more than {MAX_JSON_BYTES >> 20} MB; write it as a record a line")
    return bytes(content)


def _array_records(content: bytes) -> Iterator[bytes]:
    try:
        values = plain_json(content)
    except ValueError as error:
        raise Damaged(f"not JSON: {error}") from error
    if not isinstance(values, list):
        raise Damaged(f"expected a JSON array of texts, found {type(values).__name__}")
    return (json.dumps(value).encode() for value in values)  # parsed again by `texts_of`, as all records are


def _read_dat_zst(file: IO[bytes], path: str, keys: Sequence[str]) -> Iterator[Chunk]:
    """Records of 16 ASCII digits, the length in bytes, and a text of that length."""
    return _grouped(path, _dat_records(_unzstd(file)), is_json=False)


def _dat_records(blocks: Iterator[bytes]) -> Iterator[bytes]:
    buffer, number = bytearray(), 0

    def take(size: int) -> bytes:
        while len(buffer) < size and (block := next(blocks, None)) is not None:
            buffer.extend(block)
        if len(buffer) < size:
            raise Damaged(f"record {number} ends too early: {len(buffer)} of {size} bytes")
        taken = bytes(buffer[:size])
        del buffer[:size]
        return taken

    def more() -> bool:
        buffer.extend(next(blocks, b""))
        return bool(buffer)

    while buffer or more():
        number += 1
        header = take(16)
        if not header.strip().isdigit():
            raise Damaged(f"record {number} begins with {header!r} instead of its length")
        yield take(int(header))


def _read_zip(file: IO[bytes], path: str, keys: Sequence[str]) -> Iterator[Chunk]:
    """Read members like files of their ending; a member with an unknown ending is one document."""
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if not info.is_dir():
                yield from _zip_member(archive, info, f"{path}/{info.filename}", keys)


def _zip_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: str, keys: Sequence[str]) -> Iterator[Chunk]:
    if info.flag_bits & 1:
        yield Chunk(path, 1, False, damage=f"{path} needs a password; unpack the archive first")
        return
    reader = _reader(Path(info.filename)) or _read_txt
    try:
        with archive.open(info) as inside:
            yield from reader(inside, path, keys)
    except (NotImplementedError, *DAMAGE) as error:  # the former: a compression that Python does not know
        yield Chunk(path, 1, False, damage=f"{path} cannot be read: {error}")


def _read_tar(file: IO[bytes], path: str, keys: Sequence[str]) -> Iterator[Chunk]:
    """Read members like files of their ending; a member with an unknown ending is one document."""
    with tarfile.open(fileobj=file, mode="r|*") as archive:  # a stream of any compression, never sought in
        for member in archive:
            inside = archive.extractfile(member) if member.isfile() else None
            if inside is not None:
                reader = _reader(Path(member.name)) or _read_txt
                whole = (
                    BytesIO(inside.read()) if reader in (_read_parquet, _read_arrow) else inside
                )  # it needs random access
                yield from reader(whole, f"{path}/{member.name}", keys)


def _read_parquet(file: IO[bytes], path: str, keys: Sequence[str]) -> Iterator[Chunk]:
    errors = _arrow_errors(path, "parquet")
    try:
        table = import_module("pyarrow.parquet").ParquetFile(file)
        names = table.schema_arrow.names
    except errors as error:
        raise Damaged(f"not parquet: {error}") from error
    columns = _columns(path, names, keys)
    batches = table.iter_batches(ROWS_AT_ONCE, columns=columns)
    return _grouped(path, _row_records(batches, columns, errors), is_json=True)


def _read_arrow(file: IO[bytes], path: str, keys: Sequence[str]) -> Iterator[Chunk]:
    """A stream or a file of Arrow batches; the former is what Hugging Face's datasets have on disk."""
    errors = _arrow_errors(path, "arrow")
    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    try:
        ipc = import_module("pyarrow.ipc")
        table = ipc.open_file(file) if is_file else ipc.open_stream(file)
        names = table.schema.names
    except errors as error:
        raise Damaged(f"not arrow: {error}") from error
    columns = _columns(path, names, keys)
    batches = (table.get_batch(n) for n in range(table.num_record_batches)) if is_file else iter(table)
    rows = (batch.slice(n, ROWS_AT_ONCE) for batch in _validated(batches, columns) for n in _starts(batch))
    return _grouped(path, _row_records(rows, columns, errors), is_json=True)


def _arrow_errors(path: str, kind: str) -> tuple[type[Exception], ...]:
    """What pyarrow raises for files that are damaged. Raises DataError where it is missing."""
    try:
        return (OSError, ValueError, OverflowError, MemoryError, import_module("pyarrow").ArrowException)
    except ImportError:
        raise DataError(f"{path}: reading {kind} needs the package pyarrow: pip install pyarrow") from None


def _validated(batches: Iterable[Any], columns: list[str]) -> Iterator[Any]:
    """The columns of batches, whose offsets pyarrow else follows out of its memory."""
    for batch in batches:
        chosen = batch.select(columns)
        chosen.validate(full=True)
        yield chosen


def _starts(batch: Any) -> range:
    return range(0, batch.num_rows, ROWS_AT_ONCE)


def _columns(path: str, names: Sequence[str], keys: Sequence[str]) -> list[str]:
    """The columns that hold the keys, all of them if there are none. Raises DataError for one that is not there."""
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{path}: several columns are called {twice[0]!r}; leave one of them")
    missing = [key for key in keys if not set(key.split("|")) & set(names)]
    if missing:
        raise DataError(f"{path}: no column {missing[0]!r}; it has {', '.join(map(repr, names))}")
    asked = {name for key in keys for name in key.split("|")}
    return [name for name in names if name in asked or not keys]


def _row_records(batches: Iterator[Any], keys: list[str], errors: tuple[type[Exception], ...]) -> Iterator[bytes]:
    """Rows as JSON objects. A value that JSON cannot hold becomes an object, which `texts_of` refuses."""
    while True:
        try:
            batch = next(batches, None)
            rows = [] if batch is None else batch.to_pylist()
        except errors as error:
            raise Damaged(str(error) or "a batch is said to be larger than the memory") from error
        if batch is None:
            return
        for row in rows:
            yield json.dumps({key: row[key] for key in keys}, ensure_ascii=False, default=_no_json).encode()


def _no_json(value: Any) -> dict[str, str]:
    return {"no JSON": type(value).__name__}


def _grouped(path: str, records: Iterable[bytes], is_json: bool) -> Iterator[Chunk]:
    first, group, size = 1, [], 0
    for record in records:
        group.append(record)
        size += len(record)
        if size >= BLOCK_BYTES:
            yield Chunk(path, first, is_json, records=tuple(group))
            first, group, size = first + len(group), [], 0
    if group:
        yield Chunk(path, first, is_json, records=tuple(group))


Reader = Callable[[IO[bytes], str, Sequence[str]], Iterator[Chunk]]
READERS: dict[str, Reader] = {
    ".jsonl": _read_jsonl,
    ".jsonl.zst": _read_jsonl_zst,
    ".jsonl.gz": _read_json_gz,
    ".jsonl.zst.tar": _read_tar,
    ".txt": _read_txt,
    ".md": _read_txt,
    ".html": _read_html,
    ".htm": _read_html,
    ".json.gz": _read_json_gz,
    ".json.zst": _read_json_zst,
    ".dat.zst": _read_dat_zst,
    ".zip": _read_zip,
    ".tar": _read_tar,
    ".tar.gz": _read_tar,
    ".tgz": _read_tar,
    ".tar.xz": _read_tar,
    "_data.xz": _read_tar,  # OpenWebText: urlsf_subset*_data.xz, archives within openwebtext.tar.xz
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".gz": _read_gz,
}


def _reader(path: InputFile) -> Reader | None:
    """The reader of the longest ending that fits."""
    endings = [ending for ending in READERS if path.name.endswith(ending)]
    return READERS[max(endings, key=len)] if endings else None
