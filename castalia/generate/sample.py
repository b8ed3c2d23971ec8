"""Choosing the next token of each row."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

BLOCK = 256  # random numbers drawn at once for each row


class Noise:
    """A stream of uniform numbers for each row that depends on (seed, row number) and on nothing else."""

    def __init__(self, seed: int, rows: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator().manual_seed(_row_seed(seed, row)) for row in rows]
        self.device = device
        self.used = BLOCK
        self.block = torch.empty(0)

    def next(self) -> Tensor:
        """fp64 in [0, 1), one for each row."""
        if self.used == BLOCK:
            drawn = [torch.rand(BLOCK, dtype=torch.float64, generator=generator) for generator in self.generators]
            self.block, self.used = torch.stack(drawn, dim=1).to(self.device), 0
        self.used += 1
        return self.block[self.used - 1]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, given by their places among the present ones."""
        self.generators = [self.generators[i] for i in rows]
        self.block = self.block[:, list(rows)]


def choose(logits: Tensor, noise: Noise | None, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Token ids [rows] from logits [rows, vocab]; the likeliest ones without `noise`.

    `top_k` keeps the k likeliest tokens, `top_p` then the fewest likeliest ones that hold this share of the
    probability; 0 switches either off.
    """
    if noise is None:
        return logits.argmax(dim=-1)
    ids = None
    if top_k or top_p:
        logits, ids = logits.topk(min(top_k, logits.shape[-1]) if top_k else logits.shape[-1])  # in falling order
    probabilities = (logits.double() / temperature).softmax(dim=-1)
    if top_p:
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    target = noise.next()[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)
    return (chosen if ids is None else ids.gather(1, chosen))[:, 0]


def _row_seed(seed: int, row: int) -> int:
    return int.from_bytes(blake2b(f"{seed}:{row}".encode()).digest()[:8], "little") >> 1
