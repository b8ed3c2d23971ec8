"""Finding where a run went wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

NONE = "none by itself: the norm of all gradients overflows"


def first_bad_tensor(models: Sequence[nn.Module], loss: float) -> str:
    """Names the first tensor that is not finite, in the order of cause and effect: parameters, loss, gradients."""
    parameters = [named for model in models for named in model.named_parameters()]
    for name, parameter in parameters:
        if not _is_finite(parameter):
            return f"the parameter {name}"
    if not math.isfinite(loss):
        return "the loss"
    for name, parameter in reversed(parameters):  # as backward goes
        if parameter.grad is not None and not _is_finite(parameter.grad):
            return f"the gradient of {name}"
    return NONE


def _is_finite(tensor: Tensor) -> bool:
    """Of a sharded tensor this rank's part counts."""
    return bool(getattr(tensor, "_local_tensor", tensor).isfinite().all())


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
