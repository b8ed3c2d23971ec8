"""Lion, which torch does not have, and several optimizers behind the interface of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class Lion(torch.optim.Optimizer):
    """p -= lr * (sign(b1 m + (1 - b1) g) + wd * p); m = b2 m + (1 - b2) g (2302.06675).

    It has one moment, and every element moves by lr.
    """

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float], weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates the parameters that have gradients. A closure is not supported."""
        assert closure is None
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            if not trained:
                continue
            grads = [p.grad for p in trained]
            moments = [self.state[p]["exp_avg"] for p in trained]
            first, second = group["betas"]
            # On sharded tensors torch 2.11 has lerp only in place, and no _foreach_sign_.
            directions = torch._foreach_mul(moments, 1.0)
            torch._foreach_lerp_(directions, grads, 1 - first)
            for direction in directions:
                direction.sign_()
            # Decay is decoupled, as AdamW's: it shrinks the weights instead of adding to the gradients.
            torch._foreach_mul_(trained, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(trained, directions, alpha=-group["lr"])
            torch._foreach_lerp_(moments, grads, 1 - second)


class CombinedOptimizer:
    """Several optimizers, each over its own parameters, behind the interface of one."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        """The state of all optimizers by parameter."""
        return {parameter: state for optimizer in self.optimizers for parameter, state in optimizer.state.items()}

    def step(self) -> None:
        """Steps all optimizers."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


AnyOptimizer = torch.optim.Optimizer | CombinedOptimizer
