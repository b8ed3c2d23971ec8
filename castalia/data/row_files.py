"""Files of rows that are written as they come: JSON lines, CSV or Parquet, by the ending of the name."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from castalia.errors import ConfigError, DataError
from castalia.files import appearing

Block = Sequence[Mapping[str, Any]]


def check_row_file(path: Path, option: str = "--output") -> None:
    """Raise ConfigError unless the ending names a format, DataError where it needs a package that is missing."""
    if path.suffix.lower() not in WRITERS:
        raise ConfigError(f"{option} {path}: the name of a file of rows ends with {', '.join(WRITERS)}")
    if path.suffix.lower() == ".parquet":
        _arrow()


def write_rows(path: Path, blocks: Iterable[Block]) -> int:
    """Write blocks of rows, all with the same columns, and return how many rows there are.

    The file appears when all of it is written. In CSV, lists and mappings are JSON.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    counts: list[int] = []

    def counted() -> Iterator[Block]:
        for block in blocks:
            counts.append(len(block))
            yield block

    with appearing(path) as file:
        WRITERS[path.suffix.lower()](file, counted())
    return sum(counts)


def _write_jsonl(file: IO[bytes], blocks: Iterable[Block]) -> None:
    for block in blocks:
        file.writelines(f"{json.dumps(row, ensure_ascii=False)}\n".encode() for row in block)


def _write_csv(file: IO[bytes], blocks: Iterable[Block]) -> None:
    text = io.TextIOWrapper(file, "utf-8", newline="", write_through=True)
    writer: csv.DictWriter[str] | None = None
    for block in blocks:
        for row in block:
            if writer is None:
                writer = csv.DictWriter(text, list(row), lineterminator="\n")
                writer.writeheader()
            writer.writerow({name: _cell(value) for name, value in row.items()})
    text.detach()  # the file is closed by whoever opened it


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value


def _write_parquet(file: IO[bytes], blocks: Iterable[Block]) -> None:
    arrow, parquet = _arrow()
    writer = None
    try:
        for block in blocks:
            table = arrow.Table.from_pylist(list(block), schema=writer.schema if writer else None)
            writer = writer or parquet.ParquetWriter(file, table.schema)
            writer.write_table(table)
    finally:
        if writer:
            writer.close()


def _arrow() -> tuple[Any, Any]:
    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        raise DataError(
            "writing parquet needs the package pyarrow: pip install pyarrow; or name a .jsonl or .csv file"
        ) from None


WRITERS = {".jsonl": _write_jsonl, ".csv": _write_csv, ".parquet": _write_parquet}
