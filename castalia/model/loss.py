"""The output head and the cross-entropy as one operation that never holds fp32 logits of all tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORE = -100
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}  # of one chunk's fp32 logits


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """Sum over the tokens of -log softmax(hidden weight^T)[label] in fp32, and the number of labels that are not -100.

    `z_loss` times the square of log(sum of exp(logits)) is added for each token, which keeps the logits from drifting.
    hidden: [..., h] in the compute dtype; weight: [V, h] in any dtype, its gradient accumulates in fp32; labels: [...].
    """
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    total = _LinearCrossEntropy.apply(rows, weight, targets, z_loss, torch.is_grad_enabled())
    return total, (targets != IGNORE).sum()


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The same in plain operations, with all logits in memory."""
    logits = F.linear(hidden, weight.to(hidden.dtype)).float().flatten(0, -2)
    real = labels.flatten() != IGNORE
    total = F.cross_entropy(logits, labels.flatten(), reduction="sum", ignore_index=IGNORE)
    return total + z_loss * (logits.logsumexp(-1)[real] ** 2).sum(), real.sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are computed in the forward pass, chunk by chunk, while the chunk's logits are at hand."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float, grad_enabled: bool) -> Tensor:
        cast = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if grad_enabled and ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if grad_enabled and ctx.needs_input_grad[1] else None
        num_rows = max(1, CHUNK_BYTES.get(hidden.device.type, 64 << 20) // (4 * weight.shape[0]))
        for start in range(0, len(hidden), num_rows):
            part = slice(start, start + num_rows)
            x, real = hidden[part], labels[part] != IGNORE
            targets = labels[part].clamp(min=0)[:, None]
            logits = x @ cast.T
            log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
            total -= (log_probs.gather(1, targets)[:, 0] * real).sum()
            if z_loss:
                log_sums = logits[:, :1].float() - log_probs[:, :1]
                total += z_loss * (log_sums[:, 0].square() * real).sum()
            del logits
            if d_hidden is None and d_weight is None:
                continue
            d_logits = log_probs.exp_()
            if z_loss:
                d_logits.mul_(1 + 2 * z_loss * log_sums)
            d_logits.scatter_add_(1, targets, torch.full_like(log_probs[:, :1], -1.0))
            d_logits = d_logits.mul_(real[:, None]).to(x.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, cast, out=d_hidden[part])
            if d_weight is not None:
                _add_product(d_weight, d_logits.T, x)
                del d_logits
            del log_probs  # else they would live on beside the next chunk's
        ctx.gradients = d_hidden, d_weight
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor):
        return *scaled_gradients(ctx, scale), None, None, None


def scaled_gradients(ctx, scale: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients that the forward pass left: scaled in place, or kept if the graph is to be used again."""
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return tuple(None if d is None else d * scale for d in ctx.gradients)
    gradients, ctx.gradients = ctx.gradients, None
    return tuple(None if d is None else d.mul_(scale) for d in gradients)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where the total may be wider than the factors."""
    if total.dtype == b.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
