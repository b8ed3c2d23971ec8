"""Balancing of experts outside of gradients, from the tokens that each of them got in a step."""

from __future__ import annotations

import torch

from castalia.observe.layer_stats import mixtures
from castalia.parallel.executor import Executor


@torch.no_grad()
def move_biases(executor: Executor, rate: float) -> None:
    """Adds `rate` to the bias of each expert with fewer tokens than the mean of its block, and takes it from others.

    Tokens are those of the whole batch (2408.15664, as DeepSeek-V3 does: 2412.19437). Routers that do not train keep
    their biases. Called on all ranks together.
    """
    routers = [
        (mixture.router.balance.bias, mixture.load)
        for _, mixture in mixtures(executor)
        if mixture.router.balance is not None and mixture.router.weight.requires_grad and mixture.load is not None
    ]
    if not routers:
        return
    loads = executor.sum_over_tokens(torch.stack([load for _, load in routers]))  # [blocks, e]
    for (bias, _), load in zip(routers, loads, strict=True):
        part = executor.part(bias)  # in host memory with parallel.offload
        part.local.add_((load.sum() - load * len(load)).sign()[part.slices].to(part.local.device), alpha=rate)
