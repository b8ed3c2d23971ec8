"""Recomputation: blocks forget their activations and compute them again in the backward pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from castalia.config.schema import ModelConfig

# What selective recomputation keeps: the results that cost matrix products. Norms, activations and casts run again, and
# so do the scores of the plain attention (bmm), which no memory has room for.
_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def has_dropout(cfg: ModelConfig) -> bool:
    return any((cfg.embedding_dropout, cfg.hidden_dropout, cfg.attention_dropout))


def apply_recompute(model: nn.Module, mode: str, *, dropout: bool) -> None:
    """Makes every block forget its activations and compute them again in the backward pass.

    `full` keeps a block's input alone, `selective` its matrix products too. Parameter names stay as they are.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": dropout}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    blocks: Any = model.blocks
    for block in blocks.values():
        block.forward = partial(_recomputed, block.forward, options)


def _recomputed(forward: Any, options: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, **options, **kwargs)


def _keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
