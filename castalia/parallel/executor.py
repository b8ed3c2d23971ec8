"""How training and evaluation run a model: in one process here, on a mesh of ranks in `mesh_executor.py`.

This module imports neither DTensor nor FSDP, which take a second to import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from castalia.config.batch import BatchPlan
from castalia.config.float8_matrices import float8_matrices
from castalia.config.schema import CompleteConfig, ModelConfig
from castalia.data.loader import Batch
from castalia.errors import ConfigError
from castalia.model.float8 import set_float8
from castalia.model.init import initialize
from castalia.model.kept_gradient import add_in_place
from castalia.model.kept_tokens import Kept, kept_tokens
from castalia.model.layers import hold_in
from castalia.model.lora import add_adapters, freeze
from castalia.model.loss import IGNORE
from castalia.model.transformer import Transformer
from castalia.parallel.activation_checkpointing import apply_activation_checkpointing, has_dropout
from castalia.parallel.compile import compile_blocks

T = TypeVar("T")
NormSubset = Mapping[str, tuple[int, int] | None]  # name -> the first `size` entries in dimension `dim`, or all
Objective = Callable[[Tensor, int], Tensor]  # one value per sequence, micro-batch index -> sum of the losses


class StepLeft(Exception):
    """A step was left between two of its micro-batches. Its gradients are incomplete; weights and moments are as they
    were before it."""


class Rows(NamedTuple):
    """Sequences of a batch, each tensor [sequences, time]: on the host until `to` copies them."""

    tokens: Tensor
    labels: Tensor
    documents: Tensor | None = None
    answers: Tensor | None = None  # a mask of labels, see `Transformer.forward`

    @staticmethod
    def of(batch: Batch) -> Rows:
        """A batch's arrays as tensors, which share their memory."""
        tokens, labels = torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels)
        documents = None if batch.documents is None else torch.from_numpy(batch.documents)
        if batch.whole is None:
            return Rows(tokens, labels, documents)
        return Rows(tokens, torch.from_numpy(batch.whole), documents, torch.from_numpy(batch.loss_mask))

    def chunk(self, count: int) -> Iterator[Rows]:
        """`count` equal pieces: micro-batches."""
        return map(Rows, *((None,) * count if tensor is None else tensor.chunk(count) for tensor in self))

    def split(self, size: int) -> Iterator[Rows]:
        """Pieces of `size` sequences; the last one may have fewer."""
        return (self.rows(start, start + size) for start in range(0, len(self.tokens), size))

    def map(self, change: Callable[[Tensor], Tensor]) -> Rows:
        """The same function applied to each tensor."""
        return Rows._make(None if tensor is None else change(tensor) for tensor in self)

    @property
    def width(self) -> int:
        """The number of tokens up to the last label, at least 1. What follows has no effect on a loss."""
        labelled = (self.labels != IGNORE).any(dim=0).nonzero()
        return int(labelled[-1]) + 1 if len(labelled) else 1

    def until(self, width: int) -> Rows:
        """The first `width` tokens of each sequence."""
        return self.map(lambda tensor: tensor[:, :width])

    def rows(self, start: int, stop: int) -> Rows:
        """Sequences `start` to `stop`."""
        return self.map(lambda tensor: tensor[start:stop])

    def to(self, device: torch.device) -> Rows:
        """A copy on the device, see `to_device`."""
        return self.map(lambda tensor: to_device(tensor, device))

    def model_arguments(self) -> dict[str, Any]:
        """What `Transformer.forward` takes besides the tokens."""
        further = {"documents": self.documents, "answers": self.answers}
        return {"labels": self.labels} | {name: tensor for name, tensor in further.items() if tensor is not None}


class Computed(NamedTuple):
    """What of a micro-batch is computed: the first `width` tokens of its sequences, and of these the `kept` ones."""

    width: int
    kept: Kept | None = None

    def applied(self, part: Rows) -> tuple[Rows, dict[str, Any]]:
        """The micro-batch, and what the model takes besides."""
        if self.kept is None:
            return part.until(self.width), {}
        return part.until(self.width), {"kept": self.kept.map(lambda tensor: to_device(tensor, part.tokens.device))}


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a host tensor from page-locked memory, so that the copy does not wait for a GPU to finish its work."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class RankPart(NamedTuple):
    """The part of a tensor that one rank holds."""

    local: Tensor
    shape: tuple[int, ...]  # of the whole tensor
    start: tuple[int, ...]  # index of the part's first element in the whole tensor
    writes: bool  # whether this rank, of all that hold the part, saves it

    @property
    def slices(self) -> tuple[slice, ...]:
        """The part as slices of the whole tensor."""
        return tuple(slice(s, s + n) for s, n in zip(self.start, self.local.shape, strict=True))


def leading_part(part: RankPart, limit: tuple[int, int] | None) -> Tensor:
    """What of a part lies within the first `size` entries of the whole tensor in dimension `dim`.

    `limit` is (dim, size); None: the part in full.
    """
    if limit is None:
        return part.local
    dim, size = limit
    return part.local.narrow(dim, 0, max(0, min(size - part.start[dim], part.local.shape[dim])))


def mesh_of(tensor: Tensor) -> object:
    """The mesh of ranks that a tensor is sharded over; None: it is a plain tensor. Told without importing DTensor."""
    return getattr(tensor, "device_mesh", None)


class Executor:
    """Runs the whole model in one process, without a process group. `MeshExecutor` has the same methods on many ranks.

    Each method is called on all ranks together, even where it only matters on some.
    """

    rank, world = 0, 1
    data_rank, data_size = 0, 1
    duplicates: Mapping[str, nn.Parameter] = {}  # second copies on this rank, kept equal to the first
    # Asked between two micro-batches, on all ranks together, whether the step is to be left.
    leaves_step: Callable[[], bool] = staticmethod(lambda: False)

    def __init__(self, model: Transformer, micro_batch_size: int = 8, cuts_padding: bool = True) -> None:
        self.model, self.device = model, model.device
        self.micro_batch_size = micro_batch_size
        # Padding after the last label of a micro-batch is not computed. Compiled blocks need one shape for all.
        self.cuts_padding = cuts_padding

    @property
    def models(self) -> Sequence[Transformer]:
        """The part of the model that this rank holds: all of it, or its pipeline stages."""
        return [self.model]

    @property
    def can_leave_step(self) -> bool:
        """Whether a step has places at which it can be left; a pipeline's schedule has none."""
        return True

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """This rank's parameters by name, each name once."""
        return dict(self.model.named_parameters())

    def part(self, tensor: Tensor) -> RankPart:
        """This rank's part of a parameter, or of a tensor of its optimizer state, and where it begins."""
        return RankPart(tensor.detach(), tuple(tensor.shape), (0,) * tensor.dim(), True)

    def local(self, tensor: Tensor) -> Tensor:
        """What of a parameter, gradient or activation lies on this rank; it shares memory with the tensor."""
        return tensor

    def saves(self, name: str) -> bool:
        """Whether this rank saves its parameter of that name; False where another rank does."""
        return True

    def initialize(self, config: CompleteConfig) -> None:
        """Sets random weights, which depend on the seed but not on the layout."""
        initialize(self.model, config.model, config.seed)

    def forward_backward(
        self,
        rows: Rows,
        weights: Sequence[float],
        scale: float,
        seeds: Sequence[int],
        objective: Objective | None = None,
    ) -> Tensor:
        """Accumulates the gradients of scale * sum over micro-batches of weight * (sum of token losses).

        `rows` are this data rank's, with one weight and one dropout seed for each micro-batch. Returns the loss over
        all ranks, without the scale, on the device. An `objective` replaces the token losses: it gets the values that
        `Transformer.forward` has for each sequence. Raises StepLeft where `leaves_step` says so.
        """
        total = torch.zeros((), device=self.device)
        computed = self.computed(list(rows.chunk(len(weights))))
        for micro, part in enumerate(rows.to(self.device).chunk(len(weights))):
            if micro and self.leaves_step():
                raise StepLeft
            torch.manual_seed(seeds[micro])  # dropout follows from the step, so no generator's state has to be saved
            loss_sum = micro_loss(self.model, *computed[micro].applied(part), objective, micro)
            # Weights divide by the tokens of the global batch, so gradients of micro-batches just add up.
            (loss_sum * (weights[micro] * scale)).backward()
            total += loss_sum.detach() * weights[micro]
        return total

    def computed(self, parts: Sequence[Rows]) -> list[Computed]:
        """What of each micro-batch is computed in training. They are on the host, which a GPU need not be asked for."""
        if any(routes_together(model.cfg) for model in self.models):
            return [Computed(part.tokens.shape[1]) for part in parts]
        # Other kinds of layers mix tokens in ways of their own.
        keeps = self.cuts_padding and all(set(model.cfg.layer_kinds) == {"dense"} for model in self.models)
        cut = [part.until(width) for part, width in zip(parts, self.widths(parts), strict=True)]
        return [Computed(part.tokens.shape[1], kept_tokens(part.labels) if keeps else None) for part in cut]

    def widths(self, parts: Iterable[Rows]) -> list[int]:
        """How many tokens of each part are computed. The parts are on the host, which a GPU need not be asked for."""
        return [part.width if self.cuts_padding else part.tokens.shape[1] for part in parts]

    def loss_sum(self, rows: Rows) -> Tensor:
        """The sum of token losses over any number of sequences, all of which every rank is given. In `evaluating`."""
        total = torch.zeros((), device=self.device)
        for part in self._parts(rows):
            total += self.model(part.tokens, **part.model_arguments())[0]
        return total

    def losses(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        """Each batch and its `loss_sum`."""
        return ((batch, self.loss_sum(Rows.of(batch))) for batch in batches)

    def each_sequence(self, rows: Rows) -> Tensor:
        """What `Transformer.forward` gives for each of this data rank's sequences, fp32 [n, ...]. In `evaluating`."""
        parts = self._parts(rows)
        return torch.cat([self.models[0](part.tokens, **part.model_arguments(), per_sequence=True) for part in parts])

    def _parts(self, rows: Rows) -> Iterator[Rows]:
        """The sequences on the device, as many at a time as in training, without padding after the last label."""
        for part in rows.split(self.micro_batch_size):
            (width,) = self.widths([part])
            yield part.until(width).to(self.device)

    def values(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        """`each_sequence` of each batch."""
        return (self.each_sequence(Rows.of(batch)) for batch in batches)

    def gradients(self) -> list[Tensor]:
        """This rank's parts of the gradients."""
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def gradient_norm(self, counted: NormSubset | None = None) -> Tensor:
        """L2 norm of the gradients of all ranks, on the device; not finite if any element is not.

        `counted` restricts it to some tensors, and of each to all entries (None) or the first ones in one dimension.
        """
        if counted is None:
            return torch.nn.utils.get_total_norm(self.gradients())
        named = {name: p.grad for name, p in self.parameters.items() if name in counted and p.grad is not None}
        return torch.nn.utils.get_total_norm(
            [leading_part(self.part(grad), counted[name]) for name, grad in named.items()]
        )

    def numbers(self, *values: Tensor) -> list[float]:
        """The values of scalars on the device. Waits until it has computed them."""
        return torch.stack(values).tolist()

    def sum_over_data(self, value: float) -> float:
        """The sum of one value per data rank."""
        return value

    def sum_over_tokens(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks that hold the same blocks and other tokens."""
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return flag

    def gather(self, answer: T) -> list[T]:
        """The answers of all ranks, in rank order."""
        return [answer]

    def barrier(self) -> None:
        """Waits for the other ranks."""

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """A context manager: evaluation mode without gradients; afterwards the mode is as it was before."""
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
    """The sum of a micro-batch's losses: over its tokens, or as the objective has it."""
    if objective is None:
        return model(part.tokens, **part.model_arguments(), **context)[0]
    return objective(model(part.tokens, **part.model_arguments(), **context, per_sequence=True), micro)


def routes_together(cfg: ModelConfig) -> bool:
    """Whether in training a token's experts depend on the other tokens of its batch, padding included, which then
    must be the same in every layout."""
    return cfg.experts is not None and cfg.experts.router != "topk"


def cuts_padding(config: CompleteConfig) -> bool:
    """Whether the padding after a micro-batch's last label may be left out: compiled blocks need one shape for all,
    and statistics of layers are those of all layouts, some of which cannot leave it out."""
    return config.train.compile is not True and not config.log.layers_every


def one_process(
    config: CompleteConfig, dtype: torch.dtype, device: torch.device, plan: BatchPlan, frozen: bool = False
) -> Executor:
    """An executor of a config's model on one process, its parameters still unset.

    A `frozen` model, which does not train, holds its parameters in the compute dtype, to which those of other models
    are rounded wherever they are used, see `hold_in`. Raises ConfigError for `parallel.offload`.
    """
    if config.parallel.offload:
        raise ConfigError("parallel.offload comes with sharding over several processes; remove it, or start more")
    with torch.device(device):
        model = Transformer(config.model, compute_dtype=dtype, exact=config.neox_exact, z_loss=config.train.z_loss)
        add_adapters(model, config.finetune.lora)
    if frozen:
        hold_in(model, dtype)
    elif config.precision.compute == "fp8":
        set_float8(model, float8_matrices(config.model, tp=1)[0])
    freeze(model, config.finetune)
    apply_activation_checkpointing(model, config.train.recompute, dropout=has_dropout(config))
    compile_blocks(model, config, device)
    for part in (model.embed, model.head):
        if part is not None:
            add_in_place(part.weight)
    return Executor(model, plan.micro_batch_size, cuts_padding=cuts_padding(config))
