"""Acting in the middle of a run's evaluation or training, which torch's hooks can see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from castalia.model.transformer import Transformer


@contextmanager
def at_evaluation(act: Callable[[Tensor], object], training: bool = False) -> Iterator[None]:
    """While open, calls `act` with the tokens [sequences, time] of every forward pass of a model in eval mode, or with
    those of every micro-batch of training."""

    def hook(module, inputs, output):
        if isinstance(module, Transformer) and module.training == training:
            act(inputs[0])

    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def signal_at_micro_batch(number: int, send: Callable[[], object]) -> Iterator[None]:
    """Calls `send` in the forward pass of a micro-batch, counted from 1 over all steps."""
    seen = 0

    def act(tokens):
        nonlocal seen
        seen += 1
        if seen == number:
            send()

    with at_evaluation(act, training=True):
        yield
