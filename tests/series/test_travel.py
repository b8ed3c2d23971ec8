from __future__ import annotations

import pytest
import torch

from castalia.series.travel import adam_factor


@pytest.mark.parametrize(("betas", "expected"), [((0.9, 0.95), 1.17), ((0.9, 0.999), 7.27)])
def test_the_bound_of_adam_is_the_known_one(betas, expected):
    assert adam_factor(*betas, 100_000) == pytest.approx(expected, rel=5e-3)
    assert adam_factor(*betas, 1) == pytest.approx(1.0)


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.5, 0.8), (0.0, 0.9)])
def test_the_gradients_that_reach_furthest_reach_the_bound(betas):
    """The inequality is an equality where gradients rise as (b2 / b1)^t; no other may go further."""
    updates, draw = 300, torch.Generator().manual_seed(0)
    ratio = betas[1] / betas[0] if betas[0] else 100.0
    gradients = [torch.tensor([1.0, 1e-3], dtype=torch.float64) * ratio ** min(t, 60) for t in range(updates)]
    for series in (gradients, [torch.randn(2, generator=draw, dtype=torch.float64) for _ in range(updates)]):
        weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        optimizer = torch.optim.AdamW([weight], lr=1.0, betas=betas, eps=1e-300, weight_decay=0.0)
        for number, gradient in enumerate(series):
            before = weight.detach().clone()
            weight.grad = gradient.clone()
            optimizer.step()
            moved = float((weight.detach() - before).abs().max())
            assert moved <= adam_factor(*betas, number + 1) * (1 + 1e-9)
