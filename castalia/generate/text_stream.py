"""From a row's token ids to text that can be shown at once: whole characters only, cut at stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

BROKEN = "\ufffd"  # what an incomplete character decodes to
CONTEXT = 8  # earlier tokens that are decoded again with new ones, because some tokenizers join neighbours


class TextTokenizer(Protocol):
    vocab_size: int
    eod_id: int | None
    end_ids: frozenset[int]
    byte_ids: frozenset[int]  # tokens of one byte, of which only a run that is whole can be decoded

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class TextStream:
    """The text that follows a prompt, piece by piece as its tokens come: together what all tokens decode to.

    What a later token may still change is held back: a character of which bytes are missing, and a run of byte tokens.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.ids = list(prompt)  # those whose text may still matter
        text = tokenizer.decode(self.ids)
        self.shown = len(text) - text.endswith(BROKEN)  # characters of their text that have been given
        self.in_run = False  # of byte tokens
        for token in self.ids:
            self._follow(token)
        self.held = ""  # given by the tokenizer, but it may be the beginning of a stop string
        self.stopped = False
        if not self.in_run:
            self._forget(text)

    def push(self, token: int) -> str:
        """New text that is certain; `stopped` is set when a stop string has come."""
        self.ids.append(token)
        self._follow(token)
        return "" if self.in_run else self._release(self._decode(last=False), last=False)

    def _follow(self, token: int) -> None:
        if token in self.tokenizer.byte_ids:
            self.in_run = True
        elif self.in_run and self.tokenizer.decode([token]):  # special tokens are left out: the run goes on behind them
            self.in_run = False

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        return "" if self.stopped else self._release(self._decode(last=True), last=True)

    def _decode(self, last: bool) -> str:
        text = self.tokenizer.decode(self.ids)
        certain = len(text) - (text.endswith(BROKEN) and not last)
        new, self.shown = text[self.shown : certain], max(self.shown, certain)
        self._forget(text)
        return new

    def _forget(self, text: str) -> None:
        """Drop the oldest tokens where the rest decodes to the end of the text, so that what follows does as well."""
        for first in range(len(self.ids) - CONTEXT, max(len(self.ids) - 2 * CONTEXT, CONTEXT - 1), -1):
            rest = self.tokenizer.decode(self.ids[first:])
            if rest and text.endswith(rest) and len(rest) > len(text) - self.shown:
                del self.ids[:first]
                self.shown -= len(text) - len(rest)
                return

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
