"""The output head and the cross-entropy as one operation, which never holds fp32 logits of all tokens.

Logits are computed for a chunk of the tokens at a time. Those of 8,192 tokens over a vocabulary of 50,000 would take
1.6 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from castalia.config.loss_chunks import BLOCK_BYTES, CHUNK_BYTES
from castalia.model.kept_gradient import kept_gradient
from castalia.model.layers import is_slow_half

IGNORE = -100
LABELLED_SHARE = 0.875  # of the tokens; with fewer labels the others are left out
HALF_GAIN = 2.0**10  # factor on fp16 gradients of logits, of which those below 6e-8 would become zero


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Logits x -> cap tanh(x / cap), of the same shape; `cap` None: as they are."""
    return logits if cap is None else (logits / cap).tanh() * cap


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Sum over the tokens of -log softmax(hidden weight^T)[label] in fp32, and the number of labels that are not -100.

    `z_loss` times the square of log(sum of exp(logits)) is added for each token, which keeps the logits from drifting
    (PaLM, 2204.02311). `hidden` [..., h] is in the compute dtype, `weight` [V, h] in any dtype with a gradient that
    accumulates in fp32, `labels` [...]. `cap`: see `capped`, of the logits.
    """
    rows, targets, _ = _labelled(hidden, labels)
    if is_slow_half(rows):
        rows = rows.float()
    total = _LinearCrossEntropy.apply(rows, weight, targets, z_loss, torch.is_grad_enabled(), cap)
    return total, (targets != IGNORE).sum()


def _labelled(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states [n, h] and labels [n] of the tokens that have one, and which tokens these are; None: all are taken.

    Where nearly all have a label, choosing them would cost as much as it saves, and on a GPU the host would have to
    wait for their number.
    """
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if rows.device.type != "cpu":
        return rows, targets, None
    real = (targets != IGNORE).nonzero()[:, 0]
    if len(real) > LABELLED_SHARE * len(targets):
        return rows, targets, None
    return rows.index_select(0, real), targets[real], real


def sliced_cross_entropy(
    hidden: Tensor,
    slices: Callable[[], Iterable[Tensor]],
    labels: Tensor,
    vocab: int,
    bias: Tensor | None = None,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` without gradients, for a weight of which only some rows are cast at a time: same bits.

    `slices` gives the weight [vocab, h], cast, as consecutive rows; it is called for each chunk of the tokens. `bias`
    [vocab] is that of the head.
    """
    rows, targets, _ = _labelled(hidden, labels)
    if is_slow_half(rows):
        rows = rows.float()
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    num_rows = _rows_of(CHUNK_BYTES, rows.device, rows.dtype.itemsize * vocab)
    for start in range(0, len(rows), num_rows):
        logits = _sliced_logits(rows[start : start + num_rows], slices, vocab, bias)
        total += _loss_and_gradient(logits, targets[start : start + num_rows], 0.0, cap)
        del logits  # as below
    return total, (targets != IGNORE).sum()


def sliced_token_losses(
    hidden: Tensor,
    slices: Callable[[], Iterable[Tensor]],
    labels: Tensor,
    vocab: int,
    first: int = 0,
    reduce: Callable[[Tensor, str], None] | None = None,
    bias: Tensor | None = None,
    cap: float | None = None,
) -> Tensor:
    """`token_losses` without gradients, for a weight of which only some rows are cast at a time: same bits.

    `slices` and `vocab` as in `sliced_cross_entropy`, of the rows that this rank holds.
    """
    rows, targets, real = _labelled(hidden, labels)

    def logits_of(part: slice) -> Tensor:
        return capped(_sliced_logits(rows[part], slices, vocab, bias).float(), cap)

    log_sums, label_logits = _log_sums(logits_of, targets, vocab, first, reduce)
    return _in_place_of_all((log_sums - label_logits) * (targets != IGNORE), real, labels)


def _sliced_logits(
    rows: Tensor, slices: Callable[[], Iterable[Tensor]], vocab: int, bias: Tensor | None = None
) -> Tensor:
    logits, end = rows.new_empty(len(rows), vocab), 0
    for weight in slices():
        torch.mm(rows, weight.to(rows.dtype).T, out=logits[:, end : end + len(weight)])
        end += len(weight)
    return logits if bias is None else logits.add_(bias.to(logits.dtype))


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` in plain operations, with all logits in memory: what tests compare it with."""
    logits = capped(F.linear(hidden, weight.to(hidden.dtype)).float().flatten(0, -2), cap)
    real = labels.flatten() != IGNORE
    total = F.cross_entropy(logits, labels.flatten(), reduction="sum", ignore_index=IGNORE)
    return total + z_loss * (logits.logsumexp(-1)[real] ** 2).sum(), real.sum()


def token_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    first: int = 0,
    reduce: Callable[[Tensor, str], None] | None = None,
    cap: float | None = None,
) -> Tensor:
    """-log softmax(hidden weight^T)[label] of each token in fp32, 0 where the label is -100, in the shape of `labels`.

    Unlike in the sum, each loss may get a gradient of its own, so the backward pass computes the logits again, chunk
    by chunk. A tensor rank that holds the rows of `weight` from `first` on passes `reduce`, which combines a tensor
    with those of the other ranks in place, by "max" or "sum".
    """
    rows, targets, real = _labelled(hidden, labels)
    return _in_place_of_all(_TokenLosses.apply(rows, weight, targets, first, reduce, cap), real, labels)


def _in_place_of_all(losses: Tensor, real: Tensor | None, labels: Tensor) -> Tensor:
    """Losses in the shape of the labels, from those of the tokens `real`; see `_labelled`."""
    if real is not None:
        losses = losses.new_zeros(labels.numel()).index_copy(0, real, losses)
    return losses.view(labels.shape)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, labels: Tensor, first: int, reduce: Any, cap: float | None
    ) -> Tensor:
        cast = weight.to(hidden.dtype)

        def logits_of(part: slice) -> Tensor:
            return capped((hidden[part] @ cast.T).float(), cap)

        log_sums, label_logits = _log_sums(logits_of, labels, len(weight), first, reduce)
        ctx.save_for_backward(hidden, weight, labels, log_sums)
        ctx.first, ctx.cap = first, cap
        return (log_sums - label_logits) * (labels != IGNORE)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        hidden, weight, labels, log_sums = ctx.saved_tensors
        cast, grad = weight.to(hidden.dtype), grad * (labels != IGNORE)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for part, targets, here in _chunks(labels, len(weight), ctx.first):
            logits = capped((hidden[part] @ cast.T).float(), ctx.cap)
            slope = slope_of(logits, ctx.cap)
            d_logits = logits.sub_(log_sums[part][:, None]).exp_()  # softmax minus one-hot, times the loss's gradient
            d_logits.scatter_add_(1, targets, -here.float()[:, None])
            d_logits = d_logits.mul_(grad[part][:, None])
            d_logits = (d_logits if slope is None else d_logits.mul_(slope)).to(hidden.dtype)
            torch.mm(d_logits, cast, out=d_hidden[part])
            if d_weight is not None:
                _add_product(d_weight, d_logits.T, hidden[part])
        return d_hidden, d_weight, None, None, None, None


def slope_of(logits: Tensor, cap: float | None) -> Tensor | None:
    """The derivative of `capped` where it gives these logits; None without a cap."""
    return None if cap is None else 1 - (logits / cap).square_()


def _log_sums(
    logits_of: Callable[[slice], Tensor],
    labels: Tensor,
    vocab: int,
    first: int,
    reduce: Callable[[Tensor, str], None] | None,
) -> tuple[Tensor, Tensor]:
    """log(sum of exp(logits)) and the logit of the label, for each token [n] in fp32."""
    log_sums = torch.empty(len(labels), dtype=torch.float32, device=labels.device)
    label_logits = torch.empty_like(log_sums)
    for part, targets, here in _chunks(labels, vocab, first):
        logits = logits_of(part)
        largest = logits.amax(dim=-1)  # over all ranks, so that every rank's exponentials have the same scale
        if reduce:
            reduce(largest, "max")
        sums = (logits - largest[:, None]).exp_().sum(dim=-1)
        label_logits[part] = logits.gather(1, targets)[:, 0] * here  # 0 on ranks without the label's row
        if reduce:
            reduce(sums, "sum")
        log_sums[part] = sums.log() + largest
        del logits  # else they would stay in memory until the next chunk's exist
    if reduce:
        reduce(label_logits, "sum")
    return log_sums, label_logits


def _chunks(labels: Tensor, vocab: int, first: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Chunks of the tokens whose fp32 logits fit into the limit.

    With each come the labels as rows of the weight [n, 1], and whether it has the row of the label [n]. It has `vocab`
    rows, of the vocabulary those from `first` on.
    """
    num_rows = max(1, CHUNK_BYTES.get(labels.device.type, 64 << 20) // (4 * vocab))
    for start in range(0, len(labels), num_rows):
        part = slice(start, start + num_rows)
        here = (labels[part] >= first) & (labels[part] < first + vocab)
        yield part, (labels[part] - first).clamp(0, vocab - 1)[:, None], here


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, chunk by chunk, as long as the logits of the chunk are in memory."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float, grad_enabled: bool, cap: float | None = None
    ) -> Tensor:
        cast, factor = weight.to(hidden.dtype), 1 / gain(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if grad_enabled and ctx.needs_input_grad[0] else None
        # Set by the first chunk, to which others are added.
        make = torch.empty_like if len(hidden) else torch.zeros_like
        d_weight = make(weight, dtype=torch.float32) if grad_enabled and ctx.needs_input_grad[1] else None
        num_rows = _rows_of(CHUNK_BYTES, hidden.device, cast.itemsize * len(weight))
        for start in range(0, len(hidden), num_rows):
            part = slice(start, start + num_rows)
            logits = hidden[part] @ cast.T
            total += _loss_and_gradient(logits, labels[part], z_loss, cap)
            if d_hidden is not None:
                torch.addmm(d_hidden[part], logits, cast, beta=0, alpha=factor, out=d_hidden[part])
            if d_weight is not None:
                _add_product(d_weight, logits.T, hidden[part], factor, first=start == 0)
            del logits  # otherwise they would stay in memory until the next chunk's exist
        ctx.gradients, ctx.weight = (d_hidden, d_weight), weight
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor):
        kept, (d_hidden, d_weight) = kept_gradient(ctx.weight), ctx.gradients
        if kept is not None and d_weight is not None and not _graph_is_kept():
            kept.addcmul_(d_weight, scale)
            ctx.gradients = d_hidden, None
        return *scaled_gradients(ctx, scale), None, None, None, None


def _loss_and_gradient(logits: Tensor, labels: Tensor, z_loss: float, cap: float | None) -> Tensor:
    """The sum of the losses. The logits [n, V] are overwritten with their gradients times `gain`."""
    num_rows = _rows_of(BLOCK_BYTES, logits.device, 4 * logits.shape[1])
    blocks = zip(logits.split(num_rows), labels.split(num_rows), strict=True)
    return torch.stack([_block_loss(block, wanted, z_loss, cap) for block, wanted in blocks]).sum()


def _block_loss(logits: Tensor, labels: Tensor, z_loss: float, cap: float | None) -> Tensor:
    real, targets = (labels != IGNORE)[:, None].float(), labels.clamp(min=0)[:, None]
    wide = capped(logits.float(), cap)
    label_logits, slope = wide.gather(1, targets), slope_of(wide, cap)  # [n, 1]
    exponentials, sums, log_sums = _exponentials(wide)
    factor = real * gain(logits.dtype)
    # d loss / d logits = (1 + 2 z log_sum) softmax - one_hot(label)
    gradient = exponentials.mul_(factor * (1 + 2 * z_loss * log_sums) / sums).scatter_add_(1, targets, -factor)
    if slope is not None:
        gradient.mul_(slope)
    if gradient is not logits:
        logits.copy_(gradient)
    return ((log_sums - label_logits + z_loss * log_sums.square()) * real).sum()


def _exponentials(logits: Tensor) -> tuple[Tensor, Tensor | float, Tensor]:
    """The softmax of logits [n, V] times the sums, these sums [n, 1], and log(sum of exp(logits)) [n, 1].

    On a CPU the logits are overwritten.
    """
    largest = logits.amax(dim=-1, keepdim=True)
    if logits.is_cpu:  # these passes over its cache take less time than the fused kernel
        sums = logits.sub_(largest).exp_().sum(dim=-1, keepdim=True)
        return logits, sums, largest + sums.log()
    probs = F.softmax(logits, dim=-1)
    return probs, 1.0, largest - probs.amax(dim=-1, keepdim=True).log()  # the largest one is 1 / sum of exp


def gain(dtype: torch.dtype) -> float:
    """The factor by which gradients of logits are scaled in this dtype; products with them are divided by it again."""
    return HALF_GAIN if dtype == torch.float16 else 1.0


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b. The product of fp16 matrices on a GPU is fp32, since a sum over many tokens may overflow fp16."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype == torch.float16 else a @ b


def _rows_of(limits: Mapping[str, int], device: torch.device, row_bytes: int) -> int:
    """How many rows of `row_bytes` the limit of the device allows, at least one."""
    return max(1, limits.get(device.type, limits["cpu"]) // row_bytes)


def scaled_gradients(ctx, scale: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients that the forward pass left, times `scale`; in place, unless the graph will be used again."""
    if _graph_is_kept():
        return tuple(None if d is None else d * scale for d in ctx.gradients)
    gradients, ctx.gradients = ctx.gradients, None
    return tuple(None if d is None else d.mul_(scale) for d in gradients)


def _graph_is_kept() -> bool:
    """Whether this backward pass may come again."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def _add_product(total: Tensor, a: Tensor, b: Tensor, factor: float = 1.0, first: bool = False) -> None:
    """total += factor * (a @ b), or = if it is the `first`.

    If the total has a wider dtype, rows are added in blocks, to keep the copy small.
    """
    if total.dtype == b.dtype:
        total.addmm_(a, b, beta=0 if first else 1, alpha=factor)
        return
    num_rows = _rows_of(BLOCK_BYTES, total.device, 4 * total.shape[1])
    for rows, part in zip(total.split(num_rows), a.split(num_rows), strict=True):
        summand = product(part, b)
        if first:
            rows.copy_(summand)
            if factor != 1:
                rows.mul_(factor)
        else:
            rows.add_(summand, alpha=factor)
