"""Keys and values of the tokens seen so far, in memory that is allocated once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from castalia.model.attention import attend
from castalia.model.positions import aligned_rows

NOWHERE = 1 << 40  # a place behind all others, which no query sees


class KVCache:
    """Rows of one batch, each of which takes up as many tokens as the others.

    Tokens lie in slots, side by side for all rows. A slot's number is the place of its token, until `set_lengths`
    leaves gaps in some rows.
    """

    grows = True

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values of those layers and heads that are here
        self.rows, self.capacity = rows, capacity
        self.length = self.end = 0  # slots in use, without and with the reserved ones
        self.places = torch.arange(capacity, device=device)[None]  # of the slots: [1 or rows, capacity]
        self.gaps = False
        self.keys = self.places[:, :0]

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Only this many tokens of each row count, behind which the next ones are placed."""
        if min(lengths) < self.length:
            ends, slots = torch.tensor(lengths, device=self.places.device)[:, None], self.places
            seen = slots.where(slots < ends, NOWHERE)
            self.places, self.gaps = seen.where(slots < self.length, slots - self.length + ends), True

    def reserve(self, count: int) -> Tensor:
        """The places of the next `count` tokens: [rows or 1, count]."""
        self.end = self.length + count
        self.keys = self.places[:, : self.end]
        return self.places[:, self.length : self.end]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Attention with all tokens so far."""
        keys, values = self.layer(layer, k)
        keys.narrow(2, self.length, k.shape[2]).copy_(k)
        values.narrow(2, self.length, k.shape[2]).copy_(v)
        keys, values = keys.narrow(2, 0, self.end), values.narrow(2, 0, self.end)
        return attend(q, keys, values, **options)

    def layer(self, layer: int, k: Tensor) -> tuple[Tensor, Tensor]:
        """One layer's keys and values [rows, kv, capacity, d], for keys like `k` [..., kv, t, d]."""
        if layer not in self.layers:
            shape = (self.rows, k.shape[1], self.capacity, k.shape[3])
            # Zeros, because a masked value still takes part in a product with 0, where NaN would spread.
            self.layers[layer] = k.new_zeros(shape), k.new_zeros(shape)
        return self.layers[layer]

    def advance(self, count: int) -> None:
        """All layers have stored the reserved tokens."""
        self.length += count

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, given by their places among the present ones.

        One layer after another, so that no more than one layer is in memory twice.
        """
        chosen = torch.tensor(rows, device=self.places.device)
        for layer, (k, v) in self.layers.items():
            self.layers[layer] = k[chosen], v[chosen]
        self.rows = len(rows)
        if self.gaps:
            self.places = self.places[chosen]


class Prompts:
    """Fills a cache: prompts go through the model one behind the other, as one sequence [1, total] without padding.

    Each sees itself alone, and is stored in those rows of the cache that begin with it.
    """

    gaps, grows = False, True

    def __init__(self, cache: KVCache, rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
        self.cache, self.rows, self.lengths = cache, rows, list(lengths)
        self.end = max(lengths)
        self.biases: list[Tensor] = []  # one for each prompt

    def reserve(self, count: int) -> Tensor:
        self.keys = torch.cat([self.cache.places[:, :length] for length in self.lengths], dim=1)
        return self.keys

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        keys, values = self.cache.layer(layer, k)
        if bias is not None and not self.biases:
            self.biases = [_copy(bias[..., part, part]) for part in self.parts]
        mixed = []
        for number, (rows, part) in enumerate(zip(self.rows, self.parts, strict=True)):
            for row in rows:
                keys[row, :, : self.lengths[number]] = k[0, :, part]
                values[row, :, : self.lengths[number]] = v[0, :, part]
            own = self.biases[number] if self.biases else None
            mixed.append(attend(q[:, :, part], k[:, :, part], v[:, :, part], bias=own, **options))
        return torch.cat(mixed, dim=2)

    @property
    def parts(self) -> list[slice]:
        """Where each prompt lies in the sequence."""
        ends = list(accumulate(self.lengths))
        return [slice(end - length, end) for end, length in zip(ends, self.lengths, strict=True)]

    def advance(self, count: int) -> None:
        self.cache.length = max(self.cache.length, self.end)


def _copy(bias: Tensor) -> Tensor:
    """A part of a bias begins anywhere, a kernel's own has to be aligned."""
    return aligned_rows(bias, bias.shape, bias.dtype).copy_(bias)
