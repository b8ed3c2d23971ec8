"""A model of which one block at a time is in memory.

for each pass:    embed all micro-batches, from the embedding's rows of their tokens
                  for each block: take it from the reader, all micro-batches go through it
                  final norm; logits or loss with the head, of which some rows are cast at a time

Of a model that is split over processes this is one process's share; `streamed_ranks.py` says how it is cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from castalia.checkpoint.restore import require_finite
from castalia.config.schema import ModelConfig
from castalia.data.loader import Batch
from castalia.model.layers import Linear, linear
from castalia.model.loss import IGNORE, capped, sliced_cross_entropy, sliced_token_losses
from castalia.model.transformer import Block, Transformer, build_block
from castalia.parallel.executor import Executor, Rows
from castalia.plan.stream_plan import HEAD_ROWS, StreamPlan, head_slice_bytes
from castalia.storage.lazy import TensorRef
from castalia.streaming.read_ahead import ReadAhead, bytes_of_memory, read_in_pieces
from castalia.streaming.stream_units import ModelUnits, Unit, read_dtype

# With so few, a product takes as long as its weight takes to come from memory. With 16, slices had other last bits.
FEW_TOKENS = 1
TRIALS = 4  # products with a whole weight, and with its slices, whose bits are compared
TILE_BYTES = 1 << 20  # of a weight that is cast at a time then: they are still in the core's cache when they are used
TILE_ROWS = 16  # of which tiles have a multiple
NEAR_ROWS = 8  # rows of the embedding that are this near to each other are read together


class Packing(NamedTuple):
    """What makes a block, and the head's matrix, into the form in which CPUs write fastest."""

    block: Callable[[Block], nn.Module]
    head: Callable[[Tensor], nn.Module]


class StreamedTransformer(Transformer):
    """The model of `units`, for inference. Its blocks have parameters only while they are in memory."""

    reduce: Callable[[Tensor, str], None] | None = None  # of a tensor rank: see `castalia.model.loss.token_losses`

    def __init__(
        self,
        cfg: ModelConfig,
        units: ModelUnits,
        plan: StreamPlan,
        where: str,
        *,
        exact: bool = False,
        past_cache: bool = True,
        packing: Packing | None = None,
        finite: bool = True,
        device: torch.device | None = None,
        cut: Cut | None = None,
        advance: Callable[[int], None] = lambda blocks: None,
    ) -> None:
        """`where` names the checkpoint in errors; `finite`: values that are not are one.

        `device`: the one that blocks are copied to; None: the processor computes with them where they were read.
        `cut` leaves this process's share of the model, where it is split. `advance` is called after each block of a
        pass.
        """
        with torch.device("meta"):
            # There is no memory for all weights at once; they come in block by block.
            super().__init__(cfg, compute_dtype=torch.float32 if packing else units.dtype, exact=exact)
        self.packing, self.copied_to, self.cut = packing, device, cut or Cut()
        self.cache_dtype = torch.float32 if packing else None
        self.plan, self.advance = plan, advance
        cast_bytes = max(plan.sizes.cast, head_slice_bytes(cfg, units.dtype.itemsize))
        self.scratch = self.cut.scratch(cast_bytes, self.device)
        for block in self.blocks.values():
            use_scratch(block, self.scratch)
        self.cut.divide(self)
        del self.loss, self.token_losses  # the methods below; as attributes, they would keep the model alive
        self.embed = GatheredRows(units.embedding, units.dtype, where if finite else None)  # type: ignore[assignment]
        for name, _ in list(self.named_parameters()):
            self.set_parameter(name, None)
        # To the reader units are numbered from 0 on, and the head is one more after the last block.
        self.numbers = [int(name) for name in self.blocks]
        stays = [*plan.resident, *([len(self.numbers)] if plan.head_stays and units.head.tensors else [])]
        make = self.packed if packing else None
        parts = [*units.blocks, *([units.head] if units.head.tensors else [])]
        self.reader = ReadAhead(parts, stays, where, past_cache=past_cache, make=make, finite=finite, device=device)
        self.first_row = units.share.tp_rank * next((len(ref) for ref in units.head.tensors.values()), 0)
        self.bound: list[str] = []  # names of the parameters of the block that is in a buffer
        self.hold(units.rest, where if finite else None)
        if packing and self.norm is not None:
            self.norm.float()
        self.eval()

    def hold(self, rest: Unit, where: str | None) -> None:
        """Read what is always in memory: norms and learned positions. `where`: None for values that may be NaN."""
        memory = rest.views(bytes_of_memory(rest.num_bytes))
        for name, view in memory.items():
            read_in_pieces(rest.tensors[name], view, 0)
            self.set_parameter(name, view.to(self.device))
        if where is not None:
            require_finite(memory, where)

    def set_parameter(self, name: str, value: Tensor | None) -> None:
        """Give a parameter its values, or take them away."""
        module, _, own = name.rpartition(".")
        parameter = None if value is None else nn.Parameter(self.cut.placed(name, value), requires_grad=False)
        setattr(self.get_submodule(module), own, parameter)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.copied_to or torch.device("cpu")

    @property
    def calls_at_once(self) -> int:  # type: ignore[override]
        """As many calls as its plan has room for go through a block while it is there."""
        return self.plan.items

    def close(self) -> None:
        """Stop reading, and give all memory back."""
        self.reader.close()

    def block(self, number: int) -> nn.Module:
        """A block with its parameters, which are valid until the next call. They are numbered from 0 on."""
        if self.packing:
            return self.reader.take(number)
        for name in self.bound:
            self.set_parameter(name, None)
        views = self.reader.take(number)
        for name, view in views.items():
            self.set_parameter(name, view)
        self.bound = list(views)
        return self.blocks[str(self.numbers[number])]

    def packed(self, number: int, views: Mapping[str, Tensor]) -> nn.Module:
        """A block, or the head, in the form in which CPUs write fastest."""
        assert self.packing
        if number == len(self.numbers):
            return self.packing.head(next(iter(views.values())))
        with torch.device("meta"):
            block = build_block(self.cfg, number, self.exact)
        for name, view in views.items():
            # Vectors, and all of blocks of other kinds, may go in as they are, and must outlive the buffer.
            stays = view.dim() == 1 or not isinstance(block, Block)
            value = nn.Parameter(view.clone() if stays else view, requires_grad=False)
            module, _, own = name.removeprefix(f"blocks.{number}.").rpartition(".")
            setattr(block.get_submodule(module), own, value)
        return self.packing.block(block) if isinstance(block, Block) else block

    def hidden(self, tokens: Tensor, **arguments: Any) -> Tensor:
        """See `Transformer.hidden`."""
        return next(iter(self.hidden_each([(tokens, arguments)])))

    def hidden_each(self, calls: Iterable[tuple[Tensor, Mapping[str, Any]]]) -> Iterator[Tensor]:
        """All of the calls go through a block before the next one is needed."""
        entered = [self.enter(tokens, **arguments) for tokens, arguments in calls]
        states, contexts = [x for x, _ in entered], [context for _, context in entered]
        del entered
        for number in range(len(self.numbers)):
            block = self.block(number)
            for index, context in enumerate(contexts):
                with self.kernels(states[index], context.cache):
                    states[index] = block(states[index], context)
            self.advance(1)
            del block  # a packed one would else be in memory beside the next one
        states.reverse()  # they are taken from the end, so that none is kept longer than it is needed
        return (self.leave(states.pop(), context.cache) for context in contexts)

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix [V, h] as it is held, of a tensor rank its rows; valid until the next block is needed."""
        return next(iter(self.reader.take(len(self.numbers)).values()))

    def logits(self, x: Tensor) -> Tensor:
        """See `Transformer.logits`. Of a tensor rank those of its rows of the vocabulary."""
        self.refuse_tokens_of_a_reward_model()
        if self.packing:
            out = self.reader.take(len(self.numbers))(x)
        else:
            out = torch.cat([linear(x, rows) for rows in self.head_slices(self.head_weight, x.dtype)], dim=-1)
        return capped(out if self.head_bias is None else out + self.head_bias.to(x.dtype), self.cfg.logit_softcap)

    @property
    def head_bias(self) -> Tensor | None:
        """The head's bias [V], of a tensor rank its part."""
        return None if self.head is None else self.head.bias

    def scored(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden state and head's matrix; the losses below add the bias themselves."""
        return x, self.head_weight

    def loss(  # type: ignore[override]
        self, x: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0, cap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss of a model that does not train, as `linear_cross_entropy` gives it."""
        if self.reduce is None:
            return sliced_cross_entropy(
                x, lambda: self.head_slices(weight, x.dtype), labels, len(weight), self.head_bias, cap
            )
        return self.token_losses(x, weight, labels, cap).sum(), (labels != IGNORE).sum()

    def token_losses(  # type: ignore[override]
        self, x: Tensor, weight: Tensor, labels: Tensor, cap: float | None = None
    ) -> Tensor:
        """The losses of a model that does not train, as `castalia.model.loss.token_losses` gives them."""

        def slices() -> Iterator[Tensor]:
            return self.head_slices(weight, x.dtype)

        return sliced_token_losses(x, slices, labels, len(weight), self.first_row, self.reduce, self.head_bias, cap)

    def head_slices(self, weight: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        """Rows of the head in `dtype`, each valid until the next ones are asked for."""
        if weight.dtype == dtype:
            yield weight
            return
        for rows in slices_of(weight, HEAD_ROWS):
            yield self.scratch.cast(rows, dtype)


def streamed_stage(model: nn.Module) -> StreamedTransformer | None:
    """The streamed model itself, or of one that is split over processes this one's share; None for one in memory."""
    stage = getattr(model, "stage", model)
    return stage if isinstance(stage, StreamedTransformer) else None


class StreamedExecutor(Executor):
    """Evaluates a model of which one block at a time is in memory: as many batches in a pass as its plan says."""

    model: StreamedTransformer

    def losses(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        """See `Executor.losses`. Each batch is one micro-batch."""
        remaining = iter(batches)
        while group := list(islice(remaining, self.model.calls_at_once)):
            for batch, rows, x in self._through_blocks(group):
                yield batch, self.model.total_loss(x, rows.labels)[0]

    def values(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        """See `Executor.values`. Each batch is one micro-batch."""
        remaining = iter(batches)
        while group := list(islice(remaining, self.model.calls_at_once)):
            for _, rows, x in self._through_blocks(group):
                yield self.model.finish(x, rows.labels, per_sequence=True, answers=rows.answers)  # type: ignore[misc]

    def _through_blocks(self, group: list[Batch]) -> Iterator[tuple[Batch, Rows, Tensor]]:
        """Each batch, its tensors and its final hidden state, from one pass."""
        rows = [part for batch in group for part in self._parts(Rows.of(batch))]
        calls = [(each.tokens, {"documents": each.documents}) for each in rows]
        return zip(group, rows, self.model.hidden_each(calls), strict=True)


class GatheredRows(nn.Module):
    """An embedding of which only the rows of the tokens at hand are read."""

    def __init__(self, source: TensorRef, dtype: torch.dtype, where: str | None) -> None:
        """`dtype`: of the computation. `where` names the checkpoint in errors; None: values may be NaN."""
        super().__init__()
        self.source, self.dtype, self.where = source, read_dtype(source, dtype), where

    def forward(self, tokens: Tensor) -> Tensor:
        """[...] -> [..., h], in the dtype in which they are held."""
        wanted, places = tokens.cpu().unique(return_inverse=True)  # [ids], and of each token which of them
        places = places.to(tokens.device)
        # One read for a run of near ids: the rows between them cost less than another read.
        ends = (wanted.diff() > NEAR_ROWS).nonzero().flatten() + 1
        runs = wanted.tensor_split(ends)
        read = [self.source.read([slice(int(run[0]), int(run[-1]) + 1)])[run - run[0]] for run in runs]
        rows = torch.cat(read).to(self.dtype)
        if self.where is not None:
            require_finite({"embed.weight": rows}, self.where)
        return rows.to(tokens.device)[places]  # [ids, h] -> [..., h]


class Scratch:
    """Memory for one tensor in another dtype, used over and over: fresh memory would cost as much as the cast."""

    in_tiles = True  # whether a weight may be cast some rows at a time

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        memory = bytes_of_memory(num_bytes if device.type == "cpu" else 0)
        self.memory = memory if device.type == "cpu" else memory.new_empty(num_bytes, device=device)
        self.equal: Counter[tuple[int, int, int]] = Counter()  # by a weight's shape and threads; see `ScratchLinear`

    def cast(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor in this dtype; valid until the next call."""
        if value.dtype == dtype:
            return value
        return self.memory[: value.numel() * dtype.itemsize].view(dtype).view(value.shape).copy_(value)


class ScratchLinear(Linear):
    """A linear map whose weight is cast into memory that it shares with all others."""

    def __init__(self, like: Linear, scratch: Scratch) -> None:
        super().__init__(like.in_features, like.out_features, like.bias is not None)
        self.scratch = scratch

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        many = x.numel() > FEW_TOKENS * self.in_features
        if self.weight.dtype == x.dtype or x.device.type != "cpu" or many or not self.scratch.in_tiles:
            return linear(x, self.scratch.cast(self.weight, x.dtype), self.bias)
        # Libraries choose kernels by shape and threads, and some have other last bits for some rows than for all.
        # So slices serve a shape alone only after they gave the bits of the whole weight a few times.
        case = (self.out_features, self.in_features, torch.get_num_threads())
        if (equal := self.scratch.equal[case]) >= TRIALS:
            return self._in_slices(x)
        whole = linear(x, self.scratch.cast(self.weight, x.dtype), self.bias)
        if equal >= 0:
            self.scratch.equal[case] = equal + 1 if torch.equal(whole, self._in_slices(x)) else -1
        return whole

    def _in_slices(self, x: Tensor) -> Tensor:
        out, end = x.new_empty(*x.shape[:-1], self.out_features), 0
        for rows in slices_of(self.weight, tile_rows(self.in_features * x.itemsize)):
            part = slice(end, end + len(rows))
            bias = None if self.bias is None else self.bias[part]
            out[..., part] = linear(x, self.scratch.cast(rows, x.dtype), bias)
            end = part.stop
        return out


def tile_rows(row_bytes: int) -> int:
    """Rows of a weight that are cast at a time where all of it is used for few tokens."""
    return max(TILE_ROWS, TILE_BYTES // row_bytes // TILE_ROWS * TILE_ROWS)


def slices_of(weight: Tensor, rows: int) -> Iterator[Tensor]:
    """The rows, so many at a time. The last ones take the remainder along, and are up to twice as many.

    With a few rows only, libraries may choose other kernels, whose last bits differ.
    """
    starts = range(0, max(1, len(weight) - rows + 1), rows)
    return (weight[start:stop] for start, stop in pairwise((*starts, len(weight))))


class Cut:
    """How this process's share is cut from a model; this one leaves it whole."""

    scratch: type[Scratch] = Scratch

    def divide(self, model: Transformer) -> None:
        """Leave this process's share of a model on the meta device."""

    def placed(self, name: str, value: Tensor) -> Tensor:
        """A parameter's values as the share's modules take them."""
        return value


def use_scratch(module: nn.Module, scratch: Scratch) -> None:
    """Let the linear maps of a block on the meta device cast their weights into the scratch memory."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is Linear:
                with torch.device("meta"):
                    setattr(parent, name, ScratchLinear(child, scratch))
