"""The ring's arithmetic, with the ranks' parts in one process; layouts of several ranks are in `test_layouts.py`."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from castalia.parallel.ring_attention import _flash_gradients, attend_blockwise

GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("kv", [2, 4])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_parts_of_the_keys_make_the_whole(scale, kv, device):
    dtype, ranks, t = torch.float32 if device == "cpu" else torch.bfloat16, 3, 16
    generator = torch.Generator().manual_seed(1)
    q, k, v, d_out = (torch.randn(2, n, ranks * t, 16, generator=generator) for n in (4, kv, kv, 4))
    q, k, v, d_out = (x.to(device, dtype).requires_grad_() for x in (q, k, v, d_out))
    whole = F.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), is_causal=True, scale=scale, enable_gqa=kv < 4
    )
    expected = torch.autograd.grad(whole, (q, k, v), d_out.float())
    parts = [(q[:, :, part], k[:, :, part], v[:, :, part], d_out[:, :, part]) for part in
             (slice(i * t, i * t + t) for i in range(ranks))]  # fmt: skip
    near = {"atol": 2e-5, "rtol": 1e-5} if device == "cpu" else {"atol": 3e-2, "rtol": 3e-2}
    found = [torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v)]
    with torch.no_grad():
        for rank, (mine, _, _, d_mine) in enumerate(parts):
            seen = [torch.stack(parts[i][1:3]) for i in range(rank, -1, -1)]
            out, sums, rest = attend_blockwise(mine, iter(seen), scale)
            here = slice(rank * t, rank * t + t)
            torch.testing.assert_close(out.float(), whole[:, :, here], **near)
            for turn, pair in enumerate(seen):
                there = slice((rank - turn) * t, (rank - turn) * t + t)
                gradients = _flash_gradients(d_mine, mine, *pair, out, sums, rest, turn == 0, scale)
                for total, gradient, place in zip(found, gradients, (here, there, there), strict=True):
                    total[:, :, place] += gradient
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs.float(), **near)
