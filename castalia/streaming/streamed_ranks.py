"""A model that is split over several processes, each of which reads its share from disk block by block.

rank 0    embedding, blocks 0 to 21     all micro-batches of a pass go through a block, then on to rank 1
rank 1    blocks 22 to 43, head         meanwhile rank 0 reads on for the next pass

Tensor ranks read their rows or columns of each matrix, and add up their results as in training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from castalia.data.loader import Batch
from castalia.model.transformer import Transformer
from castalia.parallel import shards
from castalia.parallel.executor import Rows
from castalia.parallel.inference import SplitModel, divide
from castalia.parallel.mesh import Mesh
from castalia.streaming.stream_units import Share
from castalia.streaming.streamed_model import Cut, Scratch, StreamedExecutor, StreamedTransformer


def share_of(mesh: Mesh) -> Share:
    """What this process holds of a model."""
    return Share(mesh.pp_rank, mesh.layout.pp, mesh.tp_rank, mesh.layout.tp)


class RankScratch(Scratch):
    """Casts this rank's part of a tensor."""

    in_tiles = False  # a slice of a DTensor takes longer than it saves

    def cast(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Scratch.cast`."""
        if value.dtype == dtype:
            return value
        cast = super().cast
        return shards.with_local(value, lambda part: cast(part, dtype))


class RankCut(Cut):
    """The share of one rank of a mesh. Parameters are DTensors where the model is split over tensor ranks."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh, self.sharded = mesh, dict[str, tuple]()
        if mesh.layout.tp > 1:
            self.scratch = RankScratch

    def divide(self, model: Transformer) -> None:
        """See `Cut.divide`."""
        divide(model, self.mesh)
        self.sharded = shards.sharding_of(model)

    def placed(self, name: str, value: Tensor) -> Tensor:
        """See `Cut.placed`."""
        if name not in self.sharded:
            return value
        return shards.from_local(value, self.mesh.tensor, self.sharded[name])


class StreamedSplit(SplitModel):
    """A split model whose stage is streamed."""

    stage: StreamedTransformer

    def __init__(self, stage: StreamedTransformer, mesh: Mesh) -> None:
        super().__init__(stage, mesh, stage.compute_dtype or torch.float32, stage.device)
        if mesh.layout.tp > 1:
            operations, group = {"max": dist.ReduceOp.MAX, "sum": dist.ReduceOp.SUM}, mesh.tensor.get_group()

            def reduce(tensor: Tensor, how: str) -> None:
                dist.all_reduce(tensor, operations[how], group)

            stage.reduce = reduce

    def hidden_each(self, calls: Iterable[tuple[Tensor, Mapping[str, Any]]]) -> Iterator[Tensor]:
        """See `SplitModel.hidden_each`. All are handed on before the caller sees the first one.

        Else it might wait for the last stage's logits while that waits for the others.
        """
        return iter(list(super().hidden_each(calls)))

    def close(self) -> None:
        """See `StreamedTransformer.close`."""
        self.stage.close()

    def own_logits(self, x: Tensor) -> Tensor:
        """See `SplitModel.own_logits`."""
        return self.stage.logits(x)


class StreamedSplitExecutor(StreamedExecutor):
    """Evaluates a model that is split over processes and streamed on each."""

    def __init__(self, model: StreamedSplit, micro_batch_size: int) -> None:
        super().__init__(model.stage, micro_batch_size)
        self.split = model

    def losses(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        """See `Executor.losses`. Each batch is one micro-batch; every rank has its loss."""
        remaining, stage = iter(batches), self.split.stage
        while group := list(islice(remaining, stage.calls_at_once)):
            rows = [part for batch in group for part in self._parts(Rows.of(batch))]
            calls = [(each.tokens, {"documents": each.documents}) for each in rows]
            states = self.split.hidden_each(calls)
            found = [
                stage.total_loss(x, each.labels)[0] if self.split.is_last else torch.zeros(())
                for x, each in zip(states, rows, strict=True)
            ]
            losses = torch.stack(found).to(self.device)
            self.split.from_last(losses)
            yield from zip(group, losses, strict=True)
