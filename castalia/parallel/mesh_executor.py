"""The executor on a mesh of ranks. Every method is called on all ranks together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

from castalia.config.batch import BatchPlan
from castalia.config.schema import CompleteConfig
from castalia.config.tensor_table import constant_value, row_of
from castalia.errors import ConfigError
from castalia.model.init import TILE_ROWS, neox_matrices, seeded_tensor
from castalia.model.loss import IGNORE
from castalia.model.transformer import Transformer
from castalia.parallel.apply import build_stages
from castalia.parallel.context_parallel import CP_ATTENTION, refuse_ring
from castalia.parallel.executor import (
    Computed,
    Executor,
    NormSubset,
    Objective,
    RankPart,
    Rows,
    StepLeft,
    T,
    cuts_padding,
    micro_loss,
)
from castalia.parallel.mesh import Mesh, build_mesh
from castalia.parallel.pipeline import Pipeline
from castalia.parallel.rank_grid import check_run, layout
from castalia.parallel.shards import global_gradient_norm, local, part
from castalia.parallel.watchdog import wait_until


class MeshExecutor(Executor):
    """One rank's part of a model that is split and sharded over a mesh."""

    def __init__(
        self,
        config: CompleteConfig,
        dtype: torch.dtype,
        device: torch.device,
        plan: BatchPlan,
        frozen: bool = False,
        mesh: Mesh | None = None,  # None: a new one
    ) -> None:
        self.config, self.device, self.plan, self.micro_batch_size = config, device, plan, plan.micro_batch_size
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        check_run(config, self.world)
        if config.parallel.offload and device.type == "cpu":
            raise ConfigError("parallel.offload keeps what a GPU need not hold in host memory; without a GPU remove it")
        if config.parallel.cp > 1 and config.parallel.cp_kind == "ring":
            refuse_ring(config.model, dtype, device)
        self.mesh = mesh or build_mesh(layout(config.parallel, self.world), device.type)
        sizes = self.mesh.layout
        # Ranks that share a sequence, and stages of a pipeline, exchange tensors of one shape.
        self.cuts_padding = cuts_padding(config) and sizes.tp == sizes.cp == sizes.pp == 1
        self.data_rank, self.data_size = self.mesh.dp_rank, sizes.dp
        self.stages = build_stages(config, self.mesh, dtype, device, frozen)
        self.time = config.data.seq_length // sizes.cp
        shard_kind = CP_ATTENTION[config.parallel.cp_kind]
        self.context = {"cache": shard_kind(self.mesh.context, self.time)} if sizes.cp > 1 else {}
        self.pipeline = None
        if sizes.pp > 1:
            shape = plan.micro_batch_size, self.time
            self.pipeline = Pipeline(self.stages, self.mesh, config.parallel, plan.accumulation, shape, dtype, device)
        # A tied embedding exists on the first and on the last stage: twice on this rank where it holds both.
        tied = self.pipeline.tied if self.pipeline else []
        self.duplicates = {"embed.weight": tied[1]} if len(tied) == 2 else {}

    @property
    def models(self) -> Sequence[Transformer]:
        """This rank's pipeline stages in order; the whole model without a pipeline."""
        return list(self.stages.values())

    @property
    def can_leave_step(self) -> bool:
        """Not with a pipeline, whose ranks are at different micro-batches at the same time."""
        return self.pipeline is None

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of all stages on this rank, as DTensors. Of a tied embedding's copies the first one counts."""
        # Reversed, so that the first stage's copy of a name wins.
        return {name: p for model in reversed(self.models) for name, p in model.named_parameters()}

    def part(self, tensor: Tensor) -> RankPart:
        """This rank's part of a DTensor, and where it begins."""
        return part(tensor)

    def local(self, tensor: Tensor) -> Tensor:
        """This rank's part of a DTensor; it shares memory with the tensor."""
        return local(tensor)

    def saves(self, name: str) -> bool:
        """False for a tied embedding's second copy, which the first stage saves."""
        return not (name == "embed.weight" and self.pipeline is not None and not self.pipeline.has_first)

    def initialize(self, config: CompleteConfig) -> None:
        """Sets random weights: each rank draws its own parts, with the values that one process would have drawn."""
        cfg = config.model
        pieces = [(name, part(p)) for model in self.models for name, p in model.named_parameters()]
        if (cfg.init or ("neox" if config.neox_exact else "seeded")) == "seeded":
            for name, piece in pieces:
                self._draw(config, name, piece)
            return
        for name, piece in pieces:
            if (value := constant_value(cfg, name)) is not None:
                piece.local.fill_(value)
        # GPT-NeoX draws all matrices from one stream, so every rank draws all of them and keeps its parts.
        for drawn, matrix in neox_matrices(cfg, config.seed):
            for name, piece in pieces:
                if name == drawn:
                    piece.local.copy_(matrix[piece.slices])

    def _draw(self, config: CompleteConfig, name: str, piece: RankPart) -> None:
        """Draws one parameter's initial values. Replicas draw a share of the rows each and add up their shares."""
        replicas, rows = self.mesh.layout.dp_replicate, piece.local.shape[0]
        apart = self.mesh.experts is not None and row_of(name).kind == "experts"  # replicas of these are other ranks
        if replicas == 1 or apart or constant_value(config.model, name) is not None:
            piece.local.copy_(seeded_tensor(config.model, config.seed, name, piece.shape, piece.slices))
            return
        share = -(-rows // (replicas * TILE_ROWS)) * TILE_ROWS
        # Shares are multiples of the tiles in which values are drawn, so that no tile is drawn twice.
        first = min(rows, self.mesh.sharding.get_local_rank("dp_replicate") * share)
        last = min(rows, first + share)
        whole = torch.zeros(piece.local.shape, device=piece.local.device)
        if last > first:
            box = (slice(piece.start[0] + first, piece.start[0] + last), *piece.slices[1:])  # in the whole matrix
            whole[first:last] = seeded_tensor(config.model, config.seed, name, piece.shape, box)
        dist.all_reduce(whole, group=self.mesh.sharding.get_group("dp_replicate"))
        piece.local.copy_(whole)

    def forward_backward(
        self,
        rows: Rows,
        weights: Sequence[float],
        scale: float,
        seeds: Sequence[int],
        objective: Objective | None = None,
    ) -> Tensor:
        """As on one process. The pipeline has no other objectives than the token losses."""
        computed = self.computed(list(rows.chunk(len(weights))))
        rows, context = self._local(rows)
        # Pipeline ranks hold other blocks and context ranks other tokens: their dropout must differ.
        seed_offset = self.mesh.pp_rank * self.mesh.layout.cp + self.mesh.cp_rank
        seeds = [seed + seed_offset for seed in seeds]
        if self.pipeline:
            assert objective is None
            torch.manual_seed(seeds[0])
            total = self.pipeline.forward_backward(rows, [weight * scale for weight in weights], context) / scale
        else:
            total = self._micro_batches(rows, computed, weights, scale, seeds, context, objective)
        return self._total(total)

    def _micro_batches(
        self,
        rows: Rows,
        computed: Sequence[Computed],
        weights: Sequence[float],
        scale: float,
        seeds: Sequence[int],
        context: dict[str, Any],
        objective: Objective | None,
    ) -> Tensor:
        """Forward and backward passes of all micro-batches; returns this rank's share of the loss."""
        model: Any = self.models[0]
        total, count = torch.zeros((), device=self.device), len(weights)
        zero = self.config.parallel.zero
        for micro, part_rows in enumerate(rows.chunk(count)):
            if micro and self.leaves_step():
                self._reshard()  # for whoever saves the weights; they stay gathered between micro-batches
                raise StepLeft
            last = micro == count - 1
            # Gradients are reduced once, with the last micro-batch; under ZeRO 2 and 3 no rank holds them in full until
            # then, so they are reduced with each.
            model.set_requires_gradient_sync(last or zero >= 2)
            model.set_is_last_backward(last or zero >= 2)
            if zero < 3:  # parameters are gathered once a step
                model.set_reshard_after_backward(last)
            torch.manual_seed(seeds[micro])
            cut_rows, kept = computed[micro].applied(part_rows)
            loss_sum = micro_loss(model, cut_rows, context | kept, objective, micro)
            (loss_sum * (weights[micro] * scale)).backward()
            total += loss_sum.detach() * weights[micro]
        return total

    def loss_sum(self, rows: Rows) -> Tensor:
        """Each data rank computes an equal share; sequences without labels pad the last ones."""
        # A pipeline computes a fixed number of micro-batches at a time.
        share = self.plan.micro_batch_size * (self.plan.accumulation if self.pipeline else 1)
        missing = -len(rows.tokens) % (share * self.data_size)
        rows = rows.map(lambda t: F.pad(t, (0, 0, 0, missing)))
        rows.labels[len(rows.labels) - missing :] = IGNORE
        total = torch.zeros((), device=self.device)
        for start in range(self.data_rank * share, len(rows.tokens), share * self.data_size):
            part_rows, context = self._local(rows.rows(start, start + share))
            if self.pipeline:
                total += self.pipeline.loss_sum(part_rows, context)
            else:
                total += self.models[0](part_rows.tokens, **part_rows.model_arguments(), **context)[0]
        return self._total(total)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """As on one process. Parameters are sharded again at the end, because a forward pass without a backward pass
        leaves them gathered."""
        try:
            with super().evaluating():
                yield
        finally:
            self._reshard()

    def _reshard(self) -> None:
        for model in self.models:
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def _local(self, rows: Rows) -> tuple[Rows, dict[str, Any]]:
        """This context rank's slice [rows, time / cp] of the sequences on the device, and further model arguments."""
        time = rows.tokens.shape[1] // self.mesh.layout.cp
        first = self.mesh.cp_rank * time
        return rows.map(lambda t: t[:, first : first + time]).to(self.device), self.context

    def _total(self, value: Tensor) -> Tensor:
        """Sums a scalar over data, context and pipeline ranks; tensor ranks hold the same value."""
        dist.all_reduce(value)  # over all ranks, which needs no further group; tensor ranks are counted tp times
        return value / self.mesh.layout.tp

    def gradients(self) -> list[Tensor]:
        """This rank's parts of the gradients, as plain tensors."""
        return [local(p.grad) for model in self.models for p in model.parameters() if p.grad is not None]

    def gradient_norm(self, counted: NormSubset | None = None) -> Tensor:
        """As on one process: each element counts once, however many ranks hold it."""
        named = [(name, p) for model in self.models for name, p in model.named_parameters()]
        every = [(p, counted[name] if counted else None) for name, p in named if counted is None or name in counted]
        return global_gradient_norm(every, self.device, twice=self.pipeline.tied if self.pipeline else ())

    def numbers(self, *values: Tensor) -> list[float]:
        """As on one process. NCCL's collectives return at once, so a lost rank shows only in this wait."""
        together = torch.stack(values)
        if together.is_cuda:
            computed = torch.cuda.Event()
            computed.record()
            wait_until(computed.query, self.config.parallel.timeout)
        return together.tolist()

    def sum_over_data(self, value: float) -> float:
        """The sum of one value per data rank; the other ranks of a data rank's row must have the same value."""
        total = torch.tensor(value, dtype=torch.float64)  # on the host, where the group uses gloo
        dist.all_reduce(total)
        return float(total) / (self.world // self.data_size)

    def sum_over_tokens(self, tensor: Tensor) -> Tensor:
        """As on one process: the sum over data and context ranks; tensor ranks must have the same values."""
        for axis in ("dp_replicate", "dp_shard"):
            dist.all_reduce(tensor, group=self.mesh.sharding.get_group(axis))
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        highest = torch.tensor(int(flag))
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return bool(highest)

    def gather(self, answer: T) -> list[T]:
        """The answers of all ranks, in rank order. They are pickled."""
        answers: list[Any] = [None] * self.world
        dist.all_gather_object(answers, answer)
        return answers

    def barrier(self) -> None:
        """Waits for the other ranks."""
        dist.barrier()
