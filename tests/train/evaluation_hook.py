"""Acting in the middle of a run's evaluation, which torch's hooks can see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from castalia.model.transformer import Transformer


@contextmanager
def at_evaluation(act: Callable[[Tensor], object]) -> Iterator[None]:
    """While open, calls `act` with the tokens [sequences, time] of every forward pass of a model in eval mode."""

    def hook(module, inputs, output):
        if isinstance(module, Transformer) and not module.training:
            act(inputs[0])

    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
