"""Tensor parallelism of the model: which matrices are split how, and the loss on split logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional as F

from castalia.config.loss_chunks import CHUNK_BYTES
from castalia.errors import ConfigError
from castalia.model.experts import ExpertMLP
from castalia.model.float8 import float8_linear
from castalia.model.layers import Linear, linear
from castalia.model.loss import IGNORE, capped, gain, product, scaled_gradients, slope_of, token_losses
from castalia.model.mamba import MambaBlock
from castalia.model.rwkv import RWKVBlock
from castalia.model.transformer import Block, Transformer
from castalia.parallel.expert_parallel import SplitExperts
from castalia.parallel.shards import with_local
from castalia.parallel.split_mixers import split_mamba, split_rwkv


class Replicated(ParallelStyle):
    """Keeps a small module, such as a norm, replicated; its input and output are placed as `layout`."""

    def __init__(self, layout: Placement) -> None:
        self.layout = layout

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def into(module: nn.Module, inputs: tuple, mesh: DeviceMesh) -> tuple:
            return (DTensor.from_local(inputs[0], mesh, [self.layout], run_check=False), *inputs[1:])

        def out_of(module: nn.Module, outputs: DTensor, mesh: DeviceMesh) -> Tensor:
            return outputs.to_local()

        return distribute_module(module, device_mesh, None, into, out_of)  # type: ignore[arg-type]


def apply_tensor_parallel(model: Transformer, mesh: DeviceMesh, sequence_parallel: bool) -> None:
    """Splits embedding and head by vocabulary, attention by heads, MLP by width (Megatron-LM's scheme, 1909.08053).

    Experts are split by their number, Mamba by channels, RWKV by heads and width; everything else is replicated. With
    `sequence_parallel` (2205.05198) activations between the matrices of a block are split along the sequence: the first
    block scatters them, the last one gathers them.
    Raises ConfigError for a parameter of which nothing here says how it is split.
    """
    inside = Shard(1) if sequence_parallel else Replicate()  # of activations [b, t, h] outside of attention and MLP
    # Column-parallel matrices need whole activations; row-parallel ones sum, or scatter, their partial outputs.
    whole = PrepareModuleInput(input_layouts=(inside, None), desired_input_layouts=(Replicate(), None))
    block_plan: dict[str, ParallelStyle] = {
        "norm1": Replicated(inside),
        "norm1_out": Replicated(inside),
        "norm2": Replicated(inside),
        "norm2_out": Replicated(inside),
        "attn": whole,
        "attn.qkv": ColwiseParallel(),
        "attn.q_norm": Replicated(Shard(2)),  # of heads [b, t, kv, ...]
        "attn.k_norm": Replicated(Shard(2)),
        "attn.out": RowwiseParallel(output_layouts=inside),
        "mlp": PrepareModuleInput(input_layouts=(inside,), desired_input_layouts=(Replicate(),)),
        "mlp.up": ColwiseParallel(),
        "mlp.gate": ColwiseParallel(),
        "mlp.down": RowwiseParallel(output_layouts=inside),
    }
    for block in model.blocks.values():
        if isinstance(block, MambaBlock):
            parallelize_module(block, mesh, {"norm1": Replicated(inside)})
            split_mamba(block, mesh, inside)
            continue
        if isinstance(block, RWKVBlock):
            # Over the batch, the mixer takes [t, b, h].
            mixed = Shard(0) if sequence_parallel and block.over == "batch" else inside
            parallelize_module(block, mesh, {"rwkv.norm1": Replicated(mixed), "rwkv.norm2": Replicated(mixed)})
            split_rwkv(block, mesh, mixed)
            continue
        assert isinstance(block, Block)
        # Families differ: there may be no gate, and one norm instead of two.
        present = {name: style for name, style in block_plan.items() if _find(block, name) is not None}
        if isinstance(block.mlp, ExpertMLP):
            present |= {"mlp": SplitExperts(inside, model.exact), "mlp.router.balance": Replicated(Replicate())}
            present |= {"mlp.shared_gate": Replicated(inside), "mlp.shared.up": ColwiseParallel()}
            present |= {"mlp.shared.gate": ColwiseParallel(), "mlp.shared.down": RowwiseParallel(output_layouts=inside)}
            present = {name: style for name, style in present.items() if _find(block, name) is not None}
        parallelize_module(block, mesh, present)
    if model.alibi is not None:  # slopes belong to heads, which are split
        model.alibi.shard(mesh.get_local_rank(), mesh.size())
    ends: dict[str, ParallelStyle] = {
        "embed": RowwiseParallel(input_layouts=Replicate()),
        "positions": Replicated(Replicate()),
        "embed_norm": Replicated(Replicate()),
        "norm": Replicated(Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
        "reward": Replicated(Replicate()),
    }
    parallelize_module(model, mesh, {name: style for name, style in ends.items() if _find(model, name) is not None})
    _require_styles(model)
    if sequence_parallel and model.blocks:
        blocks = list(model.blocks.values())
        blocks[0].register_forward_pre_hook(partial(_scatter_sequence, mesh))
        blocks[-1].register_forward_hook(partial(_gather_sequence, mesh))
    # Tensor ranks hold other heads, and in sequence parallelism other tokens: they must drop other elements.
    for block in model.blocks.values():
        both = model.cfg.attention_dropout if isinstance(block, RWKVBlock) else 0  # act on the stream there
        if sequence_parallel and (model.cfg.hidden_dropout or both):
            use_rank_local_rng(block, mesh.get_local_rank())
        elif model.cfg.attention_dropout and isinstance(block, Block):
            use_rank_local_rng(block.attn, mesh.get_local_rank())
    model.loss = partial(vocabulary_parallel_cross_entropy, mesh=mesh)
    model.token_losses = partial(vocabulary_parallel_token_losses, mesh=mesh)


def _require_styles(model: Transformer) -> None:
    # Parallel styles turn the parameters of their modules into DTensors, so that a plain one has been forgotten.
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            raise ConfigError(
                f"{name} cannot be used with parallel.tp: castalia/parallel/tensor_parallel.py does not say how its "
                "module is split. Add it to a plan there, or leave out parallel.tp"
            )


def use_rank_local_rng(module: nn.Module, rank: int) -> None:
    """Lets a module's forward pass draw different random numbers on each rank, and equal ones outside of it."""
    forward = module.forward

    def rank_local_forward(*args: Any, **kwargs: Any) -> Any:
        if not module.training:
            return forward(*args, **kwargs)
        with _rank_local_rng(rank):
            return forward(*args, **kwargs)

    module.forward = rank_local_forward  # type: ignore[method-assign]


@contextmanager
def _rank_local_rng(rank: int) -> Iterator[None]:
    """Inside, random numbers differ between ranks; afterwards all ranks draw equal ones again."""
    seed = int(torch.randint(1 << 62, ()))  # drawn from the common generator, so all ranks draw the same
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        torch.manual_seed(seed + rank)
        yield


def _find(module: nn.Module, name: str) -> nn.Module | None:
    """The submodule of a dotted name; None where a model of this kind, or this pipeline stage, lacks it."""
    child: Any = module
    for attribute in name.split("."):
        child = getattr(child, attribute, None)
    return child


def _scatter_sequence(mesh: DeviceMesh, block: nn.Module, args: tuple) -> tuple:
    """A forward pre-hook: [b, t, h], equal on all ranks -> this rank's [b, t / tp, h]."""
    x = DTensor.from_local(args[0], mesh, [Replicate()], run_check=False)
    return (x.redistribute(placements=[Shard(1)]).to_local(), *args[1:])


def _gather_sequence(mesh: DeviceMesh, block: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """A forward hook: this rank's [b, t / tp, h] -> [b, t, h] on all ranks."""
    x = DTensor.from_local(output, mesh, [Shard(1)], run_check=False)
    return x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Replicate()]).clone()


def vocabulary_parallel_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0, cap: float | None = None, *, mesh: DeviceMesh
) -> tuple[Tensor, Tensor]:
    """`castalia.model.loss.linear_cross_entropy` with split rows of `weight`: each rank holds [V / tp, h]."""
    assert isinstance(weight, DTensor)
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    # Every rank has the whole hidden state, but computes only its rows' share of the gradient: Partial sums them up.
    rows = DTensor.from_local(rows, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])
    local = weight.to_local()
    first = mesh.get_local_rank() * local.shape[0]
    total = _VocabularyParallel.apply(
        rows, local, targets, first, mesh.get_group(), z_loss, torch.is_grad_enabled(), cap
    )
    return total, (targets != IGNORE).sum()


def vocabulary_parallel_token_losses(
    hidden: Tensor, weight: Tensor, labels: Tensor, cap: float | None = None, *, mesh: DeviceMesh
) -> Tensor:
    """`castalia.model.loss.token_losses` with split rows of `weight`: each rank holds [V / tp, h]."""
    assert isinstance(weight, DTensor)
    rows = DTensor.from_local(hidden, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])
    local, group, operations = weight.to_local(), mesh.get_group(), {"max": dist.ReduceOp.MAX, "sum": dist.ReduceOp.SUM}

    def reduce(tensor: Tensor, how: str) -> None:
        dist.all_reduce(tensor, operations[how], group)

    return token_losses(rows, local, labels, mesh.get_local_rank() * local.shape[0], reduce, cap)


class _VocabularyParallel(torch.autograd.Function):
    """Cross-entropy in chunks of rows, as on one rank. Three values per row are reduced over ranks: the largest logit,
    the sum of exponentials and the target's logit, which only one rank holds. Gradients are computed in the forward
    pass, while a chunk's logits exist.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        first: int,
        group: Any,
        z_loss: float,
        grad_enabled: bool,
        cap: float | None,
    ) -> Tensor:
        cast, held = weight.to(hidden.dtype), gain(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if grad_enabled and ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if grad_enabled and ctx.needs_input_grad[1] else None
        num_rows = max(1, CHUNK_BYTES.get(hidden.device.type, 64 << 20) // (4 * weight.shape[0]))
        for start in range(0, len(hidden), num_rows):
            part = slice(start, start + num_rows)
            # logits [rows, V / tp] of this chunk; softmax needs their maximum and sum over the whole vocabulary.
            x, real = hidden[part], labels[part] != IGNORE
            logits = capped((x @ cast.T).float(), cap)
            slope = slope_of(logits, cap)
            largest = logits.amax(dim=-1, keepdim=True)
            dist.all_reduce(largest, dist.ReduceOp.MAX, group)
            logits -= largest
            # Targets in other ranks' rows count as 0 here, and the sum over ranks has the one that is held.
            here = (labels[part] >= first) & (labels[part] < first + len(weight))
            targets = (labels[part] - first).clamp(0, len(weight) - 1)[:, None]
            target_logits = logits.gather(1, targets)[:, 0] * here
            exponentials = logits.exp_()
            sums = torch.stack((exponentials.sum(dim=-1), target_logits))
            dist.all_reduce(sums, dist.ReduceOp.SUM, group)
            total += ((sums[0].log() - sums[1]) * real).sum()
            log_sums = sums[0].log() + largest[:, 0]
            total += z_loss * (log_sums.square() * real).sum()
            if d_hidden is None and d_weight is None:
                continue
            # d loss / d logits = softmax - one-hot target, and the z-loss's part. `held` is a gain that keeps 16-bit
            # gradients in range; it is divided out below.
            d_logits = exponentials.mul_(((1 + 2 * z_loss * log_sums) / sums[0])[:, None])
            d_logits.scatter_add_(1, targets, -here.float()[:, None])
            d_logits = d_logits.mul_(real[:, None] * held)
            d_logits = (d_logits if slope is None else d_logits.mul_(slope)).to(x.dtype)
            if d_hidden is not None:
                torch.addmm(d_hidden[part], d_logits, cast, beta=0, alpha=1 / held, out=d_hidden[part])
            if d_weight is not None:
                d_weight.add_(product(d_logits.T, x), alpha=1 / held)
        ctx.gradients = d_hidden, d_weight
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Any, ...]:
        return *scaled_gradients(ctx, scale), None, None, None, None, None, None


def shard_adapters(model: nn.Module, mesh: DeviceMesh) -> None:
    """Splits LoRA adapters like their matrices: rows of `lora_b` where rows are split, else columns of `lora_a`."""
    for module in model.modules():
        if isinstance(module, Linear) and module.lora_a is not None:
            (placement,) = module.weight.placements  # type: ignore[union-attr,attr-defined]
            name = "lora_b" if placement.is_shard(0) else "lora_a"
            shard = distribute_tensor(getattr(module, name), mesh, [placement])
            module.register_parameter(name, nn.Parameter(shard))
            if module.lora_dropout:
                rank = mesh.get_local_rank() if placement.is_shard(1) else None
                module.dropped = partial(_dropped, module, rank)  # type: ignore[method-assign]


def _dropped(module: Linear, rank: int | None, x: Tensor) -> Tensor:
    """`Linear.dropped` on this rank's part of the input; without a `rank` all have the whole of it.

    Ranks with different parts drop different elements.

    This avoids torch's dropout of DTensors, whose first call on GPUs broadcasts the generator's state over all ranks of
    the run. In the middle of a pipeline stage that is a deadlock, because other stages wait for this one.
    """
    with _rank_local_rng(rank) if rank is not None and module.training else nullcontext():
        return with_local(x, lambda part: F.dropout(part, module.lora_dropout, module.training))


def float8_on_ranks(model: nn.Module) -> None:
    """Lets each rank multiply its own part of a float8 matrix, whose operands have scales of their own there."""
    for module in model.modules():
        if isinstance(module, Linear) and module.float8:
            module.plain = partial(_float8_part, module)  # type: ignore[method-assign]


def _float8_part(module: Linear, x: DTensor, bias: DTensor | None) -> DTensor:
    """`Linear.plain` of a rank's rows of the weight, or of its columns, whose products are summands."""
    if not module.training:
        return linear(x, module.weight, bias)  # type: ignore[return-value]
    weight: Any = module.weight
    mesh, by_rows = weight.device_mesh, weight.placements[0].is_shard(0)
    if by_rows:  # of which each rank has a summand of the input's gradient
        part = float8_linear(
            x.to_local(grad_placements=[Partial()]), weight.to_local(), None if bias is None else bias.to_local()
        )
        return DTensor.from_local(part, mesh, [Shard(part.dim() - 1)], run_check=False)
    whole = DTensor.from_local(float8_linear(x.to_local(), weight.to_local()), mesh, [Partial()], run_check=False)
    return whole if bias is None else whole + bias.to(x.dtype)  # type: ignore[return-value]


def replicate_other_parameters(model: nn.Module, mesh: DeviceMesh) -> None:
    """Turns every parameter that is not split into a replicated DTensor, so that all parameters share one mesh."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not isinstance(parameter, DTensor):
                module.register_parameter(name, nn.Parameter(distribute_tensor(parameter, mesh, [Replicate()])))
