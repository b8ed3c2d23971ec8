"""Training sequences as suites publish them: in the order of training already, in several `.bin` or Parquet files.

    document-00000-of-00020.bin ...   the bytes of one document.bin in shards of one size, the last one shorter; a row
                                      is one sequence of 2,049 ids, and may go on in the next shard
    train-001000.parquet ...          columns `token_ids` and, from 0, `batch_idx`

Step t, from 0, takes rows t * batch size up to the next step's, or those with its `batch_idx`. Shards that are not
there leave a gap; nothing is merged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import escape
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from castalia.data.indexed import idx_path, read_row_form
from castalia.errors import DataError, refuse_pointer

SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.bin")
ROW_TOKENS = 2049  # a sequence of Pythia and the token after it
ROW_DTYPE = np.dtype("<u2")
BATCH_SIZE = 1024  # of Pythia
ROWS_AT_ONCE = 4096  # about 16 MB of Pythia's
ID_COLUMNS = ("token_ids", "input_ids", "tokens")
STEP_COLUMN = "batch_idx"


class RowBlock(NamedTuple):
    """Rows that lie back to back in `tokens`."""

    tokens: np.ndarray  # ids
    starts: np.ndarray  # i64 [rows + 1]: where in `tokens` each row begins, and the end
    steps: np.ndarray  # i64 [rows], from 0
    rows: np.ndarray  # i64 [rows], within the step, from 0
    source: str  # of an error: where the rows are


@dataclass(frozen=True)
class ShardedRows:
    """Rows in the shards of a `.bin`, of which some may not be here."""

    shards: dict[int, Path]  # by their numbers
    shard_bytes: int  # of each but the last
    total_bytes: int | None  # of all shards; None: the last is not here
    row_tokens: int
    dtype: np.dtype
    batch_size: int
    missing: tuple[str, ...]

    @property
    def bytes_here(self) -> int:
        """The size of all shards that are here."""
        return sum(path.stat().st_size for path in self.shards.values())

    def blocks(self, steps: range | None = None) -> Iterator[RowBlock]:
        """The rows of these steps (from 0), or all that are here, in order.

        Raises DataError if a row of the steps is not here.
        """
        for first, end in self._spans() if steps is None else [self._rows_of(steps)]:
            for begin in range(first, end, ROWS_AT_ONCE):
                numbers = np.arange(begin, min(end, begin + ROWS_AT_ONCE))
                row_bytes = self.row_tokens * self.dtype.itemsize
                raw = self._bytes(begin * row_bytes, (int(numbers[-1]) + 1) * row_bytes)
                starts = np.arange(len(numbers) + 1, dtype=np.int64) * self.row_tokens
                source = f"rows {begin:,} to {numbers[-1]:,}"
                yield RowBlock(raw.view(self.dtype), starts, *np.divmod(numbers, self.batch_size), source)

    def _rows_of(self, steps: range) -> tuple[int, int]:
        end = steps.stop * self.batch_size
        if self.total_bytes is not None:
            rows = self.total_bytes // (self.row_tokens * self.dtype.itemsize)
            if end > rows:
                raise DataError(f"step {steps.stop} is not in these files: they hold {rows // self.batch_size:,} steps")
        return steps.start * self.batch_size, end

    def _spans(self) -> Iterator[tuple[int, int]]:
        """The rows [first, end) that lie in shards that follow each other."""
        row_bytes, numbers = self.row_tokens * self.dtype.itemsize, sorted(self.shards)
        while numbers:
            run = 1
            while run < len(numbers) and numbers[run] == numbers[0] + run:
                run += 1
            begin, last = numbers[0] * self.shard_bytes, numbers[run - 1]
            end = last * self.shard_bytes + self.shards[last].stat().st_size
            yield -(-begin // row_bytes), end // row_bytes
            numbers = numbers[run:]

    def _bytes(self, begin: int, end: int) -> np.ndarray:
        pieces = []
        while begin < end:
            number = begin // self.shard_bytes
            if number not in self.shards:
                raise DataError(f"shard {number:05} is not here, and the rows asked for lie in it; fetch it")
            at = begin - number * self.shard_bytes
            taken = min(end - begin, self.shard_bytes - at)
            pieces.append(np.fromfile(self.shards[number], np.uint8, taken, offset=at))
            if len(pieces[-1]) < taken:
                raise DataError(f"{self.shards[number]} is truncated: it ends at byte {at + len(pieces[-1])}")
            begin += taken
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


@dataclass(frozen=True)
class ParquetRows:
    """Rows in Parquet files, in the order of the files' names."""

    files: tuple[Path, ...]
    batch_size: int
    missing: tuple[str, ...] = ()

    @property
    def bytes_here(self) -> int:
        """The size of all files."""
        return sum(path.stat().st_size for path in self.files)

    def blocks(self, steps: range | None = None) -> Iterator[RowBlock]:
        """The rows of these steps (from 0), or all, in order. Raises DataError if a step is not here."""
        parquet = _parquet()
        absent, before, counted = set(steps or ()), 0, dict[int, int]()
        for path in self.files:
            table = _open_parquet(parquet, path)
            for block in _blocks_of(table, path, before, self.batch_size, steps, counted):
                chosen = block if steps is None else _of_steps(block, steps)
                absent -= set(chosen.steps.tolist())
                if len(chosen.rows):
                    yield chosen
            before += table.metadata.num_rows
        if absent:
            raise DataError(f"step {min(absent) + 1} is not in {self.files[0].parent}")


def open_published(path: str | Path, batch_size: int = BATCH_SIZE) -> ShardedRows | ParquetRows | None:
    """The published rows at a path: a shard, a Parquet file, their folder, or `FOLDER/document`; else None.

    A Parquet file is read alone, a shard with all others. Raises DataError if the files do not fit together.
    """
    path = Path(path).expanduser()
    if path.suffix == ".parquet" and path.is_file():
        return ParquetRows((path,), batch_size)
    if path.is_dir():
        if shards := _shards(path, "*"):
            return _open_shards(shards, batch_size)
        files = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
        return ParquetRows(tuple(files), batch_size) if files else None
    match = SHARD.fullmatch(path.name)
    shards = _shards(path.parent, match[1] if match else path.name)
    return _open_shards(shards, batch_size) if shards else None


def _shards(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"{name if name == '*' else escape(name)}-?????-of-?????.bin")) if folder.is_dir() else []


def _open_shards(paths: Sequence[Path], batch_size: int) -> ShardedRows:
    matches = [match for path in paths if (match := SHARD.fullmatch(path.name))]
    kinds = {(match[1], int(match[3])) for match in matches}
    if len(kinds) != 1:
        names = ", ".join(sorted(name for name, _ in kinds))
        raise DataError(f"{paths[0].parent} holds shards of several files: {names}; name one of them")
    ((name, last),) = kinds
    for path in paths:
        with open(path, "rb") as file:
            refuse_pointer(path, file.read(64), DataError)
    shards = {int(match[2]): path for match, path in zip(matches, paths, strict=True)}
    sizes = {number: path.stat().st_size for number, path in shards.items()}
    whole = {size for number, size in sizes.items() if number != last}
    if len(whole) > 1:
        raise DataError(f"{name}: all shards but the last have one size, but these have {sorted(whole)} bytes")
    if not whole and last:
        raise DataError(f"{paths[0]} is the last shard; where its rows begin, only another shard tells: fetch one more")
    shard_bytes = whole.pop() if whole else sizes[last]
    total = last * shard_bytes + sizes[last] if last in sizes else None
    row_tokens, dtype = _row_form(paths[0].parent / name)
    row_bytes = row_tokens * dtype.itemsize
    if total is not None and total % row_bytes:
        raise DataError(f"{paths[0].parent / name}: {total} bytes are not whole rows of {row_tokens} ids ({dtype})")
    missing = tuple(f"{name}-{number:05}-of-{last:05}.bin" for number in range(last + 1) if number not in shards)
    return ShardedRows(shards, max(shard_bytes, 1), total, row_tokens, dtype, batch_size, missing)


def _row_form(prefix: Path) -> tuple[int, np.dtype]:
    """Ids of a row and their dtype: what the index says if it is beside the shards, else Pythia's."""
    return read_row_form(prefix) if idx_path(prefix).is_file() else (ROW_TOKENS, ROW_DTYPE)


def _parquet() -> Any:
    try:
        return import_module("pyarrow.parquet")
    except ImportError:
        raise DataError("reading parquet needs the package pyarrow: pip install pyarrow") from None


def _open_parquet(parquet: Any, path: Path) -> Any:
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's errors are kinds of these
        raise DataError(f"{path} is not parquet, or damaged: {error}") from error


def _blocks_of(
    table: Any, path: Path, before: int, batch_size: int, steps: range | None, counted: dict[int, int]
) -> Iterator[RowBlock]:
    """The rows of a file; `before` of them lie in earlier files. With `steps`: of the row groups that may hold them.

    `counted`: the rows of each step so far, as a step may go on in the next block or file.
    """
    names = table.schema_arrow.names
    ids = next((name for name in ID_COLUMNS if name in names), None)
    if ids is None:
        raise DataError(f"{path}: none of its columns {', '.join(names)} is {' or '.join(ID_COLUMNS)}")
    has_step = STEP_COLUMN in names
    columns = [ids, STEP_COLUMN] if has_step else [ids]
    firsts = np.cumsum([0, *(table.metadata.row_group(group).num_rows for group in range(table.num_row_groups))])
    for group in range(table.num_row_groups):
        at = before + int(firsts[group])
        if steps is not None and not _may_hold(table, group, names, at, batch_size, steps):
            continue
        try:
            for batch in table.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns):
                lists = batch.column(0)
                starts = np.asarray(lists.offsets, np.int64)
                tokens = np.asarray(lists.values)[starts[0] : starts[-1]]
                if has_step:
                    numbers = np.asarray(batch.column(1), np.int64)
                    rows = _numbered(numbers, counted)
                else:
                    numbers, rows = np.divmod(np.arange(at, at + len(lists)), batch_size)
                yield RowBlock(tokens, starts - starts[0], numbers, rows, str(path))
                at += len(lists)
        except (OSError, ValueError, AttributeError) as error:  # a column of another type has no lists
            raise DataError(f"{path}: its column {ids} cannot be read as lists of ids: {error}") from error


def _may_hold(table: Any, group: int, names: list[str], first_row: int, batch_size: int, steps: range) -> bool:
    metadata = table.metadata.row_group(group)
    if STEP_COLUMN not in names:
        low, high = first_row // batch_size, (first_row + metadata.num_rows - 1) // batch_size
        return low < steps.stop and high >= steps.start
    place = next(n for n in range(metadata.num_columns) if metadata.column(n).path_in_schema == STEP_COLUMN)
    known = metadata.column(place).statistics
    return known is None or not known.has_min_max or (known.min < steps.stop and known.max >= steps.start)


def _numbered(steps: np.ndarray, counted: dict[int, int]) -> np.ndarray:
    """The number of each row within its step, where the rows of a step follow each other."""
    rows = np.empty_like(steps)
    for number in np.unique(steps).tolist():
        of_step = steps == number
        rows[of_step] = counted.get(number, 0) + np.arange(int(of_step.sum()))
        counted[number] = counted.get(number, 0) + int(of_step.sum())
    return rows


def _of_steps(block: RowBlock, steps: range) -> RowBlock:
    chosen = (block.steps >= steps.start) & (block.steps < steps.stop)
    lengths = np.diff(block.starts)
    starts = np.concatenate([[0], np.cumsum(lengths[chosen])])
    tokens = block.tokens[np.repeat(chosen, lengths)]
    return RowBlock(tokens, starts, block.steps[chosen], block.rows[chosen], block.source)
