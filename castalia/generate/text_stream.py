"""From token ids, one at a time, to text that can be shown: whole characters only, and cut at stop strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Protocol

BROKEN = "\ufffd"  # the result of decoding an incomplete character
CONTEXT = 8  # earlier tokens that are decoded again with new ones, because decoding may depend on neighbours


class TextTokenizer(Protocol):
    """What generation needs of a tokenizer; see `castalia.data.tokenizer.Tokenizer`."""

    vocab_size: int
    eod_id: int | None
    end_ids: frozenset[int]
    byte_ids: frozenset[int]  # tokens of one byte, which decode correctly only in a complete run
    special_texts: Mapping[int, str]  # tokens that `decode` leaves out, as a text spells them

    def encode(self, text: str) -> list[int]:
        """The token ids of a text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        ...


class TextStream:
    """The text after a prompt, piece by piece as tokens come. All pieces together are the text of all tokens.

    Text that a later token may still change is held back: an incomplete character, and a run of byte tokens. Stop
    strings are looked for in the text with its special tokens, which is not shown: `<|im_end|>` is one, as is
    `.<|im_end|>` or a word of several tokens.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.ids = list(prompt)  # the latest tokens, whose text may still matter
        text = tokenizer.decode(self.ids)
        self.shown = len(text) - text.endswith(BROKEN)  # how many characters of their text have been returned
        self.in_run = False  # within a run of byte tokens
        for token in self.ids:
            self._follow(token)
        self.held = ""  # text that may be the beginning of a stop string, with special tokens
        self.seen: list[bool] = []  # for each character of it, whether it is shown
        self.stopped = False
        if not self.in_run:
            self._forget(text)

    def push(self, token: int) -> str:
        """Add a token, and return the text that is now certain. Sets `stopped` at a stop string."""
        self.ids.append(token)
        self._follow(token)
        special = self.tokenizer.special_texts.get(token) if self.stop else None
        if special is None:
            return "" if self.in_run else self._release(self._decode(last=False))
        return self._release(self._decode(last=True)) + self._release(special, shown=False)

    def _follow(self, token: int) -> None:
        if token in self.tokenizer.byte_ids:
            self.in_run = True
        elif self.in_run and self.tokenizer.decode([token]):  # a special token without text does not end the run
            self.in_run = False

    def finish(self) -> str:
        """The text that was held back, once there are no more tokens."""
        return "" if self.stopped else self._release(self._decode(last=True), last=True)

    def _decode(self, last: bool) -> str:
        text = self.tokenizer.decode(self.ids)
        certain = len(text) - (text.endswith(BROKEN) and not last)
        new, self.shown = text[self.shown : certain], max(self.shown, certain)
        self._forget(text)
        return new

    def _forget(self, text: str) -> None:
        """Drop the oldest tokens if the rest decodes to the end of the text, as then later text will be right, too."""
        for first in range(len(self.ids) - CONTEXT, max(len(self.ids) - 2 * CONTEXT, CONTEXT - 1), -1):
            rest = self.tokenizer.decode(self.ids[first:])
            if rest and text.endswith(rest) and len(rest) > len(text) - self.shown:
                del self.ids[:first]
                self.shown -= len(text) - len(rest)
                return

    def _release(self, text: str, last: bool = False, shown: bool = True) -> str:
        """Take text in, and return what of all that is held can be no part of a stop string."""
        if self.stopped:
            return ""
        self.held += text
        self.seen += [shown] * len(text)
        stops = [at for at in map(self.held.find, self.stop) if at >= 0]
        self.stopped = bool(stops)
        keep = 0 if last else max((_overlap(self.held, stop) for stop in self.stop), default=0)
        end = min(stops) if stops else len(self.held) - keep
        text = "".join(compress(self.held[:end], self.seen))
        self.held, self.seen = self.held[end:], self.seen[end:]
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
