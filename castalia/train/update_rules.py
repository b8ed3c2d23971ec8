"""AdamW and Lion, and several optimizers behind the interface of one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class PlainOptimizer:
    """What a rule of ours needs of `torch.optim.Optimizer`, whose first call imports torch's compiler: 65 MiB, and a
    second or two.

    Each group has its own `lr` and `weight_decay`, and the `params` that they apply to; `state` holds the moments,
    which whoever makes the optimizer puts there.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], **settings: Any) -> None:
        self.param_groups = [settings | group for group in groups]
        self.state: dict[Tensor, dict[str, Any]] = {}

    @torch.no_grad()
    def step(self) -> None:
        """Updates the parameters that have gradients."""
        for group in self.param_groups:
            if trained := [parameter for parameter in group["params"] if parameter.grad is not None]:
                self.update(group, trained, [parameter.grad for parameter in trained])

    def update(self, group: dict[str, Any], trained: list[Tensor], grads: list[Tensor]) -> None:
        """Updates the parameters `trained` of a group by their gradients."""
        raise NotImplementedError

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Frees the gradients."""
        assert set_to_none
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


class AdamW(PlainOptimizer):
    """Adam with decoupled weight decay (1711.05101), by torch's fused kernel: as `torch.optim.AdamW`, bit for bit."""

    def update(self, group: dict[str, Any], trained: list[Tensor], grads: list[Tensor]) -> None:
        """As above."""
        first, second, steps = ([self.state[p][key] for p in trained] for key in ("exp_avg", "exp_avg_sq", "step"))
        beta1, beta2 = group["betas"]
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            trained, grads, first, second, [], steps,
            lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"],
            amsgrad=False, maximize=False,
        )  # fmt: skip


class Lion(PlainOptimizer):
    """p -= lr * (sign(b1 m + (1 - b1) g) + wd * p); m = b2 m + (1 - b2) g (2302.06675).

    It has one moment, and every element moves by lr.
    """

    def update(self, group: dict[str, Any], trained: list[Tensor], grads: list[Tensor]) -> None:
        """As above."""
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


OneOptimizer = torch.optim.Optimizer | PlainOptimizer


class CombinedOptimizer:
    """Several optimizers, each over its own parameters, behind the interface of one."""

    def __init__(self, optimizers: Sequence[OneOptimizer]) -> None:
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


AnyOptimizer = OneOptimizer | CombinedOptimizer
