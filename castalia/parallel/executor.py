"""What training and evaluation ask of the ranks that hold a model: one process here, a mesh in `mesh_executor.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from castalia.config.batch import BatchPlan
from castalia.config.schema import CompleteConfig
from castalia.data.loader import Batch
from castalia.errors import ConfigError
from castalia.model.init import initialize
from castalia.model.lora import add_adapters, freeze
from castalia.model.transformer import Transformer
from castalia.parallel.activation_checkpointing import apply_recompute, has_dropout
from castalia.parallel.compile import compile_blocks

T = TypeVar("T")
Counted = Mapping[str, tuple[int, int] | None]  # name -> the first `size` entries in dimension `dim`, or all
Objective = Callable[[Tensor, int], Tensor]  # a micro-batch's number for each sequence, and its index -> sum of losses


class Rows(NamedTuple):
    """Sequences on the host, each tensor [sequences, time]."""

    tokens: Tensor
    labels: Tensor
    documents: Tensor | None = None

    @staticmethod
    def of(batch: Batch) -> Rows:
        """A batch's arrays as tensors that share their memory."""
        documents = None if batch.documents is None else torch.from_numpy(batch.documents)
        return Rows(torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels), documents)

    def chunk(self, count: int) -> Iterator[Rows]:
        documents = self.documents.chunk(count) if self.documents is not None else (None,) * count
        return map(Rows, self.tokens.chunk(count), self.labels.chunk(count), documents)

    def split(self, size: int) -> Iterator[Rows]:
        """Pieces of so many sequences; the last may have fewer."""
        return (self.rows(start, start + size) for start in range(0, len(self.tokens), size))

    def map(self, change: Callable[[Tensor], Tensor]) -> Rows:
        documents = None if self.documents is None else change(self.documents)
        return Rows(change(self.tokens), change(self.labels), documents)

    def rows(self, start: int, stop: int) -> Rows:
        return self.map(lambda tensor: tensor[start:stop])

    def to(self, device: torch.device) -> Rows:
        return self.map(lambda tensor: to_device(tensor, device))

    def model_arguments(self) -> dict[str, Any]:
        return {"labels": self.labels} | ({} if self.documents is None else {"documents": self.documents})


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor's copy that no GPU has to finish its work for: it leaves from page-locked memory."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


class RankPart(NamedTuple):
    """A rank's part of a whole tensor."""

    local: Tensor
    shape: tuple[int, ...]  # of the whole
    start: tuple[int, ...]
    writes: bool  # whether this is the one rank, of all that hold the part, that saves it

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(s, s + n) for s, n in zip(self.start, self.local.shape, strict=True))


def first(part: RankPart, limit: tuple[int, int] | None) -> Tensor:
    """Of a part what lies within the first `size` entries of the whole tensor in dimension `dim`; None: all of it."""
    if limit is None:
        return part.local
    dim, size = limit
    return part.local.narrow(dim, 0, max(0, min(size - part.start[dim], part.local.shape[dim])))


class Executor:
    """The whole model in one process. No process group, no DTensor, no `fully_shard`."""

    rank, world = 0, 1
    data_rank, data_size = 0, 1
    duplicates: Mapping[str, nn.Parameter] = {}  # further copies of parameters that this rank has to keep equal

    def __init__(self, model: Transformer, micro_batch_size: int = 8) -> None:
        self.model, self.device = model, next(model.parameters()).device
        self.micro_batch_size = micro_batch_size

    @property
    def models(self) -> Sequence[Transformer]:
        """What of the model this rank holds: the whole, or its pipeline stages."""
        return [self.model]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """This rank's parameters, each name once."""
        return dict(self.model.named_parameters())

    def part(self, tensor: Tensor) -> RankPart:
        """Where a parameter, or a tensor of its optimizer state, lies in the whole one."""
        return RankPart(tensor.detach(), tuple(tensor.shape), (0,) * tensor.dim(), True)

    def local(self, tensor: Tensor) -> Tensor:
        """What of a parameter, gradient or activation lies on this rank; it shares memory with the tensor."""
        return tensor

    def saves(self, name: str) -> bool:
        """False where another rank saves this rank's parameter of that name."""
        return True

    def initialize(self, config: CompleteConfig) -> None:
        """Random weights; those of a seed are the same for every layout."""
        initialize(self.model, config.model, config.seed)

    def forward_backward(
        self,
        rows: Rows,
        weights: Sequence[float],
        scale: float,
        seeds: Sequence[int],
        objective: Objective | None = None,
    ) -> Tensor:
        """Leaves the gradients of scale * sum over micro-batches of weight * (sum of token losses).

        `rows` are this data rank's; `seeds` are for dropout. Returns the loss of all ranks, without the scale. An
        `objective` makes other losses of what `Transformer.forward` gives for each sequence.
        """
        total = torch.zeros((), device=self.device)
        for micro, part in enumerate(rows.to(self.device).chunk(len(weights))):
            torch.manual_seed(seeds[micro])
            loss_sum = micro_loss(self.model, part, {}, objective, micro)
            (loss_sum * (weights[micro] * scale)).backward()
            total += loss_sum.detach() * weights[micro]
        return total

    def loss_sum(self, rows: Rows) -> Tensor:
        """Sum of the token losses of any number of sequences, given whole to every rank. Without gradients."""
        total = torch.zeros((), device=self.device)
        for part in rows.split(self.micro_batch_size):
            part = part.to(self.device)
            total += self.model(part.tokens, **part.model_arguments())[0]
        return total

    def each_sequence(self, rows: Rows) -> Tensor:
        """What `Transformer.forward` gives for each of this data rank's sequences, fp32 [n]. In `evaluating`."""
        parts = (part.to(self.device) for part in rows.split(self.micro_batch_size))
        return torch.cat([self.models[0](part.tokens, **part.model_arguments(), each=True) for part in parts])

    def gradients(self) -> list[Tensor]:
        """What of the gradients lies on this rank."""
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def gradient_norm(self, counted: Counted | None = None) -> Tensor:
        """L2 norm of the gradients of all ranks, on the engine's device; not finite if any element is not.

        `counted`: the tensors that alone count, and of each either all (None) or the first entries in one dimension.
        """
        if counted is None:
            return torch.nn.utils.get_total_norm(self.gradients())
        named = {name: p.grad for name, p in self.parameters.items() if name in counted and p.grad is not None}
        return torch.nn.utils.get_total_norm([first(self.part(grad), counted[name]) for name, grad in named.items()])

    def numbers(self, *values: Tensor) -> list[float]:
        """Scalars of the device, as soon as it has them."""
        return torch.stack(values).tolist()

    def sum_over_data(self, value: float) -> float:
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank."""
        return flag

    def gather(self, answer: T) -> list[T]:
        """What each rank says."""
        return [answer]

    def barrier(self) -> None:
        """Wait for the other ranks."""

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode, without gradients; the mode is as it was afterwards."""
        before = [model.training for model in self.models]
        for model in self.models:
            model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for model, training in zip(self.models, before, strict=True):
                model.train(training)


def micro_loss(model: Any, part: Rows, context: Mapping[str, Any], objective: Objective | None, micro: int) -> Tensor:
    """The sum of a micro-batch's losses."""
    if objective is None:
        return model(part.tokens, **part.model_arguments(), **context)[0]
    return objective(model(part.tokens, **part.model_arguments(), **context, each=True), micro)


def one_process(
    config: CompleteConfig, dtype: torch.dtype, device: torch.device, plan: BatchPlan, frozen: bool = False
) -> Executor:
    """The model of a config, its parameters still unset.

    Those of a `frozen` one are in the compute dtype, to which the others are rounded wherever they are used.
    """
    if config.parallel.offload:
        raise ConfigError("parallel.offload comes with sharding over several processes; remove it, or start more")
    with torch.device(device):
        model = Transformer(config.model, compute_dtype=dtype, exact=config.neox_exact, z_loss=config.train.z_loss)
        add_adapters(model, config.finetune.lora)
    if frozen:
        model.to(dtype)
    freeze(model, config.finetune)
    apply_recompute(model, config.train.recompute, dropout=has_dropout(config.model))
    compile_blocks(model, config, device)
    return Executor(model, plan.micro_batch_size)
