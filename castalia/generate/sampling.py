"""Sampling: how the next token of each row is chosen, by temperature, top-k and top-p."""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from castalia.model.sums import sum_dtype

BLOCK = 256  # random numbers that are drawn at once for each row
COLDEST = 1e-30  # below this temperature, where division overflows, the likeliest token is taken
CANDIDATES = 256  # number of likeliest tokens that mostly suffice for top_p; sorting the whole vocabulary is far slower


class Noise:
    """A stream of uniform random numbers for each row, which depends on (seed, number of the row) and nothing else."""

    def __init__(self, seed: int, rows: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator().manual_seed(_row_seed(seed, row)) for row in rows]
        self.device = device
        self.used = BLOCK
        self.block = torch.empty(0)

    def next(self) -> Tensor:
        """The next number of each row: [rows] in [0, 1), as exact as the device's sums."""
        if self.used == BLOCK:
            wide, dtype = torch.float64, sum_dtype(self.device)
            drawn = [torch.rand(BLOCK, dtype=wide, generator=generator).to(dtype) for generator in self.generators]
            self.block, self.used = torch.stack(drawn, dim=1).to(self.device), 0
        self.used += 1
        return self.block[self.used - 1]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, given by their indices."""
        self.generators = [self.generators[i] for i in rows]
        self.block = self.block[:, list(rows)]


def choose(logits: Tensor, noise: Noise | None, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Token ids [rows] from logits [rows, vocab]; without `noise`, the likeliest ones.

    `top_k` keeps the k likeliest tokens. Of these, `top_p` keeps the smallest number of likeliest tokens whose
    probabilities sum to this share (Holtzman et al., 1904.09751). 0 switches either off.
    """
    if noise is None or temperature < COLDEST:
        return likeliest(logits)
    probabilities, numbers = (logits.float() / temperature).softmax(dim=-1), noise.next()
    if not (top_k or top_p):
        return _draw(probabilities, numbers)
    likely, ids = probabilities.topk(min(top_k or CANDIDATES, logits.shape[-1]))  # descending
    held = likely.sum(dim=-1, dtype=sum_dtype(logits.device))
    share = held * (top_p or math.inf) if top_k else torch.full_like(held, top_p)
    chosen = _draw_likely(likely, ids, share, numbers)
    short = (held < share) & (top_k == 0)
    if short.any():  # only these rows, so that no row's tokens depend on the others
        likely, ids = probabilities[short].sort(dim=-1, descending=True)
        chosen[short] = _draw_likely(likely, ids, share[short], numbers[short])
    return chosen


def likeliest(logits: Tensor) -> Tensor:
    """The index of the largest logit of each row, the first one of several. On CPUs NumPy is ten times as fast here."""
    if logits.device.type != "cpu":
        return logits.argmax(dim=-1)
    return torch.from_numpy(logits.float().numpy().argmax(axis=-1))


def _draw_likely(likely: Tensor, ids: Tensor, share: Tensor, numbers: Tensor) -> Tensor:
    """One of `ids` [rows, n], in descending order of probability, without those after the `share` [rows] is reached."""
    before = likely.cumsum(dim=-1, dtype=sum_dtype(likely.device)) - likely
    chosen = _draw(likely.masked_fill(before >= share[:, None], 0.0), numbers)
    return ids.gather(1, chosen[:, None])[:, 0]


def _draw(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """Indices [rows] by inverse transform sampling, from probabilities [rows, n] of any sum and numbers in [0, 1)."""
    cumulative = probabilities.cumsum(dim=-1, dtype=sum_dtype(probabilities.device))
    chosen = torch.searchsorted(cumulative, numbers[:, None] * cumulative[:, -1:], right=True)
    return chosen.clamp(max=probabilities.shape[-1] - 1)[:, 0]


def _row_seed(seed: int, row: int) -> int:
    return int.from_bytes(blake2b(f"{seed}:{row}".encode()).digest()[:8], "little") >> 1
