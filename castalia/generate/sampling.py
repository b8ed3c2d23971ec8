"""Choosing the next token of each row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

BLOCK = 256  # random numbers drawn at once for each row
COLDEST = 1e-30  # any lower temperature, whose division would overflow, leaves the likeliest token alone
CANDIDATES = 256  # of the likeliest tokens, which hold the share of top_p in most rows: sorting all takes far longer


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
    if noise is None or temperature < COLDEST:
        return likeliest(logits)
    probabilities, numbers = (logits.float() / temperature).softmax(dim=-1), noise.next()
    if not (top_k or top_p):
        return _draw(probabilities, numbers)
    likely, ids = probabilities.topk(min(top_k or CANDIDATES, logits.shape[-1]))  # in falling order
    held = likely.sum(dim=-1, dtype=torch.float64)
    share = held * (top_p or math.inf) if top_k else torch.full_like(held, top_p)
    chosen = _draw_likely(likely, ids, share, numbers)
    short = (held < share) & (top_k == 0)
    if short.any():  # only these rows, so that no row's tokens depend on the others
        likely, ids = probabilities[short].sort(dim=-1, descending=True)
        chosen[short] = _draw_likely(likely, ids, share[short], numbers[short])
    return chosen


def likeliest(logits: Tensor) -> Tensor:
    """The first of the largest of each row. NumPy finds it in a tenth of the time that torch takes on CPUs."""
    if logits.device.type != "cpu":
        return logits.argmax(dim=-1)
    return torch.from_numpy(logits.float().numpy().argmax(axis=-1))


def _draw_likely(likely: Tensor, ids: Tensor, share: Tensor, numbers: Tensor) -> Tensor:
    """One of the ids [rows, n], whose probabilities fall, without those behind others that hold the share [rows]."""
    before = likely.cumsum(dim=-1, dtype=torch.float64) - likely
    chosen = _draw(likely.masked_fill(before >= share[:, None], 0.0), numbers)
    return ids.gather(1, chosen[:, None])[:, 0]


def _draw(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """Where each row's number in [0, 1) falls: [rows, n], of any sum, and [rows] -> indices [rows]."""
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    chosen = torch.searchsorted(cumulative, numbers[:, None] * cumulative[:, -1:], right=True)
    return chosen.clamp(max=probabilities.shape[-1] - 1)[:, 0]


def _row_seed(seed: int, row: int) -> int:
    return int.from_bytes(blake2b(f"{seed}:{row}".encode()).digest()[:8], "little") >> 1
