"""Bytes on each rank while it trains: what autograd keeps, counted tensor by tensor from the model's own code.

Parameters are fp32 and are the masters. In 16-bit compute each linear map casts its weight where it is used, and
autograd keeps the cast until that block's backward pass. The head and the loss work through chunks of rows, so that
logits exist for one chunk only, and in fp32 for a part of it. A step's memory is largest at one of four moments: when
the loss is taken, when the backward pass enters the last block, in the first one, or when all gradients are there.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil
from typing import NamedTuple

from castalia.config.attention_kernels import AMPERE, Capability, Choice, training_choice
from castalia.config.loss_chunks import BLOCK_BYTES, CHUNK_BYTES
from castalia.config.objective import PAIRED, needs_reference
from castalia.config.schema import FinetuneConfig, ModelConfig, OptimizerConfig, RunConfig
from castalia.config.tensor_table import adapter_shapes, all_shapes, block_of, local_size, row_of
from castalia.plan.layout import Layout, Stage, in_flight, rank_parts

_KEEPS_OUTPUT = {"relu", "sigmoid", "identity"}  # their backward pass needs the output, which the next matrix keeps too
EVERYTHING = FinetuneConfig()  # trains, and there are no adapters


class Moments(NamedTuple):
    """fp32 values that the optimizer keeps for each parameter; vectors are not told from matrices."""

    blocks: int = 2
    outside: int = 2

    def of(self, model: ModelConfig, finetune: FinetuneConfig = EVERYTHING) -> int:
        """Values for all of the model that trains."""
        sizes = _local_sizes(model, 1, finetune, True)
        return self.blocks * sizes["blocks"] + self.outside * (sum(sizes.values()) - sizes["blocks"])


def moments_of(cfg: OptimizerConfig) -> Moments:
    momentum = 1 if cfg.momentum else 0
    kept = {"lion": (1, 1), "sgd": (momentum, momentum), "adafactor": (0, 0), "muon": (momentum, 2)}
    return Moments(*kept.get(cfg.name, (2, 2)))


@dataclass(frozen=True)
class Compute:
    """What memory depends on besides model and layout."""

    precision: str = "bf16"  # or "fp16" or "fp32"
    device: str = "cuda"  # or "cpu", whose RMSNorm is made of several operations
    moments: Moments = Moments()
    finetune: FinetuneConfig = EVERYTHING
    objective: str = "causal"
    reference: bool = False  # a frozen model beside the one that trains
    capability: Capability = AMPERE  # of the GPUs
    documents: bool = False  # do not see each other

    @property
    def element_bytes(self) -> int:
        return 4 if self.precision == "fp32" else 2

    @property
    def sides(self) -> int:
        """Sequences of a sample."""
        return 2 if self.objective in PAIRED else 1

    @property
    def casts(self) -> bool:
        return self.element_bytes < 4


def compute_of(config: RunConfig, precision: str, device: str, capability: Capability = AMPERE) -> Compute:
    """Of a run that computes in "bf16", "fp16" or "fp32" on "cuda" or "cpu"."""
    return Compute(
        precision,
        device,
        moments_of(config.optimizer),
        config.finetune,
        config.train.objective,
        needs_reference(config),
        capability,
        config.data.mask_documents,
    )


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the moment of a step when their sum is largest."""

    masters: int
    moments: int
    gradients: int
    compute_copies: int
    activations: int
    logits: int
    buffers: int

    @property
    def total(self) -> int:
        state = self.masters + self.moments + self.gradients
        return state + self.compute_copies + self.activations + self.logits + self.buffers


@dataclass(frozen=True)
class Activations:
    """Bytes of one block for one micro-batch."""

    whole: int  # all that its backward pass needs
    kept: int  # of this, what stays from forward to backward under the recompute policy
    again: int  # what the backward pass makes once more


@dataclass(frozen=True)
class Attending:
    """What attention keeps in memory besides its inputs and its output, on the last context rank."""

    choice: Choice
    bias: int  # bytes of the one bias that all blocks of a forward pass share
    scores: int  # elements of one tensor of scores, where there are any


def attending(model: ModelConfig, layout: Layout, tokens: int, length: int, compute: Compute) -> Attending:
    capability = None if compute.device == "cpu" else compute.capability
    gathers = layout.cp > 1 and layout.cp_kind == "gather"
    choice = training_choice(model, capability, compute.precision, length, documents=compute.documents, gathers=gathers)
    heads = model.num_heads // layout.tp
    here = heads // layout.cp if layout.cp_kind == "ulysses" else heads
    queries = length // layout.cp if gathers else length
    rows, shared = tokens * layout.cp // length, 1 if model.position != "alibi" else heads
    width = length if compute.device == "cpu" else -(-length // 8) * 8
    size = 4 if compute.device == "cpu" and compute.precision == "fp16" else compute.element_bytes
    bias = (rows if compute.documents else 1) * shared * queries * width * size
    plain = choice.kernel == "plain"  # which only adds the bias: but recomputation keeps it
    held = choice.sight == "bias" and not (plain and layout.recompute == "none")
    return Attending(choice, bias if held else 0, rows * here * queries * length if plain else 0)


def activations(model: ModelConfig, layout: Layout, tokens: int, length: int, compute: Compute) -> Activations:
    size, tp = compute.element_bytes, layout.tp
    stream = tokens * model.hidden_size // (tp if layout.sequence_parallel else 1)  # one [tokens, hidden]
    heads, kv = (n * model.head_size * tokens // tp for n in (model.num_heads, model.kv_heads))
    inner = model.mlp_width * tokens // tp
    softmax = 4 * tokens * model.num_heads // tp

    reads = _inputs_kept(model, compute.finetune)  # matrices that autograd keeps the input of
    reading = ["attn.qkv" in reads, bool({"mlp.up", "mlp.gate"} & reads)]
    num_norms = 1 if model.shared_norm else 2
    outputs = any(reading) if model.shared_norm else sum(reading)
    how = attending(model, layout, tokens, length, compute)
    attention = 2 * heads + 2 * kv  # q, k and v in one tensor, and the output
    copies = heads + kv if model.position == "rotary" or model.qk_norm else 0
    grouped = model.kv_heads < model.num_heads
    copies += heads if grouped else 0  # queries gathered from their groups
    if how.choice.repeats:  # queries, repeated keys and values, and the output
        copies = 4 * heads - attention
    if layout.cp > 1 and layout.cp_kind == "gather":  # keys and values of all ranks
        copies += 2 * layout.cp * (heads if how.choice.repeats else kv)
    scores = 0
    if how.choice.kernel == "plain":  # which copies them: at most values are still those of the one tensor
        copies = -(heads + 2 * kv if compute.casts or grouped else 0)
        softmax, scores = 0, _kept_scores(model, how, heads, kv, compute)
    own = model.activation in _KEEPS_OUTPUT and not model.gated_mlp
    mlp = inner * ((3 if model.gated_mlp else 1) + ("mlp.down" in reads and not own))
    norms = _norm_inputs(model, 1 if model.parallel_residual else num_norms, stream, compute)
    norms += outputs * stream * size + num_norms * 8 * tokens  # kept by the matrices that follow, and statistics
    masks = 2 * stream * (1 if compute.device == "cuda" else size) if model.hidden_dropout else 0
    adapters, adapted = _adapters(model, layout.tp, tokens, compute)
    whole = norms + (attention + copies + mlp) * size + softmax + scores + masks + adapters

    if layout.recompute == "none":
        return Activations(whole, whole, 0)
    if layout.recompute == "full":
        return Activations(whole, stream * size, whole - stream * size)
    found = attention - (heads if how.choice.kernel == "plain" else 0)  # scores and what they give are made again
    products = found + inner * (2 if model.gated_mlp else 1) + adapted  # what the backward pass finds ready
    kept = (stream + products + 2 * stream) * size + softmax  # the block's input, the results of all matrices
    return Activations(whole, kept, whole - (stream + products) * size - softmax)


def _kept_scores(model: ModelConfig, how: Attending, heads: int, kv: int, compute: Compute) -> int:
    """Bytes that the plain kernel keeps, all in fp32: queries and keys times the scale, values, and scores.

    Of the scores there are the softmax's, and with dropout its mask and what it leaves.
    """
    kv = heads if model.kv_heads < model.num_heads else kv
    dropped = 0 if not model.attention_dropout else 4 + (1 if compute.device == "cuda" else 4)
    values = kv if compute.casts or model.kv_heads < model.num_heads else 0
    return 4 * (heads + kv + values) + (4 + dropped) * how.scores


@lru_cache
def _inputs_kept(model: ModelConfig, finetune: FinetuneConfig) -> frozenset[str]:
    """Kinds of modules whose weight trains, or whose adapter does."""
    names = (name for name in all_shapes(model, finetune) if finetune.trains(name))
    return frozenset(row_of(name).module for name in names if not name.endswith(".bias"))


def _adapters(model: ModelConfig, tp: int, tokens: int, compute: Compute) -> tuple[int, int]:
    """Of a block's adapters: bytes that the backward pass needs, and the elements of their products."""
    lora, size = compute.finetune.lora, compute.element_bytes
    if lora is None:
        return 0, 0
    one = model.with_({"num_layers": 1})
    kept = products = 0
    for name, shape in adapter_shapes(one, lora).items():
        if name.startswith("blocks.") and name.endswith(".lora_a"):
            width = local_size(name, shape, tp) // lora.rank
            mask = 1 if compute.device == "cuda" else size
            # What dropout makes is kept in place of its input, unless that is kept for something else.
            twice = size if row_of(name).module in ("attn.out", "mlp.gate") else 0
            kept += tokens * (lora.rank * size + (width * (mask + twice) if lora.dropout else 0))
            products += tokens * lora.rank
        elif name.startswith("blocks."):
            products += tokens * local_size(name, shape, tp) // lora.rank
    return kept, products


def _norm_inputs(model: ModelConfig, number: int, stream: int, compute: Compute) -> int:
    """What norms keep of their inputs: the input, or where a norm is made of single operations two fp32 tensors.

    The second one is for the gradient of the norm's weight.
    """
    single_operations = model.norm == "scalenorm" or (model.norm == "rmsnorm" and compute.device == "cpu")
    wide = 8 if "norm1" in _inputs_kept(model, compute.finetune) else 4
    return number * stream * (wide if single_operations else compute.element_bytes)


@dataclass(frozen=True)
class Rank:
    """Any rank of one pipeline stage; its tensor and data ranks all have the same sizes."""

    model: ModelConfig
    layout: Layout
    stage: Stage
    length: int
    compute: Compute

    @cached_property
    def tokens(self) -> int:
        """Of one micro-batch."""
        return self.compute.sides * self.layout.micro_batch * self.length // self.layout.cp

    @cached_property
    def stream(self) -> int:
        """Bytes of one [tokens, hidden] in the compute dtype."""
        return self.tokens * self.model.hidden_size * self.compute.element_bytes

    @cached_property
    def sizes(self) -> Counter[str]:
        return _local_sizes(self.model, self.layout.tp, self.compute.finetune)

    @cached_property
    def training(self) -> Counter[str]:
        """The sizes of what trains."""
        return _local_sizes(self.model, self.layout.tp, self.compute.finetune, True)

    @property
    def block(self) -> int:
        """Parameters of one block before sharding over data ranks."""
        return self.sizes["blocks"] // self.model.num_layers

    @property
    def trained_block(self) -> int:
        return self.training["blocks"] // self.model.num_layers

    @cached_property
    def live(self) -> int:
        """Blocks that the backward pass reaches: those from the lowest one with something that trains."""
        return -(-self.stage.layers * _live(self.model, self.compute.finetune) // self.model.num_layers)

    @property
    def vocabulary(self) -> int:
        """Elements of the embedding or the head."""
        return self.sizes["embed.weight"]

    @cached_property
    def one(self) -> Activations:
        """Of one block and one micro-batch."""
        return activations(self.model, self.layout, self.tokens, self.length, self.compute)

    @cached_property
    def attending(self) -> Attending:
        return attending(self.model, self.layout, self.tokens, self.length, self.compute)

    @property
    def head_name(self) -> str:
        return "reward" if self.model.reward_head else "embed" if self.model.tie_embeddings else "head"

    @property
    def head(self) -> int:
        """Elements of the head's matrix."""
        return self.sizes[f"{self.head_name}.weight"]

    @cached_property
    def parameters(self) -> int:
        """Of the stage before sharding over data ranks; a tied embedding is on its first and its last stage."""
        return self._on_stage(self.sizes)

    @cached_property
    def trained(self) -> int:
        return self._on_stage(self.training)

    @cached_property
    def reference(self) -> int:
        """Parameters of the frozen reference model's stage."""
        plain = _local_sizes(self.model, self.layout.tp, EVERYTHING)
        return self._on_stage(plain) if self.compute.reference else 0

    def _on_stage(self, sizes: Counter[str]) -> int:
        names: tuple[str, ...] = ()
        if self.stage.first:
            names += ("embed.", "positions.")
        if self.stage.last:
            names += ("norm.", f"{self.head_name}.")
        outside = sum(size for name, size in sizes.items() if name.startswith(names))
        return self.stage.layers * sizes["blocks"] // self.model.num_layers + outside

    @property
    def masters(self) -> int:
        """Bytes of the parameters, before they are sharded, and of a reference model's, in the compute dtype."""
        return 4 * self.parameters + self.compute.element_bytes * self.reference

    @property
    def moments(self) -> int:
        """Bytes before they are sharded."""
        blocks, kept = self.stage.layers * self.training["blocks"] // self.model.num_layers, self.compute.moments
        return 4 * (kept.blocks * blocks + kept.outside * (self.trained - blocks))

    @property
    def shards(self) -> int:
        return self.layout.dp // self.layout.dp_replicate if self.layout.zero else 1

    def memory(self) -> Memory:
        moments = [self._at_loss(), self._at_end()]
        if self.live < self.stage.layers:
            moments.append(self._in_frozen_block())
        if self.live:
            moments += [self._entering_blocks(), self._in_first_block()]
        return max(moments, key=lambda memory: memory.total)

    def _at_loss(self) -> Memory:
        head = 3 * self.stream if self.stage.last else 0  # the last norm's input and output, its output's gradient
        return self._memory(
            gradients=self._gradients(done=0) + self._head_gradient,
            copies=self._copies(self._cast_blocks, head=self.stage.last),
            activations=self._kept + head,
            logits=self._loss_work() if self.stage.last else 0,
        )

    def _in_frozen_block(self) -> Memory:
        """In the forward pass, of which nothing stays."""
        inner = self.tokens * self.model.mlp_width // self.layout.tp * self.compute.element_bytes
        return self._memory(
            gradients=self._gradients(done=0),
            copies=self._copies(0, head=False),
            activations=(3 if self.model.gated_mlp else 2) * inner + 3 * self.stream + self.attending.bias,
        )

    def _entering_blocks(self) -> Memory:
        return self._memory(
            gradients=self._gradients(done=0) + self._head_gradient,
            copies=self._copies(max(1, self._cast_blocks), head=False),
            activations=self._kept + self.one.again + self._backward_work,
        )

    def _in_first_block(self) -> Memory:
        above = self.trained - self.trained_block - (self.training["embed.weight"] if self.stage.first else 0)
        return self._memory(
            gradients=self._gradients(done=above),
            copies=self._copies(1, head=False),
            activations=self.one.whole + self.attending.bias + self._backward_work,
        )

    def _at_end(self) -> Memory:
        # A tied embedding's own gradient is made whole before it is added to the head's.
        tied = 4 * self.training["embed.weight"] if self.model.tie_embeddings and self.stage.first else 0
        return self._memory(
            gradients=self._gradients(done=self.trained) + tied,
            copies=self._copies(0, head=False),
            activations=2 * self.stream,
        )

    def _memory(self, *, gradients: int, copies: int, activations: int, logits: int = 0) -> Memory:
        if self.layout.offload:  # what is on the host does not count; a block's gradient is made here and leaves
            return Memory(
                0, 0, 4 * max(self.trained_block, self._head_gradient // 4), copies, activations, logits, self._buffers
            )
        masters, moments = self.masters // self.shards, self.moments // self.shards
        return Memory(masters, moments, gradients, copies, activations, logits, self._buffers)

    @property
    def _kept(self) -> int:
        held = in_flight(self.layout, self.stage.index)
        return int(self.live * held * self.one.kept) + ceil(held) * self.attending.bias * self.layout.stages_per_rank

    @property
    def _backward_work(self) -> int:
        """Gradients of the inner width and of the stream; what they were made from is freed by then."""
        inner = self.tokens * self.model.mlp_width // self.layout.tp * self.compute.element_bytes
        still_needed = 2 if self.model.activation in _KEEPS_OUTPUT and not self.model.gated_mlp else 1
        reads = _inputs_kept(self.model, self.compute.finetune)
        scaled = inner if self.compute.finetune.lora and "mlp.up" in reads else 0  # the gradient of an adapter's output
        mlp = still_needed * inner + scaled + 2 * self.stream
        return max(mlp, 4 * self.attending.scores + 2 * self.stream)  # the scores' gradient comes after the MLP's

    @property
    def _head_gradient(self) -> int:
        if not self.stage.last:
            return 0
        if "head.lora_a" in self.training:  # the matrix with its adapter, and the gradient of that
            return 8 * self.head
        return 4 * self.training[f"{self.head_name}.weight"]

    def _gradients(self, done: int) -> int:
        """Bytes of fp32 gradients, those of earlier micro-batches included, once `done` parameters have theirs."""
        if self.layout.accumulation > 1:
            done = self.trained
        once = self.layout.zero == 1 or self.layout.pp > 1  # sums in full and cuts once for each step
        if self.layout.zero == 0 or (once and self.layout.accumulation > 1):
            return 4 * done
        # A block's gradients, the same laid out for the ranks that they go to, and on CPUs gloo's copy of that.
        at_once = 1 if self.shards == 1 else 3 if self.compute.device == "cpu" else 2
        return 4 * done // self.shards + 4 * at_once * self.trained_block

    @property
    def _cast_blocks(self) -> int:
        return self.live if self.layout.recompute == "none" else 0

    def _copies(self, blocks: int, head: bool) -> int:
        """Weights in the compute dtype, when so many blocks and the head hold theirs."""
        # Several ranks copy their shards, even where a shard is the whole, into what the forward pass works with.
        size, elsewhere = self.compute.element_bytes, self.layout.gpus > 1 or self.layout.offload
        if self.layout.zero < 3 and elsewhere:  # gathered for the whole step
            return size * self.parameters
        if self.layout.zero == 3 and elsewhere:  # the block at work and the one fetched ahead
            return size * (2 * self.block + (self.head if head else 0))
        return size * (blocks * self.block + (self.head if head else 0)) if self.compute.casts else 0

    def _loss_work(self) -> int:
        """Working memory of one chunk of logits."""
        if self.model.reward_head:
            return 0
        vocabulary, size = self.model.padded_vocab_size // self.layout.tp, self.compute.element_bytes
        limit = CHUNK_BYTES[self.compute.device]
        if self.compute.objective != "causal":  # losses of single sequences: the backward pass makes logits again
            elements = min(self.tokens, max(1, limit // (4 * vocabulary))) * vocabulary
            again = (4 + (size if self.compute.casts else 0)) * elements
            return max(8 * elements - self._head_gradient, again)  # before there is a gradient of the head, and then
        if self.layout.tp > 1:  # whole chunks in fp32
            rows = min(self.tokens, max(1, limit // (4 * vocabulary)))
            if not self.compute.casts:
                return 8 * rows * vocabulary
            softmax = (size + (8 if self.compute.device == "cpu" else 4)) * rows * vocabulary
            return max(softmax, (4 + size) * rows * vocabulary + size * self.vocabulary)
        rows = min(self.tokens, max(1, limit // (size * vocabulary)))
        block = min(rows, max(1, BLOCK_BYTES[self.compute.device] // (4 * vocabulary)))
        return (size * rows + (8 if self.compute.casts else 4) * block) * vocabulary

    @property
    def _buffers(self) -> int:
        """Tokens, labels and rotary tables."""
        rotary = self.model.rotary_size if self.model.position == "rotary" else 0
        micro_batches = self.layout.accumulation if self.compute.device == "cuda" else 1  # a CPU copies none
        return 16 * self.tokens * micro_batches + self.length * rotary * (8 + self.compute.element_bytes)


@lru_cache
def _local_sizes(model: ModelConfig, tp: int, finetune: FinetuneConfig, trained: bool = False) -> Counter[str]:
    """Elements on one tensor rank of all blocks together and of every tensor outside of them, or of what trains."""
    sizes: Counter[str] = Counter()
    for name, shape in all_shapes(model, finetune).items():
        if not trained or finetune.trains(name):
            sizes["blocks" if name.startswith("blocks.") else name] += local_size(name, shape, tp)
    return sizes


@lru_cache
def _live(model: ModelConfig, finetune: FinetuneConfig) -> int:
    """Blocks through which gradients flow."""
    trained = [name for name in all_shapes(model, finetune) if finetune.trains(name)]
    lowest = min(map(block_of, trained), default=model.num_layers)
    return max(0, model.num_layers - max(0, lowest))


def memory_by_stage(model: ModelConfig, layout: Layout, length: int, compute: Compute) -> list[Memory]:
    """The memory of a rank of each pipeline stage."""
    return [Rank(model, layout, stage, length, compute).memory() for stage in rank_parts(model, layout, length)]


def checkpoint_bytes(parameters: int, moments: int, original: int, fp32: bool) -> dict[str, int]:
    """Sizes of checkpoints: ours, and GPT-NeoX's from the sum of the parameters over its ranks.

    Ours: fp32 weights, which are the masters, and so many moments. GPT-NeoX's: weights in the compute dtype, fp32
    masters where they differ from those, two moments.
    """
    slim, full = (4, 12) if fp32 else (2, 14)
    return {
        "weights": 4 * parameters,
        "full": 4 * (parameters + moments),
        "original_slim": slim * original,
        "original_full": full * original,
    }
