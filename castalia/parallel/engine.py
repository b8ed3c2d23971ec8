"""What a training step asks of the ranks that hold the model: one process, or a mesh of them, behind the same calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from castalia.config.schema import RunConfig
from castalia.model.init import initialize
from castalia.model.transformer import Transformer
from castalia.parallel.recompute import apply_recompute, has_dropout
from castalia.parallel.shards import Part, local, part


class Engine:
    """The whole model in one process. No process group, no DTensor, no `fully_shard`."""

    data_rank, data_size = 0, 1

    def __init__(self, config: RunConfig, dtype: torch.dtype, device: torch.device) -> None:
        assert config.model is not None
        with torch.device(device):
            model = Transformer(config.model, compute_dtype=dtype, exact=config.neox_exact, z_loss=config.train.z_loss)
        apply_recompute(model, config.train.recompute, dropout=has_dropout(config.model))
        self.config, self.device, self.models = config, device, [model]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """This rank's parameters by name."""
        return dict(self.models[0].named_parameters())

    def initialize(self) -> None:
        """Random weights, the same for every layout."""
        assert self.config.model is not None
        initialize(self.models[0], self.config.model, self.config.seed)

    def forward_backward(
        self, tokens: Tensor, labels: Tensor, weights: Sequence[float], seeds: Sequence[int]
    ) -> Tensor:
        """Leaves the gradients of sum over micro-batches of weight * (sum of token losses); returns that sum.

        tokens, labels: this data rank's rows [micro-batches * sequences, time] on the host. `seeds` are for dropout.
        """
        total = torch.zeros((), device=self.device)
        count = len(weights)
        for micro, (x, y) in enumerate(zip(tokens.chunk(count), labels.chunk(count), strict=True)):
            torch.manual_seed(seeds[micro])
            x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
            loss_sum, _ = self.models[0](x, labels=y)
            (loss_sum * weights[micro]).backward()
            total += loss_sum.detach() * weights[micro]
        return total

    def sum(self, value: float) -> float:
        """Summed over the data ranks."""
        return value

    def gradients(self) -> list[Tensor]:
        """What of the gradients lies on this rank."""
        return [local(p.grad) for p in self.parameters.values() if p.grad is not None]

    def gradient_norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm(self.gradients())

    def parts(self) -> dict[str, Part]:
        """Where this rank's parameters lie in the whole ones."""
        return {name: part(parameter) for name, parameter in self.parameters.items()}
