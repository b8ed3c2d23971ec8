"""Encoding for data preparation: by the tokenizer itself, or by a faster engine that was tested to give equal ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np

from castalia.data.tokenizer import RustTokenizer, Tokenizer

Encode = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]  # ids of all texts back to back, ids of each text

COMPARED_TEXTS, COMPARED_CHARACTERS = 64, 1 << 16
# Text on which engines are likely to disagree: whitespace, contractions, digits, composed and decomposed letters, other
# scripts.
HARD_TEXT = (
    " a  b   c\n\n\n  \t\td\r\ne\u00a0f\u2028g\u3000h \x00\x85 I'll don't WE'RE it’s 1234567890 3.14159e-10 \n"
    "cafe\u0301 café \u1100\u1161\u11a8 각 ﬁ Å \u212b \u0300x İstanbul ß ǆ 漢字かな交じり文 한국어 "
    "русский עברית العربية हिन्दी ไทย "
    '👩‍👩‍👧‍👦 🏳️‍🌈 \U0001f1e9\U0001f1ea \ufeff \ufffd __init__(self, *args) {"a": [1, 2]} // ======== \\n </s> <|x|> http://a.b/c?d=e&f\n'
)


def flatten_rows(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """The values of all rows back to back, int64 [total], and the length of each row, int64 [rows]."""
    sizes = np.fromiter(map(len, rows), np.int64, len(rows))
    return np.fromiter(chain.from_iterable(rows), np.int64, int(sizes.sum())), sizes


def reference_encoder(tokenizer: Tokenizer) -> Encode:
    """Encoding by the tokenizer's own `encode_batch`."""
    return lambda texts: flatten_rows(tokenizer.encode_batch(texts))


def fast_encoder(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Encode | None, str]:
    """A faster engine, which releases the interpreter's lock, or None; and the name of the engine in use, for people.

    The faster engine is taken only if its ids are equal for the first 64 of `texts`, and for `HARD_TEXT` with all added
    tokens in it.
    """
    if not isinstance(tokenizer, RustTokenizer):
        return None, "the tokenizer's own engine"
    try:
        import fastokens
    except ImportError:
        return None, "tokenizers; pip install fastokens for a many times faster one"
    try:
        engine = fastokens.Tokenizer.from_json_str(tokenizer.engine.to_str())
    except ValueError as error:
        return None, f"tokenizers, as fastokens cannot read this tokenizer: {error}"

    def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = engine.encode_batch_flat(list(texts), add_special_tokens=True)
        return np.frombuffer(ids, "<u4"), np.diff(np.frombuffer(offsets, "<u8").astype(np.int64))

    compared = [*_few(texts), *_hard_texts(tokenizer)]
    expected, actual = reference_encoder(tokenizer)(compared), encode(compared)
    if all(map(np.array_equal, expected, actual)):
        return encode, "fastokens, whose ids were compared with those of tokenizers"
    return None, "tokenizers, as fastokens gives other ids"


def _few(texts: Sequence[str]) -> list[str]:
    room, chosen = COMPARED_CHARACTERS, []
    for text in texts[:COMPARED_TEXTS]:
        chosen.append(text[:room])
        room -= len(text)
        if room <= 0:
            break
    return chosen


def _hard_texts(tokenizer: RustTokenizer) -> list[str]:
    added = [token.content for token in tokenizer.engine.get_added_tokens_decoder().values()]
    return [HARD_TEXT, *(f"{token}x {token} {token}{token}\n{HARD_TEXT[:9]}" for token in added[:1000])]
