"""From a row's token ids to text that can be shown at once: whole characters only, cut at stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

BROKEN = "\ufffd"  # what an incomplete character decodes to
CONTEXT = 8  # earlier tokens that are decoded again with new ones, because some tokenizers join neighbours
LONGEST_CHARACTER = 4  # tokens


class Tokenizer(Protocol):
    vocab_size: int
    eod_id: int | None

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class TextStream:
    """The text that follows a prompt, piece by piece as its tokens come."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.ids = list(prompt[-CONTEXT:])  # those whose text may still matter
        self.known = len(self.ids)  # of them, those whose text has been given
        self.held = ""  # given by the tokenizer, but it may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """New text that is certain; `stopped` is set when a stop string has come."""
        self.ids.append(token)
        return self._release(self._decode(last=False), last=False)

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        return "" if self.stopped else self._release(self._decode(last=True), last=True)

    def _decode(self, last: bool) -> str:
        before = self.tokenizer.decode(self.ids[: self.known])
        text = self.tokenizer.decode(self.ids)
        if text.endswith(BROKEN) and not last and len(self.ids) - self.known < LONGEST_CHARACTER:
            return ""
        del self.ids[: max(0, self.known - CONTEXT)]
        self.known = len(self.ids)
        return text[len(before) :]

    def _release(self, text: str, last: bool) -> str:
        self.held += text
        found = [at for at in map(self.held.find, self.stop) if at >= 0]
        if found:
            self.stopped = True
            return self.held[: min(found)]
        keep = 0 if last else max((_overlap(self.held, stop) for stop in self.stop), default=0)
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
