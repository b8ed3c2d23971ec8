"""Tables of figures as CSV or Parquet files."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from castalia.errors import ConfigError, DataError
from castalia.files import appearing, write_text

ENDINGS = (".csv", ".parquet")


def check_table(path: Path | None, option: str = "--output") -> None:
    """Raise ConfigError unless the file's ending names a table format that can be written here."""
    if path is None:
        return
    if path.suffix.lower() not in ENDINGS:
        raise ConfigError(f"{option} {path}: a table's name ends with .csv or .parquet")
    if path.suffix.lower() == ".parquet":
        _pyarrow()


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of equal columns, in the format of the file's ending; None is an empty cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(path, text.getvalue())
        return
    arrow, parquet = _pyarrow()
    columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else {})}
    with appearing(path) as file:
        parquet.write_table(arrow.table(columns), file)


def _pyarrow() -> tuple[Any, Any]:
    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        raise DataError("writing parquet needs the package pyarrow: pip install pyarrow; or name a .csv file") from None
