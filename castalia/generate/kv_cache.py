"""The KV cache: keys and values of all tokens so far, in memory that is allocated once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from castalia.errors import ConfigError
from castalia.model.attention import Recurrent, attend
from castalia.model.positions import aligned_rows
from castalia.streaming.scratch_file import zeros_on_disk

NOWHERE = 1 << 40  # a place after all others, which no query sees


class KVCache:
    """The cache of a batch, a `castalia.model.attention.Cache`. Every row takes in the same number of tokens per call.

    Each layer has keys and values [rows, kv, capacity, d]. The third dimension is slots. The number of a slot is the
    place of its token, until `set_lengths` leaves gaps in rows with shorter prompts:

        slot        0  1  2  3  4  5            places after prompts of 4 and 2 tokens and two new ones
        row 0       0  1  2  3  4  5
        row 1       0  1  -  -  2  3            - NOWHERE: no query sees these slots
    """

    grows = True

    def __init__(
        self,
        rows: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype | None = None,
        on_disk: bool = False,
    ) -> None:
        """`dtype`: of keys and values; None: that in which they come.

        `on_disk`: layers lie in files that nobody else sees, for a cache that has no room in memory.
        """
        self.dtype, self.on_disk = dtype, on_disk
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values of the layers and heads of this rank
        self.states: dict[int, list[Tensor]] = {}  # of layers without attention: tensors [rows, ...]
        self.rows, self.capacity = rows, capacity
        self.length = self.end = 0  # slots in use, without and with the reserved ones
        self.places = torch.arange(capacity, device=device)[None]  # the place in each slot: [1 or rows, capacity]
        self.gaps = False
        self.keys = self.places[:, :0]

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Keep this many tokens of each row. The next tokens of the row follow them in place, though not in slots.

        States keep all tokens of their row, which are no more than that after a prefill.
        """
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
        """Store the new keys and values [rows, kv, t, d], and attend with all tokens so far."""
        keys, values = self.layer(layer, k)
        keys.narrow(2, self.length, k.shape[2]).copy_(k)
        values.narrow(2, self.length, k.shape[2]).copy_(v)
        keys, values = keys.narrow(2, 0, self.end), values.narrow(2, 0, self.end)
        if keys.dtype != q.dtype:
            keys, values = keys.to(q.dtype), values.to(q.dtype)
        return attend(q, keys, values, **options)

    def recur(self, layer: int, module: Recurrent, x: Tensor) -> Tensor:
        """The new tokens [rows, t, h] after those that the layer's state knows, which takes them in."""
        return module.advance(x, self.state(layer, module, x))

    def state(self, layer: int, module: Recurrent, x: Tensor) -> list[Tensor]:
        """The state of a layer without attention, made at first use for input like `x`."""
        if self.on_disk:
            raise ConfigError(
                "there is no room for what is kept of each text, and blocks without attention cannot keep it on disk; "
                "give a larger --memory"
            )
        if layer not in self.states:
            self.states[layer] = module.new_state(self.rows, self.capacity, x)
        return self.states[layer]

    def layer(self, layer: int, k: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer [rows, kv, capacity, d], allocated at first use like `k` [..., kv, t, d]."""
        if layer not in self.layers:
            shape = (self.rows, k.shape[1], self.capacity, k.shape[3])
            self.layers[layer] = self.zeros(k, shape), self.zeros(k, shape)
        return self.layers[layer]

    def zeros(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        """Zeros, because masked values are multiplied by 0, and uninitialised memory may hold NaN."""
        dtype = self.dtype or like.dtype
        return zeros_on_disk(shape, dtype) if self.on_disk else like.new_zeros(shape, dtype=dtype)

    def advance(self, count: int) -> None:
        """Note that all layers have stored the reserved tokens."""
        self.length += count

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, given by their indices. Layers are copied one after the other, to save memory."""
        chosen = torch.tensor(rows, device=self.places.device)
        for layer, (k, v) in self.layers.items():
            self.layers[layer] = self.chosen_rows(k, chosen), self.chosen_rows(v, chosen)
        self.states = {layer: [part[chosen] for part in state] for layer, state in self.states.items()}
        self.rows = len(rows)
        if self.gaps:
            self.places = self.places[chosen]

    def chosen_rows(self, values: Tensor, chosen: Tensor) -> Tensor:
        """A copy of these rows."""
        if not self.on_disk:
            return values[chosen]
        kept = self.zeros(values, (len(chosen), *values.shape[1:]))
        for row, old in zip(kept, chosen.tolist(), strict=True):
            row.copy_(values[old])
        return kept


class Prompts:
    """A `Cache` for prefill, which fills a `KVCache`.

    Prompts go through the model back to back, as one sequence [1, total] without padding. Each prompt attends to itself
    only, and its keys and values are stored in the rows of the KV cache that begin with it: `rows[i]` for prompt i.
    """

    gaps, grows = False, True

    def __init__(self, cache: KVCache, rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
        self.cache, self.rows, self.lengths = cache, rows, list(lengths)
        self.end = max(lengths)
        self.biases: list[tuple[Tensor, list[Tensor]]] = []  # of blocks with equal windows: the whole, of each prompt

    def reserve(self, count: int) -> Tensor:
        """The places of all tokens: [1, total]. They begin at 0 in each prompt."""
        self.keys = torch.cat([self.cache.places[:, :length] for length in self.lengths], dim=1)
        return self.keys

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        """Attention of each prompt on its own: q [1, n, total, d] -> the same shape."""
        keys, values = self.cache.layer(layer, k)
        own_biases = self._cut(bias) if bias is not None else [None] * len(self.rows)
        outputs = []
        for number, (rows, part) in enumerate(zip(self.rows, self.parts, strict=True)):
            for row in rows:
                keys[row, :, : self.lengths[number]] = k[0, :, part]
                values[row, :, : self.lengths[number]] = v[0, :, part]
            outputs.append(attend(*(x[:, :, part] for x in (q, k, v)), bias=own_biases[number], **options))
        return torch.cat(outputs, dim=2)

    def _cut(self, bias: Tensor) -> list[Tensor]:
        """The bias of each prompt, from that of all; cut once for all layers that have the same one."""
        for whole, parts in self.biases:
            if whole is bias:
                return parts
        self.biases.append((bias, [_aligned_copy(bias[..., part, part]) for part in self.parts]))
        return self.biases[-1][1]

    def recur(self, layer: int, module: Recurrent, x: Tensor) -> Tensor:
        """Each prompt from its beginning: x [1, total, h] -> the same shape. Their rows begin with its state."""
        states, outputs = self.cache.state(layer, module, x), []
        for rows, part in zip(self.rows, self.parts, strict=True):
            own = module.new_state(1, self.cache.capacity, x)
            outputs.append(module.advance(x[:, part], own))
            for whole, value in zip(states, own, strict=True):
                whole[list(rows)] = value
        return torch.cat(outputs, dim=1)

    @property
    def parts(self) -> list[slice]:
        """The slice of the sequence that each prompt takes."""
        ends = list(accumulate(self.lengths))
        return [slice(end - length, end) for end, length in zip(ends, self.lengths, strict=True)]

    def advance(self, count: int) -> None:
        """Note that the KV cache holds the prompts."""
        self.cache.length = max(self.cache.length, self.end)


def _aligned_copy(bias: Tensor) -> Tensor:
    """A copy of a part of a bias, since kernels need aligned rows and the part may begin anywhere."""
    return aligned_rows(bias, bias.shape, bias.dtype).copy_(bias)
