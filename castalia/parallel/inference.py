"""Inference with a model that is split over ranks by tensor and pipeline parallelism."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F

from castalia.config.schema import ModelConfig
from castalia.errors import ConfigError
from castalia.model.layers import hold_in
from castalia.model.loss import capped
from castalia.model.transformer import Transformer
from castalia.parallel.mesh import Mesh, build_mesh
from castalia.parallel.pipeline import cut_stage
from castalia.parallel.rank_grid import RankGrid
from castalia.parallel.shards import local
from castalia.parallel.tensor_parallel import apply_tensor_parallel, replicate_other_parameters


def inference_mesh(layout: RankGrid, device_type: str) -> Mesh:
    """The mesh of one copy of a model. Called on all ranks. Raises ConfigError for data ranks."""
    if layout.dp > 1:
        raise ConfigError(
            f"{layout.world} processes are more than tp {layout.tp} x pp {layout.pp}, which one copy of the model "
            f"takes; start {layout.tp * layout.pp}"
        )
    return build_mesh(layout, device_type)


def divide(model: Transformer, mesh: Mesh) -> None:
    """Leave this rank's share of a model that is on the meta device, so that no rank ever holds all of it."""
    if mesh.layout.pp > 1:
        cut_stage(model, mesh.pp_rank, mesh.layout.pp, model.cfg.max_positions or 1)
    if mesh.layout.tp > 1:
        apply_tensor_parallel(model, mesh.tensor, sequence_parallel=False)
        replicate_other_parameters(model, mesh.tensor)


def empty_stage(cfg: ModelConfig, mesh: Mesh, dtype: torch.dtype, device: torch.device, exact: bool) -> Transformer:
    """This rank's share of a model. Parameters are left unset; they and the computation are in `dtype`."""
    with torch.device("meta"):
        stage = Transformer(cfg, exact=exact)
    hold_in(stage, dtype)
    divide(stage, mesh)
    return stage.to_empty(device=device).eval()


class SplitModel(nn.Module):
    """Offers the methods of `Transformer` that generation needs. Each is called on all ranks, with the same tokens.

    Logits are bit-equal on all ranks, so that each rank samples the same next tokens by itself.
    """

    def __init__(self, stage: Transformer, mesh: Mesh, dtype: torch.dtype, device: torch.device) -> None:
        """`stage`: this rank's share. `dtype` and `device`: of activations."""
        super().__init__()
        self.stage: Any = stage
        self.cfg, self.compute_dtype, self.dtype, self.device = stage.cfg, None, dtype, device
        self.cache_dtype = stage.cache_dtype
        self.tensor, self.group = mesh.tensor, mesh.pipeline.get_group()
        self.rank, self.last = mesh.pp_rank, mesh.layout.pp - 1

    @property
    def is_last(self) -> bool:
        """Whether this rank has the last stage."""
        return self.rank == self.last

    @property
    def calls_at_once(self) -> int:
        """See `Transformer.calls_at_once`."""
        return self.stage.calls_at_once

    def hidden(self, tokens: Tensor, **arguments: Any) -> Tensor:
        """tokens [b, t] -> the hidden state [b, t, h] after this rank's stage. A cache takes up the tokens."""
        return next(iter(self.hidden_each([(tokens, arguments)])))

    def hidden_each(self, calls: Iterable[tuple[Tensor, Mapping[str, Any]]]) -> Iterator[Tensor]:
        """`hidden` of several (tokens, arguments).

        A stage in memory takes one after another from the stage before it, a streamed one takes all of them first.
        """
        return map(self._handed_on, self.stage.hidden_each((self._arriving(tokens), rest) for tokens, rest in calls))

    def _arriving(self, tokens: Tensor) -> Tensor:
        """The tokens on the first stage; on others the hidden state of the stage before."""
        if self.rank == 0:
            return tokens
        x = torch.empty(*tokens.shape, self.cfg.hidden_size, dtype=self.dtype, device=self.device)
        dist.recv(x, group=self.group, group_src=self.rank - 1)
        return x

    def _handed_on(self, x: Tensor) -> Tensor:
        if not self.is_last:
            dist.send(x.contiguous(), group=self.group, group_dst=self.rank + 1)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """x [rows, h] of the last stage -> logits [rows, V] on every rank; other stages' x is ignored."""
        if self.is_last:
            # Each tensor rank computes its rows of the vocabulary, [rows, V / tp]; then all of them are gathered.
            part = self.own_logits(x)
            whole = DTensor.from_local(part, self.tensor, [Shard(1)], run_check=False).full_tensor().contiguous()
        else:
            whole = x.new_empty(len(x), self.cfg.padded_vocab_size)
        return self.from_last(whole)

    def own_logits(self, x: Tensor) -> Tensor:
        """x [rows, h] -> the logits [rows, V / tp] of this tensor rank's rows of the vocabulary."""
        head = self.stage.head
        out = F.linear(x, local(self.stage.head_weight).to(x.dtype))
        if head is not None and head.bias is not None:
            out = out + local(head.bias).to(x.dtype)
        return capped(out, self.cfg.logit_softcap)

    def from_last(self, value: Tensor) -> Tensor:
        """The value of the last stage in place of each rank's own."""
        if self.last:
            dist.broadcast(value, group=self.group, group_src=self.last)
        return value
