"""Pipeline stages of a model, and the schedule that drives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

from castalia.config.layout_rules import stages_per_rank
from castalia.config.schema import ParallelConfig
from castalia.errors import ConfigError
from castalia.model.transformer import Transformer
from castalia.parallel.executor import Rows
from castalia.parallel.mesh import Mesh
from castalia.parallel.shards import local
from castalia.plan.layout import stages

SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleZBVZeroBubble,
}


def cut_stage(model: Transformer, index: int, num_stages: int, seq_length: int) -> Transformer:
    """Deletes from a model what other stages hold. Parameter names stay those of the whole model.

    A tied embedding stays on the first stage, which looks tokens up in it, and on the last one, whose head it is.
    """
    plan = stages(model.cfg, num_stages, seq_length)
    first_block = sum(stage.layers for stage in plan[:index])
    for name in list(model.blocks):
        if not first_block <= int(name) < first_block + plan[index].layers:
            del model.blocks[name]
    if not plan[index].first:
        model.positions = model.embed_norm = None
        if not (plan[index].last and model.cfg.tie_embeddings):
            model.embed = None  # type: ignore[assignment]
    if not plan[index].last:
        model.norm = None  # type: ignore[assignment]
        model.head = None
    return model


class Pipeline:
    """This rank's stages, and the schedule that interleaves their micro-batches with those of the other ranks."""

    def __init__(
        self,
        parts: dict[int, Transformer],
        mesh: Mesh,
        parallel: ParallelConfig,
        num_micro_batches: int,
        micro_batch: tuple[int, int],
        compute_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`parts` are this rank's stages by number, `micro_batch` is (sequences, their length on this context rank).

        Raises ConfigError where this torch does not have the schedule.
        """
        num_stages = parallel.pp * stages_per_rank(parallel)
        last = num_stages - 1
        hidden_size = next(iter(parts.values())).cfg.hidden_size
        # Shapes that stages receive and send, [b, t] and [b, t, h]; declared, so that ranks need not tell each other.
        tokens = torch.empty(micro_batch, dtype=torch.int64, device="meta")
        shape = (*micro_batch, hidden_size)
        between = torch.empty(shape, dtype=compute_dtype, device="meta", requires_grad=True)
        result = torch.empty((), device="meta"), torch.empty((), dtype=torch.int64, device="meta")
        if parallel.pipeline == "zero-bubble" and torch.__version__ < "2.12":
            raise ConfigError(
                f"parallel.pipeline=zero-bubble needs a newer torch than {torch.__version__}, which cannot compute the "
                "gradients of inputs and of weights one after the other; update torch, or take interleaved"
            )
        self.group = mesh.pipeline.get_group()
        self.has_first, self.has_last = 0 in parts, last in parts
        self.num_micro_batches = num_micro_batches
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
            for index, stage in parts.items()
        ]
        single = parallel.pipeline in ("gpipe", "1f1b")
        # 1F1B with fewer micro-batches than stages does what GPipe does, but torch refuses it under that name.
        name = "gpipe" if parallel.pipeline == "1f1b" and num_micro_batches < num_stages else parallel.pipeline
        self.schedule = SCHEDULES[name](
            built[0] if single else built, num_micro_batches, loss_fn=self._weighted, scale_grads=False
        )
        tied = next(iter(parts.values())).cfg.tie_embeddings
        self.tied: list[Any] = [parts[i].embed.weight for i in (0, last) if tied and i in parts]
        self.tie_group = _first_and_last_rank(mesh) if tied and parallel.pipeline != "zero-bubble" else None

    @staticmethod
    def _weighted(output: tuple[Tensor, Tensor], weight: Tensor) -> Tensor:
        """The schedule's loss function: a micro-batch's sum of token losses times its weight."""
        return output[0] * weight[0]

    def forward_backward(self, rows: Rows, weights: Sequence[float], context: dict[str, Any]) -> Tensor:
        """Accumulates the gradients of the sum over micro-batches of weight * (sum of token losses).

        `rows` are this data rank's: [micro-batches * sequences, time]. Returns the sum, 0 on ranks without the last
        stage.
        """
        losses = self._run(self.schedule.step, rows, weights, context)
        self._sum_tied_gradients()
        return losses

    def loss_sum(self, rows: Rows, context: dict[str, Any]) -> Tensor:
        """The sum of token losses without gradients; 0 on ranks without the last stage."""
        return self._run(self.schedule.eval, rows, [1.0] * self.num_micro_batches, context)

    def _run(self, schedule: Callable, rows: Rows, weights: Sequence[float], context: dict[str, Any]) -> Tensor:
        losses: list[Tensor] = []
        inputs = (rows.tokens,) if self.has_first else ()
        arguments = rows.model_arguments() | context
        if self.has_last:
            target = torch.tensor(weights, device=rows.tokens.device)  # split into micro-batches like the rows
            schedule(*inputs, target=target, losses=losses, return_outputs=False, **arguments)
        else:
            schedule(*inputs, return_outputs=False, **arguments)
        return torch.stack(losses).sum().detach() if losses else torch.zeros((), device=rows.tokens.device)

    def _sum_tied_gradients(self) -> None:
        """Gives both copies of a tied embedding the sum of their gradients, so that they stay equal."""
        grads = [local(weight.grad) for weight in self.tied if weight.grad is not None]
        if len(grads) == 2:  # zero-bubble's V puts both stages on one rank
            grads[0] += grads[1]
            grads[1].copy_(grads[0])
        elif grads:
            dist.all_reduce(grads[0], group=self.tie_group)


def _first_and_last_rank(mesh: Mesh) -> dist.ProcessGroup | None:
    """The group of the first and the last pipeline rank that share this rank's other coordinates.

    None on ranks between them. Called on all ranks, because creating a group is collective.
    """
    # One column of the grid for each combination of data and tensor ranks: [pp, all others] transposed.
    columns = mesh.sharding.mesh.view(mesh.layout.pp, -1).T.tolist()
    own_group = None
    for column in columns:
        group = dist.new_group([column[0], column[-1]])
        if dist.get_rank() in (column[0], column[-1]):
            own_group = group
    return own_group
