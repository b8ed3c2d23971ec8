"""Pipeline stages of a model, and the schedule that drives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from castalia.config.schema import Model, Parallel
from castalia.errors import ConfigError
from castalia.model.transformer import Transformer
from castalia.parallel.mesh import Mesh, stages_per_rank
from castalia.parallel.shards import local

SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleZBVZeroBubble,
}


def balanced_split(cfg: Model, num_stages: int, seq_length: int) -> list[range]:
    """Blocks of each stage, so that the costliest stage is as cheap as can be. The head counts as the blocks it costs.

    Cost in multiply-adds for each token; the embedding is a look-up and costs none.
    """
    h, d = cfg.hidden_size, cfg.head_size
    block = (cfg.num_heads + 2 * cfg.kv_heads) * d * h + h * h + (3 if cfg.gated_mlp else 2) * h * cfg.mlp_width
    block += seq_length * cfg.num_heads * d  # scores and their weighted sum, half of them masked
    head = cfg.padded_vocab_size * h / block
    best = None
    for limit in range(1, cfg.num_layers + 1):  # blocks of a stage that is not the last
        last = cfg.num_layers - limit * (num_stages - 1)
        if last < 1:
            last = 1
        sizes = _sizes(cfg.num_layers - last, num_stages - 1) + [last]
        if min(sizes) < 1:
            continue
        cost = max(*sizes[:-1], sizes[-1] + head) if num_stages > 1 else sizes[-1] + head
        if best is None or cost < best[0]:
            best = cost, sizes
    assert best is not None
    starts = [sum(best[1][:i]) for i in range(num_stages + 1)]
    return [range(a, b) for a, b in zip(starts, starts[1:], strict=False)]


def _sizes(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)] if parts else []


def stages_of_rank(parallel: Parallel, pp_rank: int) -> list[int]:
    """Stage numbers on a pipeline rank: rank, rank + pp, ...; zero-bubble folds them into a V."""
    count = stages_per_rank(parallel)
    if parallel.pipeline == "zero-bubble" and parallel.pp > 1:
        return [pp_rank, 2 * parallel.pp - 1 - pp_rank]
    return [pp_rank + i * parallel.pp for i in range(count)]


def cut_stage(model: Transformer, blocks: range, is_first: bool, is_last: bool) -> Transformer:
    """Deletes from a model what other stages hold. Names stay those of the whole model."""
    for name in list(model.blocks):
        if int(name) not in blocks:
            del model.blocks[name]
    if not is_first:
        model.positions = None
        if not (is_last and model.cfg.tie_embeddings):
            model.embed = None
    if not is_last:
        model.norm = None
        model.head = None
    return model


class Pipeline:
    """This rank's stages and the schedule over all pipeline ranks."""

    def __init__(
        self,
        stages: dict[int, Transformer],
        mesh: Mesh,
        parallel: Parallel,
        num_micro_batches: int,
        micro_batch: tuple[int, int],
        compute_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`stages`: by their numbers. `micro_batch`: sequences of one, and their length on this context rank."""
        check_micro_batches(parallel, num_micro_batches)
        num_stages = parallel.pp * stages_per_rank(parallel)
        last = num_stages - 1
        hidden_size = next(iter(stages.values())).cfg.hidden_size
        tokens = torch.empty(micro_batch, dtype=torch.int64, device="meta")
        between = torch.empty(*micro_batch, hidden_size, dtype=compute_dtype, device="meta", requires_grad=True)
        result = torch.empty((), device="meta"), torch.empty((), dtype=torch.int64, device="meta")
        self.group = mesh.pipeline.get_group()
        self.stages, self.has_first, self.has_last = stages, 0 in stages, last in stages
        self.last_rank = dist.get_global_rank(self.group, 0 if parallel.pipeline == "zero-bubble" else parallel.pp - 1)
        built = [
            PipelineStage(
                stage,
                index,
                num_stages,
                device,
                input_args=(tokens if index == 0 else between,),
                output_args=result if index == last else (between,),
                group=self.group,
            )
            for index, stage in stages.items()
        ]
        single = parallel.pipeline in ("gpipe", "1f1b")
        self.schedule = SCHEDULES[parallel.pipeline](
            built[0] if single else built, num_micro_batches, loss_fn=self._weighted, scale_grads=False
        )
        self.tied = [stages[i].embed.weight for i in (0, last) if i in stages and stages[i].cfg.tie_embeddings]
        self.tie_group = _ends_group(mesh) if self._needs_tie_group(stages, parallel) else None

    @staticmethod
    def _needs_tie_group(stages: dict[int, Transformer], parallel: Parallel) -> bool:
        return next(iter(stages.values())).cfg.tie_embeddings and parallel.pipeline != "zero-bubble"

    @staticmethod
    def _weighted(output: tuple[Tensor, Tensor], weight: Tensor) -> Tensor:
        return output[0] * weight[0]

    def forward_backward(self, tokens: Tensor, labels: Tensor, weights: Sequence[float], context: dict) -> Tensor:
        """Leaves the gradients of sum over micro-batches of weight * (sum of token losses); returns that sum.

        It is 0 on ranks without the last stage. tokens, labels: [micro-batches * sequences, time] of this data rank.
        """
        losses: list[Tensor] = []
        inputs = (tokens,) if self.has_first else ()
        if self.has_last:
            # Each micro-batch finds its weight beside its labels.
            target = torch.tensor(weights, device=tokens.device)
            self.schedule.step(*inputs, target=target, losses=losses, return_outputs=False, labels=labels, **context)
        else:
            self.schedule.step(*inputs, return_outputs=False, **context)
        self._sum_tied_gradients()
        return torch.stack(losses).sum().detach() if losses else torch.zeros((), device=tokens.device)

    def _sum_tied_gradients(self) -> None:
        """The embedding's copies on the first and the last stage get the same gradient, so that they stay equal."""
        grads = [local(weight.grad) for weight in self.tied]
        if len(grads) == 2:  # both stages are on this rank
            grads[0] += grads[1]
            grads[1].copy_(grads[0])
        elif grads:
            dist.all_reduce(grads[0], group=self.tie_group)


def _ends_group(mesh: Mesh) -> dist.ProcessGroup | None:
    """First and last pipeline rank of this rank's data and tensor coordinates; None for ranks between. Collective."""
    columns = mesh.sharding.mesh.view(mesh.layout.pp, -1).T.tolist()
    mine = None
    for column in columns:
        group = dist.new_group([column[0], column[-1]])
        if dist.get_rank() in (column[0], column[-1]):
            mine = group
    return mine


def check_micro_batches(parallel: Parallel, count: int) -> None:
    """Raises ConfigError where the schedule cannot take so many micro-batches, naming the nearest that work."""
    if parallel.pipeline == "interleaved" and count % parallel.pp:
        near = [n for n in (count // parallel.pp * parallel.pp, -(-count // parallel.pp) * parallel.pp) if n]
        raise ConfigError(
            f"train.accumulation={count} micro-batches do not suit parallel.pipeline=interleaved, which takes "
            f"multiples of parallel.pp={parallel.pp}; use {' or '.join(map(str, near))}"
        )
    if parallel.pipeline == "zero-bubble" and count < 2 * parallel.pp:
        raise ConfigError(
            f"train.accumulation={count} micro-batches are too few for parallel.pipeline=zero-bubble on "
            f"parallel.pp={parallel.pp}; use at least {2 * parallel.pp}"
        )
