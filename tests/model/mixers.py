"""What blocks of every kind that stand in place of attention must hold, whatever they are."""

from __future__ import annotations

import torch

from castalia.generate.kv_cache import KVCache, Prompts
from castalia.model.transformer import Transformer


@torch.no_grad()
def require_causal(model: Transformer) -> None:
    """A token changes nothing before it, and something after it. The vocabulary has at least 64 entries."""
    tokens = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[0, 11] = (other[0, 11] + 1) % 64
    changed = (model(tokens) - model(other)).abs().amax(dim=-1) > 0  # [b, t]
    assert not changed[1].any() and not changed[0, :11].any() and changed[0, 11:].all()


@torch.no_grad()
def require_same_token_by_token(model: Transformer, lengths: list[int]) -> KVCache:
    """Three texts that are written together, of which one ends early, equal whole sequences. Returns their cache."""
    more = 6
    rows = [torch.randint(64, (n + more,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    cache = KVCache(3, 16, torch.device("cpu"))
    prompts = torch.cat([row[:n] for row, n in zip(rows, lengths, strict=True)])[None]
    model.hidden(prompts, cache=Prompts(cache, [[0], [1], [2]], lengths))
    cache.set_lengths(lengths)
    kept = [0, 1, 2]
    for step in range(more):
        if step == 3:
            cache.keep([0, 2])
            kept = [0, 2]
        new = torch.stack([rows[i][lengths[i] + step] for i in kept])[:, None]
        hidden = model.hidden(new, cache=cache)[:, 0]
        for i, own in zip(kept, hidden, strict=True):
            whole = model.hidden(rows[i][None, : lengths[i] + step + 1])[0, -1]
            assert (own - whole).abs().max() < 1e-5
    return cache
