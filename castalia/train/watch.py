"""Finding where a run went wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def first_bad_tensor(model: nn.Module, loss: float) -> str:
    """Names the first tensor that is not finite, in the order of cause and effect: parameters, loss, gradients."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if not parameter.isfinite().all():
            return f"the parameter {name}"
    if not math.isfinite(loss):
        return "the loss"
    for name, parameter in reversed(parameters.items()):  # as backward goes
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"the gradient of {name}"
    return "none by itself: the norm of all gradients overflows"


@torch.no_grad()
def first_bad_activation(model: nn.Module, micro_batches: Iterable[Tensor]) -> str | None:
    """Runs the forward passes again and names the first module whose output is not finite."""
    found: list[str] = []

    def look(name: str):
        def hook(module: nn.Module, args: object, output: object) -> None:
            if not found and isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    device = next(model.parameters()).device
    for tokens in micro_batches:
        model(tokens.to(device))
    for handle in handles:
        handle.remove()
    return found[0] if found else None
