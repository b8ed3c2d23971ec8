"""Are any rows slower than they were? Puts what two versions measured with `--json` beside each other.

    python benchmarks/compare.py OLD NEW [--tolerance 0.05]

OLD and NEW are files that benchmarks wrote. To compare two checkouts, let each measure several times in turns, so that
both meet the same minutes:

    for side in old new old new old new; do (cd $side; python benchmarks/generate.py --json ../$side.json); done

Of all rounds of a row the fastest and the median count. A row is slower where both are, by more than the tolerance.
Exit code 1 if any is; a row that was measured while other programs took processors is marked as busy and says nothing
either way, unless its clock was that of the processor. 2 if there is nothing to compare.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Row:
    """All rounds of one row, in seconds."""

    seconds: list[float] = field(default_factory=list)
    setups: set[tuple[str, str, int]] = field(default_factory=set)  # machine, clock, threads
    busy: bool = False

    @property
    def fastest(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def rows_of(path: Path) -> dict[str, Row]:
    """The rows of a file, by their names. Raises ValueError where it holds none."""
    rows: dict[str, Row] = {}
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
            row = rows.setdefault(f"{line['benchmark']}: {line['row']}", Row())
            row.seconds += map(float, line["seconds"])
            row.setups.add((line["machine"], line["clock"], line["threads"]))
            row.busy |= line["busy"] is True and line["clock"] == "wall"
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a row of a benchmark ({error!r})") from None
    rows = {name: row for name, row in rows.items() if row.seconds}
    if not rows:
        raise ValueError(f"{path} has no rows; write them by a benchmark's --json")
    return rows


def ratio(new: float, old: float) -> float:
    """new / old. A clock of ten milliseconds may have seen nothing of a short row: then 1 if it still does."""
    return new / old if old else float("inf") if new else 1.0


def verdict(old: Row, new: Row, tolerance: float) -> str:
    """ "slower", "faster", "same", or why it cannot be told."""
    if old.setups != new.setups:
        return "another machine or setting"
    if old.busy or new.busy:
        return "busy"
    changes = ratio(new.fastest, old.fastest), ratio(new.median, old.median)
    if min(changes) > 1 + tolerance:
        return "slower"
    return "faster" if max(changes) < 1 - tolerance else "same"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.05, help="share by which a row may be slower")
    args = parser.parse_args(arguments)
    try:
        old, new = rows_of(args.old), rows_of(args.new)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    both = [name for name in old if name in new]
    if not both:
        print("the files have no row in common", file=sys.stderr)
        return 2
    print("| row | old ms, fastest (median) | new | new / old | |\n|---|---|---|---|---|")
    slower = 0
    for name in both:
        a, b = old[name], new[name]
        found = verdict(a, b, args.tolerance)
        slower += found == "slower"
        times = [f"{row.fastest * 1e3:.2f} ({row.median * 1e3:.2f})" for row in (a, b)]
        changes = f"{ratio(b.fastest, a.fastest):.2f} ({ratio(b.median, a.median):.2f})"
        print(f"| {name} | {' | '.join(times)} | {changes} | {found} |")
    for name in sorted(old.keys() ^ new.keys()):
        print(f"| {name} | | | | only {'before' if name in old else 'now'} |")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
