"""Activation checkpointing: blocks drop their activations and recompute them in the backward pass."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import checkpoint as checkpointing
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from castalia.config.schema import CompleteConfig

# What selective checkpointing saves: the outputs of matrix products and fused attention. Norms, activation functions
# and casts are recomputed, and so are the scores of unfused attention (bmm), which are too large to save.
_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}

# Parameters that stay fp32 are a group of their own within a block. FSDP notes its work on them in the profiler once
# more when the block is computed again, which selective checkpointing takes for another computation.
_IGNORED: Any = getattr(checkpointing, "SAC_IGNORED_OPS", None)
if _IGNORED is not None:
    _PROFILER: Any = torch.ops.profiler
    _IGNORED |= {_PROFILER._record_function_enter_new.default, _PROFILER._record_function_exit._RecordFunction}

_GROUPED = getattr(torch.ops.aten, "_grouped_mm", None)  # what grouped products of experts are made of, where they are
if _GROUPED is not None:
    _KEPT.add(_GROUPED.default)


def has_dropout(config: CompleteConfig) -> bool:
    """Whether a model draws random numbers in training, so that recomputation has to restore the generator's state."""
    cfg, lora = config.model, config.finetune.lora
    more = (cfg.experts is not None and cfg.experts.jitter, lora is not None and lora.dropout)
    return any((cfg.embedding_dropout, cfg.hidden_dropout, cfg.attention_dropout, *more))


def apply_activation_checkpointing(model: nn.Module, mode: str, *, dropout: bool) -> None:
    """Wraps the forward pass of every block in activation checkpointing.

    `mode` is "none", "full" (only a block's input is saved), "selective" (the outputs of its matrix products, too) or
    "auto": as "full", until `compute_again` says which blocks it is for. The wrapped function is `forward`, not the
    module, so parameter names stay as they are.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": dropout}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    blocks: Any = model.blocks
    for block in blocks.values():
        if mode == "auto":
            block.recomputation = Recomputation()
            block.forward = partial(_recomputed_if_on, block.recomputation, block.forward, options)
        else:
            block.forward = partial(_recomputed, block.forward, options)


class Recomputation(AbstractContextManager):
    """Whether a block is computed again, and how long each time takes while that is measured. A context manager around
    the block's second forward pass."""

    def __init__(self) -> None:
        self.on = True
        self.device: torch.device | None = None  # where it is measured; None: it is not
        self.marks: list[Any] = []  # before and after each pass

    def measure(self, device: torch.device | None) -> None:
        """Measures from now on, or with None no more."""
        self.device, self.marks = device, []

    def __enter__(self) -> None:
        self.marks.append(self._mark())

    def __exit__(self, *error: Any) -> None:
        self.marks.append(self._mark())

    def _mark(self) -> Any:
        """The time, or on GPUs, which nothing here waits for, an event that will know it."""
        if self.device is None or self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def seconds(self) -> list[float]:
        """Of each pass. The device must have computed them all."""
        pairs = list(zip(self.marks[::2], self.marks[1::2], strict=True))
        return [end - begin if isinstance(end, float) else begin.elapsed_time(end) / 1e3 for begin, end in pairs]


def compute_again(models: Iterable[nn.Module], numbers: Collection[int]) -> None:
    """Has the blocks of these numbers computed again and no others, in models with "auto"."""
    for number, recomputation in recomputations(models).items():
        recomputation.on = number in numbers


def recomputations(models: Iterable[nn.Module]) -> dict[int, Recomputation]:
    """What "auto" has added to each block, by the blocks' numbers."""
    every: list[Any] = [model.blocks for model in models]
    return {int(name): block.recomputation for blocks in every for name, block in blocks.items()}


def _recomputed_if_on(
    recomputation: Recomputation, forward: Any, options: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    if not recomputation.on:
        return forward(*args, **kwargs)
    if recomputation.device is not None:
        options = options | {"context_fn": lambda: (nullcontext(), recomputation)}
    return _recomputed(forward, options, *args, **kwargs)


def _recomputed(forward: Any, options: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, **options, **kwargs)


def _keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
