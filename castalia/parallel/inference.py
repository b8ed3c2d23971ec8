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
from castalia.model.transformer import Transformer
from castalia.parallel.mesh import build_mesh
from castalia.parallel.pipeline import cut_stage
from castalia.parallel.rank_grid import RankGrid
from castalia.parallel.shards import local
from castalia.parallel.tensor_parallel import apply_tensor_parallel, replicate_other_parameters


class SplitModel(nn.Module):
    """Offers the methods of `Transformer` that generation needs. Each is called on all ranks, with the same tokens.

    Logits are bit-equal on all ranks, so that each rank samples the same next tokens by itself.
    """

    def __init__(
        self, cfg: ModelConfig, layout: RankGrid, dtype: torch.dtype, device: torch.device, exact: bool
    ) -> None:
        """Parameters are left unset; they and the computation are in `dtype`. Raises ConfigError for data ranks."""
        super().__init__()
        if layout.dp > 1:
            raise ConfigError(
                f"{layout.world} processes are more than tp {layout.tp} x pp {layout.pp}, which one copy of the model "
                f"takes; start {layout.tp * layout.pp}"
            )
        self.cfg, self.compute_dtype = cfg, None
        mesh = build_mesh(layout, device.type)
        self.tensor, self.group = mesh.tensor, mesh.pipeline.get_group()
        self.rank, self.last = mesh.pp_rank, layout.pp - 1
        # On the meta device, so that no rank ever holds the whole model.
        with torch.device("meta"):
            stage = Transformer(cfg, exact=exact).to(dtype)
        if layout.pp > 1:
            stage = cut_stage(stage, self.rank, layout.pp, cfg.max_positions or 1)
        apply_tensor_parallel(stage, self.tensor, sequence_parallel=False)
        replicate_other_parameters(stage, self.tensor)
        self.stage: Any = stage.to_empty(device=device).eval()

    def hidden(self, tokens: Tensor, *, cache: Any) -> Tensor:
        """tokens [b, t] -> the hidden state [b, t, h] after this rank's stage. The cache takes up the tokens."""
        x = tokens
        if self.rank > 0:
            weight = next(self.parameters())  # has the dtype and the device of activations
            x = torch.empty(*tokens.shape, self.cfg.hidden_size, dtype=weight.dtype, device=weight.device)
            dist.recv(x, group=self.group, group_src=self.rank - 1)
        x = self.stage.hidden(x, cache=cache)
        if self.rank < self.last:
            dist.send(x.contiguous(), group=self.group, group_dst=self.rank + 1)
        return x

    def hidden_each(self, calls: Iterable[tuple[Tensor, Mapping[str, Any]]]) -> Iterator[Tensor]:
        """`hidden` of several (tokens, arguments), one after another."""
        return (self.hidden(tokens, **arguments) for tokens, arguments in calls)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def logits(self, x: Tensor) -> Tensor:
        """x [rows, h] of the last stage -> logits [rows, V] on every rank; other stages' x is ignored."""
        if self.rank == self.last:
            # Each tensor rank computes its rows of the vocabulary, [rows, V / tp]; then all of them are gathered.
            part = F.linear(x, local(self.stage.head_weight).to(x.dtype))
            whole = DTensor.from_local(part, self.tensor, [Shard(1)], run_check=False).full_tensor().contiguous()
        else:
            whole = x.new_empty(len(x), self.cfg.padded_vocab_size)
        if self.last:
            dist.broadcast(whole, group=self.group, group_src=self.last)
        return whole
