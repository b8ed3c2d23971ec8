"""Keys and values of the tokens seen so far, in memory that is allocated once."""

from __future__ import annotations

import torch
from torch import Tensor

from castalia.config.schema import Model


class KVCache:
    """Rows of one batch. All hold the same number of tokens until `set_lengths` says otherwise.

    A row's token lies at the place of its position, so that rows of unequal length need no padding in front; what lies
    beyond a row's length is overwritten by its next tokens and never seen.
    """

    def __init__(self, cfg: Model, rows: int, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (cfg.num_layers, rows, cfg.kv_heads, capacity, cfg.head_size)
        # Zeros, because a masked value still takes part in a product with 0, where NaN would spread.
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
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

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's keys and values [rows, kv, t, d] at the reserved places; all so far, [rows, kv, k, d]."""
        end = self.length + k.shape[2]
        for stored, new in ((self.keys[layer], k), (self.values[layer], v)):
            if self.lengths is None:
                stored[:, :, self.length : end] = new
            else:
                stored[self.rows, :, self.places] = new.transpose(1, 2)
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, count: int) -> None:
        """All layers have stored the reserved tokens."""
        self.length += count
        if self.lengths is not None:
            self.lengths = self.lengths + count
