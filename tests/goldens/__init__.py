"""What the program gave before a change: each file here holds results by name, written by `pytest --write-goldens`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


class Goldens:
    """The recorded results. One that is not recorded, or that is another, is a failure; `rewrite` records instead."""

    def __init__(self, rewrite: bool) -> None:
        self.rewrite = rewrite

    def recorded(self, file: str, name: str, value: Any) -> Any:
        """What is recorded under a name; while rewriting, `value` after it has been recorded."""
        path = FOLDER / f"{file}.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        if self.rewrite and known.get(name) != value:
            known[name] = value
            path.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
        assert name in known, f"{path} has no {name!r}: record it with pytest --write-goldens"
        return known[name]

    def check(self, file: str, name: str, value: Any) -> None:
        assert value == self.recorded(file, name, value), f"{file}.json, {name}: see CONTRIBUTING.md on goldens"

    def check_lines(self, file: str, lines: list[str]) -> None:
        """A text file of its own, which a review reads line by line."""
        path = FOLDER / f"{file}.txt"
        if self.rewrite:
            path.write_text("\n".join(lines) + "\n")
        known = path.read_text().splitlines()
        new, gone = [x for x in lines if x not in known], [x for x in known if x not in lines]
        assert (new, gone) == ([], []), f"{path} differs; where it is meant: pytest --write-goldens"
        assert lines == known
