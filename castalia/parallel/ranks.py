"""The engine's calls on a mesh of ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from castalia.config.batch import BatchPlan
from castalia.config.schema import RunConfig
from castalia.model.init import seeded_tensor
from castalia.parallel.apply import build_stages
from castalia.parallel.context import GatheredKeys
from castalia.parallel.engine import Engine
from castalia.parallel.mesh import Mesh, build_mesh, check_model, layout
from castalia.parallel.pipeline import Pipeline
from castalia.parallel.shards import global_gradient_norm, part


class Ranks(Engine):
    """One rank of a mesh. Every method is called on all ranks together."""

    def __init__(self, config: RunConfig, dtype: torch.dtype, device: torch.device, plan: BatchPlan) -> None:
        assert config.model is not None
        self.config, self.device = config, device
        check_model(config.model, config.parallel, config.data.seq_length)
        self.mesh: Mesh = build_mesh(layout(config.parallel, dist.get_world_size()), device.type)
        sizes = self.mesh.layout
        self.data_rank, self.data_size = self.mesh.dp_rank, sizes.dp
        stages = build_stages(config, self.mesh, dtype, device)
        self.models = list(stages.values())
        self.time = config.data.seq_length // sizes.cp
        self.pipeline = None
        if sizes.pp > 1:
            shape = plan.micro_batch_size, self.time
            self.pipeline = Pipeline(stages, self.mesh, config.parallel, plan.accumulation, shape, dtype, device)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """This rank's parameters by name. A tied embedding that two stages hold appears once, as the first one's."""
        return {name: p for model in reversed(self.models) for name, p in model.named_parameters()}

    def initialize(self) -> None:
        config = self.config
        assert config.model is not None
        with torch.no_grad():
            for model in self.models:
                for name, parameter in model.named_parameters():
                    piece = part(parameter)
                    piece.local.copy_(seeded_tensor(config.model, config.seed, name, piece.shape, piece.slices))

    def forward_backward(
        self, tokens: Tensor, labels: Tensor, weights: Sequence[float], seeds: Sequence[int]
    ) -> Tensor:
        mine = slice(self.mesh.cp_rank * self.time, (self.mesh.cp_rank + 1) * self.time)
        tokens, labels = tokens[:, mine].to(self.device), labels[:, mine].to(self.device)
        context = {"cache": GatheredKeys(self.mesh.context, self.time)} if self.mesh.layout.cp > 1 else {}
        if self.pipeline:
            torch.manual_seed(seeds[0])
            total = self.pipeline.forward_backward(tokens, labels, weights, context)
        else:
            total = self._micro_batches(tokens, labels, weights, seeds, context)
        dist.all_reduce(total)
        return total / self.mesh.layout.tp  # tensor ranks hold the same losses

    def _micro_batches(
        self, tokens: Tensor, labels: Tensor, weights: Sequence[float], seeds: Sequence[int], context: dict
    ) -> Tensor:
        model, count = self.models[0], len(weights)
        total = torch.zeros((), device=self.device)
        for micro, (x, y) in enumerate(zip(tokens.chunk(count), labels.chunk(count), strict=True)):
            model.set_requires_gradient_sync(micro == count - 1)
            model.set_is_last_backward(micro == count - 1)
            torch.manual_seed(seeds[micro])
            loss_sum, _ = model(x, labels=y, **context)
            (loss_sum * weights[micro]).backward()
            total += loss_sum.detach() * weights[micro]
        return total

    def sum(self, value: float) -> float:
        """Summed over the data ranks: others hold the same value."""
        total = torch.tensor(value, dtype=torch.float64)  # on the host: the group has gloo beside NCCL
        dist.all_reduce(total)
        copies = self.mesh.layout.world // self.data_size
        return float(total) / copies

    def gradient_norm(self) -> Tensor:
        every = [p for model in self.models for p in model.parameters()]
        return global_gradient_norm(every, twice=self.pipeline.tied if self.pipeline else ())
