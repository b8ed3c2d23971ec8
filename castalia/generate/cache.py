"""Keys and values of the tokens seen so far, in memory that is allocated once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class KVCache:
    """Rows of one batch. All hold the same number of tokens until `set_lengths` says otherwise.

    A row's token lies at the place of its position, so that rows of unequal length need no padding in front; what lies
    beyond a row's length is overwritten by its next tokens and never seen.
    """

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values of those layers and heads that are here
        self.capacity = capacity
        self.length = 0
        self.lengths: Tensor | None = None
        self.rows = torch.arange(rows, device=device)[:, None]
        self.places = self.rows

    def set_lengths(self, lengths: Tensor) -> None:
        """Only this many tokens of each row count; some row has all `length` of them. [rows]"""
        self.lengths = lengths

    def reserve(self, count: int) -> Tensor:
        """The places of the next `count` tokens: [rows, count], or [1, count] where all rows are alike."""
        steps = torch.arange(count, device=self.rows.device)[None]
        self.places = steps + (self.length if self.lengths is None else self.lengths[:, None])
        return self.places

    def num_keys(self, count: int) -> int:
        return self.length + count

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Attention with all tokens so far."""
        return F.scaled_dot_product_attention(q, *self.append(layer, k, v), **options)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's keys and values [rows, kv, t, d] at the reserved places; all so far, [rows, kv, k, d]."""
        end = self.length + k.shape[2]
        if layer not in self.layers:
            shape = (len(self.rows), k.shape[1], self.capacity, k.shape[3])
            # Zeros, because a masked value still takes part in a product with 0, where NaN would spread.
            self.layers[layer] = k.new_zeros(shape), v.new_zeros(shape)
        keys, values = self.layers[layer]
        for stored, new in ((keys, k), (values, v)):
            if self.lengths is None:
                stored.narrow(2, self.length, k.shape[2]).copy_(new)
            else:
                stored[self.rows, :, self.places] = new.transpose(1, 2)
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def advance(self, count: int) -> None:
        """All layers have stored the reserved tokens."""
        self.length += count
        if self.lengths is not None:
            self.lengths = self.lengths + count

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, given by their places among the present ones."""
        chosen = torch.tensor(rows, device=self.rows.device)
        self.layers = {layer: (k[chosen], v[chosen]) for layer, (k, v) in self.layers.items()}
        self.rows = self.rows[: len(rows)]
        if self.lengths is not None:
            lengths = self.lengths[chosen]
            self.length = int(lengths.max())
            self.lengths = lengths if int(lengths.min()) < self.length else None
