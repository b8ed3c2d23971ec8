"""What a folder holds: which files are read, which are not and why, how much text that is, and what it is like."""

from __future__ import annotations

import lzma
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from castalia.data.sources import chunks, texts_of, walk
from castalia.errors import DataError
from castalia.reading import plain_json

SAMPLE_BYTES = 64 << 20  # of files that are read to learn what a folder is like
XZ_BYTES = 4 << 20
FIELDS = ("text", "content", "body", "document", "article", "story", "markdown", "message")  # of JSON records


@dataclass
class Folder:
    """Files by the field that holds their text, and what was seen of them."""

    path: Path
    files: dict[str, list[Path]]
    left_out: Counter[str]
    kinds: Counter[str]  # of the files that are read, by ending
    bytes: int = 0  # of text, estimated where not all of it was read
    documents: int = 0  # likewise
    exact: bool = True
    bad: list[str] = field(default_factory=list)
    xz_bits_per_byte: float = 0.0

    @property
    def all_files(self) -> list[Path]:
        """The files that are read, of all kinds."""
        return [file for files in self.files.values() for file in files]


def look(folder: Path, not_inside: Path | None = None) -> Folder:
    """Walks the folder (or takes the one file), and reads up to 64 MiB of it. `not_inside`: a folder of our own.

    Raises DataError where there is no text at all.
    """
    if not folder.exists():
        raise DataError(f"{folder} does not exist; name a folder with text files in it")
    files, left_out = walk(folder) if folder.is_dir() else ([folder], Counter[str]())
    if not_inside is not None:
        own = [file for file in files if not_inside.resolve() in file.resolve().parents]
        files = [file for file in files if file not in own]
        if own:
            left_out["of earlier runs here"] = len(own)
    seen = Folder(folder, {}, left_out, Counter(_ending(file) for file in files))
    for file in files:
        if key := _text_field(file):
            seen.files.setdefault(key, []).append(file)
        else:
            seen.left_out[f"{_ending(file)} without a text field"] += 1
            seen.kinds[_ending(file)] -= 1
    if not seen.files:
        others = f"; it holds {describe(seen.left_out)}" if seen.left_out else ""
        raise DataError(f"{folder} holds no text that can be read (txt, md, html, jsonl, parquet, ...){others}")
    _sample(seen)
    if not seen.bytes:
        raise DataError(f"the {len(files):,} files of {folder} hold no text" + (f": {seen.bad[0]}" if seen.bad else ""))
    return seen


def texts(folder: Folder, most_bytes: int) -> Iterator[str]:
    """Documents from all over the folder, up to so many bytes of files: every n-th file first, then the others."""
    read = 0
    for key, file in _spread(folder):
        for chunk in chunks([file], (key,)):
            yield from texts_of(chunk, (key,), skip_bad=True).texts[key]
            if read + chunk.done_bytes > most_bytes:
                return
        read += file.stat().st_size


def describe(counts: Counter[str]) -> str:
    """3 .txt, 1 .md"""
    return ", ".join(f"{count:,} {name}" for name, count in counts.most_common() if count)


def _spread(folder: Folder) -> list[tuple[str, Path]]:
    pairs = [(key, file) for key, files in folder.files.items() for file in files]
    step = max(1, round(len(pairs) ** 0.5))
    return [pair for first in range(step) for pair in pairs[first::step]]


def _sample(folder: Folder) -> None:
    """Counts the text of the folder, or of so much of it that the rest can be told from it."""
    total, read, begun = sum(file.stat().st_size for file in folder.all_files), 0, bytearray()
    for key, file in _spread(folder):
        done = 0
        for chunk in chunks([file], (key,)):
            parsed = texts_of(chunk, (key,), skip_bad=True)
            folder.bad += parsed.bad
            for text in parsed.texts[key]:
                encoded = text.encode()
                folder.bytes += len(encoded)
                folder.documents += 1
                if len(begun) < XZ_BYTES:
                    begun += encoded
            done = chunk.done_bytes
            if read + done > SAMPLE_BYTES:
                break
        read += done
        if read > SAMPLE_BYTES:
            break
    # `total` and `read` count bytes of files, which may be compressed; `bytes` counts the text in them.
    folder.exact = read >= total
    if not folder.exact:
        folder.bytes = round(folder.bytes * total / read)
        folder.documents = max(1, round(folder.documents * total / read))
    begun = begun[:XZ_BYTES]
    folder.xz_bits_per_byte = 8 * len(lzma.compress(bytes(begun), preset=6)) / max(1, len(begun))


def _ending(file: Path) -> str:
    return file.suffix or "no ending"


def _text_field(file: Path) -> str | None:
    """The field of a file's records that holds its text; of plain texts any. None where no field does."""
    if file.suffix == ".parquet":
        return _chosen(_parquet_columns(file))
    chunk = next(iter(chunks([file])), None)
    if chunk is None or not chunk.is_json:
        return "text"
    lines = chunk.lines.split(b"\n") if chunk.lines else chunk.records
    for line in islice(lines, 100):  # blank or damaged lines may come first
        try:
            record = plain_json(line) if line.strip() else None
        except ValueError:
            continue
        if isinstance(record, dict):
            # A field may hold a list of paragraphs as well.
            return _chosen([name for name, value in record.items() if isinstance(value, str | list)])
        if isinstance(record, str):
            return "text"
    return None


def _chosen(names: list[str]) -> str | None:
    return next((name for name in FIELDS if name in names), None)


def _parquet_columns(file: Path) -> list[str]:
    try:
        from pyarrow.parquet import read_schema
    except ImportError:
        raise DataError(f"{file}: reading parquet needs the package pyarrow: pip install pyarrow") from None
    try:
        return list(read_schema(file).names)
    except (OSError, ValueError):
        return []  # damaged: passed over like a file without a text field
