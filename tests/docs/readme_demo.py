"""The README's shortened output of `make demo`, made from a whole one.

    make demo | tee demo.log && python tests/docs/readme_demo.py demo.log

rewrites the block in the README.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"
BLOCK = re.compile(r"(?<=machine to machine\):\n\n```\n).*?(?=^```$)", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"\S*/castalia (train|eval|generate) ")
KEPT = ("TRAINING BEGINS", "first batch:", "stopped after", "to continue:", "loaded ", "bits per byte")


def shortened(lines: list[str]) -> Iterator[str]:
    """The commands from training on, the first line that begins as each of `KEPT`, and all of the text at the end.

    `...` stands for what is left out within the output of `train`.
    """
    verb, left_out, kept = "", False, list(KEPT)
    for line in lines:
        if match := COMMAND.match(line):
            verb = match[1]
        elif not verb or line.startswith("-- "):
            continue
        elif verb != "generate":
            start = next((start for start in kept if line.startswith(start)), None)
            if start is None:
                left_out = verb == "train"
                continue
            kept.remove(start)
        if left_out and (line.startswith("stopped") or (match and verb == "eval")):
            yield "..."
        left_out = False
        yield line


def main(log: str) -> None:
    """Rewrite the block from the output of `make demo` in a file."""
    text = README.read_text(encoding="utf-8")
    output = "\n".join(shortened(Path(log).read_text(encoding="utf-8").splitlines()))
    README.write_text(BLOCK.sub(lambda _: output + "\n", text), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
