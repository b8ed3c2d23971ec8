"""`--plot`: the picture that a verb draws beside what it prints. Its name may be left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

OPTION = "--plot"


def name_pictures(words: Sequence[str]) -> list[str]:
    """The command line after the program's name, with a file after each `--plot` that none follows.

    `series check RUN --plot --json` draws `series-check.png` in the current folder, `diff A B --plot` `diff.png`. What
    follows is no file if it is an option or a folder: `series check --plot RUN`.
    """
    verb = list(words[: 2 if words[:1] in (["series"], ["data"]) else 1])
    named: list[str] = []
    for word, following in zip(words, [*words, "-"][1:], strict=True):
        named.append(word)
        if word == OPTION and (following.startswith("-") or Path(following).is_dir()):
            named.append(f"{'-'.join(verb)}.png")
    return named
