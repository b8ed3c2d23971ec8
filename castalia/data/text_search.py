"""Texts in long arrays of token ids: found by the ids that stay the same whatever stands around the text.

The ids at both ends of a text depend on what stands beside it (" light" and "light" are different tokens). So the
search is for its core, the ids in the middle that never change, and what surrounds a core is decoded and compared.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from castalia.data.tokenizer import ByteTokenizer, Tokenizer, decode_with_special

SURROUNDINGS = (("", ""), (" ", " "), ("\n", "\n"), ("a", "a"), ("a ", " a"), (".", "."), ("1", ","))
SAMPLED = 8192  # ids by which the rarest ones are guessed; more of them would read all of the array once more
HASH_BITS = 20  # a table of a megabyte, which a core's cache holds; of 4,000 windows, one in 250 others gets through
WINDOWS_AT_ONCE = 1 << 14
WINDOW = 4  # ids
FEW_PLACES = 64  # at which all ids are compared at once
# Odd numbers, for words of a window: 2^64 over the golden ratio, and constants of other well-mixing hashes.
FACTORS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xD6E8FEB86659FD93, 0xFF51AFD7ED558CCD)
COMPARED_ALONE = 16  # different ids; of more, a table of the vocabulary is faster than a comparison for each


@dataclass(frozen=True, eq=False)
class SoughtText:
    """A text to find. Without a core, its ids are searched for as the text alone and behind a space has them."""

    text: str
    core: tuple[int, ...]
    alone: tuple[tuple[int, ...], ...]
    margin: int  # tokens beside a core within which the text's ends lie

    @property
    def needles(self) -> tuple[tuple[int, ...], ...]:
        """The runs of ids of which one is at each place of the text."""
        return (self.core,) if self.core else self.alone


class Found(NamedTuple):
    """A place of a text: the ids [start, stop) of an array."""

    text: int  # number among those wanted
    start: int
    stop: int


def wanted(text: str, tokenizer: Tokenizer) -> SoughtText:
    """What to search for in order to find a text."""
    each = tokenizer.encode_batch([before + text + after for before, after in SURROUNDINGS], bare=True)
    core = tuple(each[0]) if isinstance(tokenizer, ByteTokenizer) else _core(each, *_inner(text, each[0], tokenizer))
    if core and decode_with_special(tokenizer, core) not in text:
        core = ()  # half of a character, or a tokenizer that does not give texts back
    shown = decode_with_special(tokenizer, core) if core else ""
    spaced = tokenizer.encode_batch([text, f" {text}"], bare=True)
    alone = tuple(dict.fromkeys(tuple(ids) for ids in spaced if ids))
    # No token holds less than a byte, so the bytes beside the core bound the tokens there.
    return SoughtText(text, core, alone, len(text.encode()) - len(shown.encode()) + 1)


def _inner(text: str, ids: Sequence[int], tokenizer: Tokenizer) -> tuple[int, int]:
    """The ids [first, end) behind a text's first word and before its last, which may be parts of longer words."""
    head, tail = re.match(r"\s*\S*", text), re.search(r"\S*\s*\Z", text)
    assert head and tail

    def length(end: int) -> int:
        return len(decode_with_special(tokenizer, ids[:end]))

    # Decoded, more ids are never shorter, so that the places can be halved in on.
    ends = range(len(ids) + 1)
    return bisect_left(ends, head.end(), key=length), bisect_right(ends, tail.start(), key=length) - 1


def _core(encodings: Sequence[Sequence[int]], begin: int, end: int) -> tuple[int, ...]:
    """The longest run within [begin, end) of the first encoding that is in all of them."""
    first, *others = ("".join(map(chr, ids)) for ids in encodings)  # as a text, in which runs are found fast
    if all(first[begin:end] in other for other in others):  # of nearly every text
        return tuple(encodings[0][begin:end])
    best, start = range(0), begin
    for stop in range(begin + 1, end + 1):  # two ends that only move on: a part of a run is in all if the run is
        while start < stop and not all(first[start:stop] in other for other in others):
            start += 1
        best = max(best, range(start, stop), key=len)
    return tuple(encodings[0][best.start : best.stop])


def find_texts(
    tokens: np.ndarray, texts: Sequence[SoughtText], tokenizer: Tokenizer, limits: np.ndarray
) -> Iterator[Found]:
    """The places of the texts in an array of ids, none of which crosses one of the `limits`.

    `limits` [n + 1] are the starts of the items that lie back to back in `tokens`, and the end.
    """
    needles = [(number, needle) for number, text in enumerate(texts) for needle in text.needles]
    known: set[Found] = set()  # several needles of a text, or cores within it, lead to the same place
    for (number, needle), starts in zip(needles, find_runs(tokens, [needle for _, needle in needles]), strict=True):
        items = np.searchsorted(limits, starts, side="right")  # limits[item - 1] <= start < limits[item]
        for start, item in zip(starts.tolist(), items.tolist(), strict=True):
            low, high = int(limits[item - 1]), int(limits[item])
            if start + len(needle) > high:
                continue
            ends = [(start, start + len(needle))]
            if texts[number].core:
                ends = list(_ends(tokens, texts[number], tokenizer, start, low, high))
            for found in (Found(number, *place) for place in ends):
                if found not in known:
                    known.add(found)
                    yield found


def _ends(
    tokens: np.ndarray, text: SoughtText, tokenizer: Tokenizer, start: int, low: int, high: int
) -> Iterator[tuple[int, int]]:
    """The fewest ids, within [low, high), that hold the whole text with the core at `start` in it."""
    stop = start + len(text.core)
    low, high = max(low, start - text.margin), min(high, stop + text.margin)

    def decoded(first: int, end: int) -> str:
        return decode_with_special(tokenizer, tokens[first:end].tolist())

    # All from one beginning, as some tokenizers drop a space there.
    left, upto, whole = decoded(low, start), decoded(low, stop), decoded(low, high)
    core = upto[len(left) :]
    at = text.text.find(core)
    while at >= 0:
        before, after = text.text[:at], text.text[at + len(core) :]
        if left.endswith(before) and whole.startswith(upto + after):
            # More ids hold what fewer do, so both ends can be halved in on.
            after_ends = range(stop, high + 1)
            end = bisect_left(after_ends, True, key=lambda end: decoded(low, end).startswith(upto + after))
            begins = range(start, low - 1, -1)
            first = bisect_left(begins, True, key=lambda first: decoded(first, start).endswith(before))
            yield begins[first], after_ends[end]
        at = text.text.find(core, at + 1)


def find_runs(tokens: np.ndarray, needles: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """The starts of each needle in an array of ids, in rising order.

    Long ones are looked for by windows of ids side by side, of which none overlap, so that a lookup is made for a
    quarter of the ids; short ones by their rarest ids.
    """
    long = [len(ids) >= 2 * WINDOW - 1 for ids in needles]  # such a run holds a whole window, wherever it begins
    whole_words = WINDOW * tokens.itemsize % 8 == 0  # not of ids of one byte
    if not any(long) or not whole_words or not tokens.flags.c_contiguous or len(tokens) < 2 * WINDOW:
        return _by_rarest(tokens, needles)
    found = {True: iter(_by_windows(tokens, [ids for ids, is_long in zip(needles, long, strict=True) if is_long]))}
    found[False] = iter(_by_rarest(tokens, [ids for ids, is_long in zip(needles, long, strict=True) if not is_long]))
    return [next(found[is_long]) for is_long in long]


def _by_windows(tokens: np.ndarray, needles: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """`find_runs` of needles that each hold a window: windows are found by a hash, then all ids are compared."""
    lead = -tokens.__array_interface__["data"][0] % 8 // tokens.itemsize  # ids before the first word of 8 bytes
    words = _windows(tokens[lead : lead + (len(tokens) - lead) // WINDOW * WINDOW])
    most = np.iinfo(tokens.dtype).max
    possible = [number for number, ids in enumerate(needles) if min(ids) >= 0 and max(ids) <= most]
    heads = _rarest_parts(tokens, [needles[number] for number in possible])
    parts = [needles[number][at : at + 2 * WINDOW - 1] for number, at in zip(possible, heads, strict=True)]
    ids = np.array(parts, tokens.dtype).reshape(-1, 2 * WINDOW - 1)
    # Row n, column o: the hash of the window that begins with id o of needle n's part.
    keys = np.stack([_hashed(_windows(ids[:, at : at + WINDOW])) for at in range(WINDOW)], 1)
    table, shift = np.zeros(1 << HASH_BITS, bool), np.uint64(64 - HASH_BITS)
    table[(keys.ravel() >> shift).view(np.int64)] = True
    # Memory of this size costs more to get from the system than to fill, so it is used again.
    room = tuple(np.empty(WINDOWS_AT_ONCE, kind) for kind in (np.uint64, np.uint64, bool))
    found_at, found_hashes = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    for begin in range(0, len(words), WINDOWS_AT_ONCE):
        block = words[begin : begin + WINDOWS_AT_ONCE]
        hashed, at, hit = (each[: len(block)] for each in room)
        _hashed(block, hashed)
        np.right_shift(hashed, shift, out=at)
        np.take(table, at.view(np.int64), out=hit, mode="clip")  # of the modes the one that copies nothing
        hits = np.flatnonzero(hit)
        found_at.append(hits + begin)
        found_hashes.append(hashed[hits])
    at, hashes = np.concatenate(found_at), np.concatenate(found_hashes)
    order = np.argsort(hashes, kind="stable")
    at, hashes = at[order], hashes[order]
    left, right = np.searchsorted(hashes, keys, "left"), np.searchsorted(hashes, keys, "right")
    found = [np.empty(0, np.int64) for _ in needles]
    for row in np.flatnonzero((left < right).any(1)).tolist():
        number = possible[row]
        starts = [lead + WINDOW * at[left[row, o] : right[row, o]] - o - heads[row] for o in range(WINDOW)]
        # At each place of the needle one window begins with one of these ids, so none comes twice.
        found[number] = np.sort(_verified(tokens, needles[number], np.concatenate(starts)))
    return found


def _windows(ids: np.ndarray) -> np.ndarray:
    """Windows of ids [..., n WINDOW] as words of 8 bytes, [windows, words]."""
    return np.ascontiguousarray(ids).reshape(-1, WINDOW).view(np.uint64)


def _hashed(windows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """A hash of each window, [windows, words] -> uint64 [windows]: sums of products with odd numbers."""
    total: np.ndarray = np.multiply(windows[:, 0], np.uint64(FACTORS[0]), out=out)
    for word in range(1, windows.shape[1]):
        total += windows[:, word] * np.uint64(FACTORS[word])
    return total


def _rarest_parts(tokens: np.ndarray, needles: Sequence[Sequence[int]]) -> list[int]:
    """Where in each needle the ids begin whose windows are the rarest ones, by a sample of the array."""
    if not needles:
        return []
    flat = np.concatenate([np.asarray(ids, np.int64) for ids in needles])
    often = np.bincount(tokens[:: max(1, len(tokens) // SAMPLED)], minlength=int(flat.max()) + 1)[flat]
    rarest = np.minimum.reduce([often[at : len(often) - WINDOW + 1 + at] for at in range(WINDOW)])  # of each window
    cost = sum(rarest[at : len(rarest) - WINDOW + 1 + at] for at in range(WINDOW))  # of the windows that one begins in
    ends = np.cumsum([len(ids) for ids in needles]).tolist()
    return [int(np.argmin(cost[end - len(ids) : end - 2 * WINDOW + 2])) for end, ids in zip(ends, needles, strict=True)]


def _verified(tokens: np.ndarray, ids: Sequence[int], starts: np.ndarray) -> np.ndarray:
    """Those of the starts at which all ids stand."""
    starts = starts[(starts >= 0) & (starts + len(ids) <= len(tokens))]
    for offset, index in enumerate(ids):  # few places are left after the first ids
        if len(starts) <= FEW_PLACES:
            return starts[(tokens[starts[:, None] + np.arange(len(ids))] == np.asarray(ids)).all(1)]
        starts = starts[tokens[starts + offset] == index]
    return starts


def _by_rarest(tokens: np.ndarray, needles: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """`find_runs` by the rarest id of each needle, so that nearly all ids are compared once."""
    if not len(tokens) or not needles:
        return [np.empty(0, np.int64) for _ in needles]
    sample, counts = np.unique(tokens[:: max(1, len(tokens) // SAMPLED)], return_counts=True)
    often = dict(zip(sample.tolist(), counts.tolist(), strict=True))
    anchors = [min(range(len(ids)), key=lambda at, ids=ids: often.get(ids[at], 0)) for ids in needles]  # type: ignore[misc]
    places = _places_of(tokens, {ids[at] for ids, at in zip(needles, anchors, strict=True)})
    values = tokens[places]
    order = np.argsort(values, kind="stable")  # the places of an id side by side, in their order
    places, values = places[order], values[order]
    all_starts = []
    for ids, at in zip(needles, anchors, strict=True):
        left, right = np.searchsorted(values, ids[at], "left"), np.searchsorted(values, ids[at], "right")
        all_starts.append(_verified(tokens, ids, places[left:right] - at))
    return all_starts


def _places_of(tokens: np.ndarray, ids: set[int]) -> np.ndarray:
    """Where one of these ids stands."""
    if len(ids) <= COMPARED_ALONE:
        return np.flatnonzero(np.logical_or.reduce([tokens == index for index in ids]))
    table = np.zeros(max(int(tokens.max()), *ids) + 1, bool)
    table[list(ids)] = True
    return np.flatnonzero(table[tokens])
