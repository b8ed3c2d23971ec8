"""What of a model stays in memory and what is read from disk in each pass, by arithmetic.

    budget = program + norms + two buffers + working memory + what is kept for each item + resident blocks

A pass takes all its micro-batches, or all its texts, through each block while the block is in memory. So more of them
in a pass make each cheaper, as long as reading takes longer than computing; only when all have a place do blocks
become resident. Least recently used would be the worst choice of what to keep: blocks are needed in turn.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from castalia.config.attention_kernels import reasons_for_bias
from castalia.config.loss_chunks import BLOCK_BYTES, CHUNK_BYTES
from castalia.config.scan_chunks import CHUNK_VALUES, SCAN_TOKENS
from castalia.config.schema import ModelConfig
from castalia.config.tensor_table import AFTER_BLOCKS, BEFORE_BLOCKS, BLOCK, shapes_of
from castalia.errors import ConfigError
from castalia.plan.count import block_size, held_bytes
from castalia.plan.flops import forward_flops, kv_cache_bytes, state_bytes

SHARE = 0.8  # of the free memory, for a model that is streamed because it does not fit
PROGRAM_BYTES = 300_000_000  # Python, torch and what they allocate besides
HEAD_ROWS = 2048  # of the head, cast at a time
PREFILL_CHUNK_TOKENS = 2048  # tokens of several prompts that go through the model at a time
READERS = 4  # threads
PIECE_BYTES = 8 << 20  # that a thread reads at once, and of a tensor that it converts at a time
TOKEN_MATRICES = ("embed.weight", "head.weight")  # of the vocabulary, which are read by rows or as a unit
BUFFERS = 2  # one block is computed with while the next one arrives
LOSS_BLOCKS = 5  # fp32 copies of a block of logits that the loss holds at a time
SCORED_LOGITS = 1 << 24  # of continuations, that are in memory at a time
LOGITS_BYTES = 24  # per token of the vocabulary, of a row's logits and of what sampling makes of them


@dataclass(frozen=True)
class StreamedSizes:
    """Bytes of a checkpoint's parts, or of a process's share of it.

    In memory they are as they are stored, or in the compute dtype where that is narrower.
    """

    blocks: tuple[int, ...]
    head: int  # 0 for a model that predicts no tokens
    rest: int  # norms and learned positions, which are always in memory
    cast: int  # the largest matrix in the compute dtype; 0 if all are held in it
    reading: int  # what reading needs besides: threads' windows, and tensors that are permuted on the way
    read: tuple[int, ...] = ()  # of the files that each block is read from; empty: as many as it has in memory
    packed: int = 0  # a block in the form in which CPUs write fastest, for models that are packed; else 0
    packing: int = 0  # what packing needs: the packed block or head at hand, and copies on the way to it

    @property
    def buffer(self) -> int:
        """One of the two buffers, through which blocks go, and a head that is not larger."""
        return max(self.blocks)

    @property
    def always(self) -> int:
        """What is in memory whatever the budget: the buffers, and what is not a block or larger than one."""
        return self.rest + BUFFERS * self.buffer + self.cast + self.reading + self.packing + self.large_head

    @property
    def large_head(self) -> int:
        """The head, if it is too large for a buffer, so that it stays in memory; else 0."""
        return self.head if self.head > self.buffer else 0


def sizes_of_model(model: ModelConfig, stored_bytes: int, element_bytes: int) -> StreamedSizes:
    """The sizes of a model that is only a config: values are stored in so many bytes, computed in `element_bytes`."""
    outside = {name: prod(shape) for name, shape in shapes_of((*BEFORE_BLOCKS, *AFTER_BLOCKS), model).items()}
    rest = sum(size for name, size in outside.items() if name not in TOKEN_MATRICES)
    largest = max(prod(shape) for kind in set(model.layer_kinds) for shape in shapes_of(BLOCK, model, kind).values())
    return StreamedSizes(
        blocks=tuple(block_size(model, kind) * stored_bytes for kind in model.layer_kinds),
        head=0 if model.reward_head else outside["embed.weight"] * stored_bytes,
        rest=rest * stored_bytes,
        cast=largest * element_bytes if stored_bytes < element_bytes else 0,
        reading=READERS * 3 * PIECE_BYTES,
    )


@dataclass(frozen=True)
class StreamedWork:
    """What passes compute: `wanted` items, micro-batches of an evaluation or texts that are written at a time."""

    wanted: int
    bytes_each: int  # that are kept in memory for each item of a pass
    working: int  # temporary, whatever the number of items
    tokens_each: float  # that one pass computes for each item
    flops_per_token: float
    cache_each: int = 0  # bytes of an item's keys and values, which may be on disk
    rows: int = 1  # sequences of an item


@dataclass(frozen=True)
class StreamPlan:
    """Which blocks stay, and how many items a pass takes."""

    sizes: StreamedSizes
    work: StreamedWork
    budget: int
    items: int  # in a pass
    resident: tuple[int, ...]  # numbers of blocks
    head_stays: bool
    cache_on_disk: bool = False

    @property
    def bytes_per_pass(self) -> int:
        """What is read from disk in each pass after the first, which reads everything."""
        sizes = self.sizes.read or self.sizes.blocks
        streamed = sum(size for number, size in enumerate(sizes) if number not in self.resident)
        cache = self.items * self.work.cache_each if self.cache_on_disk else 0
        return streamed + (0 if self.head_stays else self.sizes.head) + cache

    @property
    def passes(self) -> int:
        """Passes until all items have been computed once."""
        return -(-self.work.wanted // self.items)

    def seconds_per_pass(self, disk_rate: float, flops_rate: float | None) -> float:
        """Reading and computing overlap. `flops_rate`: operations per second of matrix products; None: not known."""
        flops = self.items * self.work.tokens_each * self.work.flops_per_token
        return max(self.bytes_per_pass / disk_rate, flops / flops_rate if flops_rate else 0.0)


def memory_without_streaming(model: ModelConfig, work: StreamedWork, element_bytes: int) -> int:
    """Bytes that the same work needs with all parameters in memory, in the compute dtype."""
    return PROGRAM_BYTES + held_bytes(model, element_bytes) + work.working + work.bytes_each + work.cache_each


def least_budget(sizes: StreamedSizes, work: StreamedWork) -> int:
    """The smallest budget in bytes for which there is a plan."""
    return PROGRAM_BYTES + sizes.always + work.working + work.bytes_each


def plan_stream(sizes: StreamedSizes, work: StreamedWork, budget: int) -> StreamPlan:
    """The plan for a budget in bytes. Keys and values go to disk where not even those of one item have room.

    Raises ConfigError with the smallest budget that works if this one cannot.
    """
    least = least_budget(sizes, work)
    fixed = least - work.bytes_each
    cache_on_disk = budget < least + work.cache_each
    if budget < least:
        rest = least - PROGRAM_BYTES - BUFFERS * sizes.buffer
        raise ConfigError(
            f"{budget / 1e9:.3g} GB of memory are too little: Python and torch take {PROGRAM_BYTES / 1e9:.3g} GB, two "
            f"buffers of a block {BUFFERS * sizes.buffer / 1e9:.3g} GB, and computing takes {rest / 1e9:.3g} GB; the "
            f"least that works here is --memory {-(-least // 10**7) / 100:.2f}GB"
        )
    each = work.bytes_each + (0 if cache_on_disk else work.cache_each)
    items = 1 if cache_on_disk else min(work.wanted, (budget - fixed) // max(1, each))
    left, stay = budget - fixed - items * each, sizes.packed or sizes.buffer
    number = min(left // stay, len(sizes.blocks))
    head_stays = bool(sizes.large_head) or left - number * stay >= sizes.head
    return StreamPlan(sizes, work, budget, items, spread(number, len(sizes.blocks)), head_stays, cache_on_disk)


def spread(number: int, blocks: int) -> tuple[int, ...]:
    """`number` of the blocks at equal distances, so that reading continues while those in between are computed."""
    return tuple(index * blocks // number for index in range(number))


def block_working_bytes(model: ModelConfig, tokens: int, element_bytes: int) -> int:
    """Temporary memory of a block for one micro-batch of so many tokens, at its peak.

    In attention: the normed input, the fused product, rotated queries and keys and their halves, output. In the MLP:
    residual stream, branch and norm beside the inner activations.
    """
    fused = (model.num_heads + 2 * model.kv_heads) * model.head_size
    attention = 2 * fused + 2 * model.num_heads * model.head_size + 2 * model.hidden_size
    mlp = (3 if model.gated_mlp else 2) * model.mlp_width + 3 * model.hidden_size
    if {"gmlp", "amlp"} & set(model.layer_kinds):  # both halves twice, the normed one, the gate and the product
        mlp = max(mlp, (4 + 3) * 4 * model.hidden_size)
    if "mamba" in model.layer_kinds:  # the inner width in fp32 and otherwise, and the scan's chunk
        mlp = max(mlp, 10 * model.mamba_width + 3 * CHUNK_VALUES["cpu"] // max(1, tokens))
    if "rwkv" in model.layer_kinds:  # the five inputs and what they give, and the scan's chunk
        scan = max(CHUNK_VALUES["cpu"] // max(1, tokens), SCAN_TOKENS * model.hidden_size)
        mlp = max(mlp, 20 * model.hidden_size, 3 * model.hidden_size + 3 * model.rwkv_width) + 4 * scan
    if model.experts:  # tokens sorted by expert, inner activations, outputs in both orders
        inner = (3 if model.experts.gated else 2) * model.expert_width + 5 * model.hidden_size
        shared = (3 if model.experts.gated else 2) * (model.experts.shared_width or 0)
        mlp = max(mlp, model.experts.top_k * inner + shared + 3 * model.hidden_size)
    # gMLP casts its matrices itself, and the rows of the spatial one for each token that is written.
    gated = {"gmlp", "amlp"} & set(model.layer_kinds)
    casts = 8 * model.hidden_size**2 + 2 * (model.max_positions or 0) ** 2 if gated else 0
    return element_bytes * (tokens * (model.hidden_size + max(attention, mlp)) + casts)


def head_slice_bytes(model: ModelConfig, element_bytes: int) -> int:
    """The rows of the head that are cast at a time; a short rest goes with the slice before it."""
    return min(2 * HEAD_ROWS, model.padded_vocab_size) * model.hidden_size * element_bytes


@dataclass(frozen=True)
class EvaluationShape:
    """Windows of a text that are evaluated."""

    length: int  # tokens of a window
    rows: int  # windows of a micro-batch
    windows: int  # in all
    documents: bool  # whether tokens see their own document only


def evaluation_work(model: ModelConfig, shape: EvaluationShape, element_bytes: int) -> StreamedWork:
    """Micro-batches of windows. A bias of attention, where one is needed, is kept with each of them."""
    length, tokens, different = shape.length, shape.rows * shape.length, shape.rows if shape.documents else 1
    bias = 0
    if reasons_for_bias(model, model.window, length, shape.documents):
        bias = different * (model.num_heads if model.position == "alibi" else 1) * length**2
    rotary = different * length * model.head_size
    kept = element_bytes * (tokens * model.hidden_size + bias + rotary) + 3 * 8 * tokens
    loss = CHUNK_BYTES["cpu"] + LOSS_BLOCKS * BLOCK_BYTES["cpu"] + tokens * element_bytes * model.hidden_size
    working = max(block_working_bytes(model, tokens, element_bytes), loss) + head_slice_bytes(model, element_bytes)
    flops = forward_flops(model, length)
    return StreamedWork(-(-shape.windows // shape.rows), kept, working, tokens, flops, rows=shape.rows)


def plan_evaluation(
    sizes: StreamedSizes, model: ModelConfig, shape: EvaluationShape, element_bytes: int, budget: int, fewer_rows: bool
) -> tuple[StreamPlan, EvaluationShape]:
    """The plan, and the shape with as many windows in a micro-batch as work, if there may be `fewer_rows`.

    Raises ConfigError as `plan_stream`.
    """
    try:
        return plan_stream(sizes, evaluation_work(model, shape, element_bytes), budget), shape
    except ConfigError:
        if shape.rows == 1 or not fewer_rows:
            raise
        return plan_evaluation(sizes, model, replace(shape, rows=shape.rows // 2), element_bytes, budget, True)


STATES = 8  # of blocks without attention, kept where the texts of a tree part


def answers_work(model: ModelConfig, length: int, wanted: int, element_bytes: int) -> StreamedWork:
    """Log-probabilities of continuations, and texts, of at most `length` tokens with their contexts.

    Passes of scores are as long as a prefill. Of keys and values a branch may take twice its length.
    """
    tokens = max(PREFILL_CHUNK_TOKENS, length)
    kept = element_bytes * tokens * (model.hidden_size + length + model.head_size) + LOGITS_BYTES * (
        model.padded_vocab_size + tokens
    )
    head = max(SCORED_LOGITS, model.padded_vocab_size) * 3 * 4  # in fp32, and what comes of them
    working = max(block_working_bytes(model, tokens, element_bytes), head) + head_slice_bytes(model, element_bytes)
    cache = 2 * length * kv_cache_bytes(model, element_bytes) + STATES * state_bytes(model, element_bytes)
    return StreamedWork(wanted, kept, working, tokens, forward_flops(model, length), cache)


def generation_work(model: ModelConfig, longest: int, max_tokens: int, wanted: int, element_bytes: int) -> StreamedWork:
    """Texts after prompts of at most `longest` tokens."""
    capacity = min(longest + max_tokens, model.max_positions or longest + max_tokens)
    cache = capacity * kv_cache_bytes(model, element_bytes) + state_bytes(model, element_bytes)
    kept = longest * model.hidden_size * element_bytes + LOGITS_BYTES * model.padded_vocab_size
    tokens = max(longest, min(PREFILL_CHUNK_TOKENS, wanted * longest))
    working = block_working_bytes(model, tokens, element_bytes) + head_slice_bytes(model, element_bytes)
    return StreamedWork(wanted, kept, working, 1, forward_flops(model, capacity), cache)
