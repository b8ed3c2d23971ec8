"""Memory of each rank during training, in bytes: what autograd keeps, counted tensor by tensor as the model makes it.

Parameters are fp32 and serve as master weights. In 16-bit compute each linear map casts its weight where it is used,
and autograd keeps the cast until the backward pass of that block. Head and loss work through chunks of rows, so that
logits exist for one chunk at a time, and in fp32 for a block of a chunk. The memory of a step peaks at one of these
moments: when the loss is computed, when the backward pass enters the last block or reaches the first one, or when all
gradients exist; where only some blocks train, also in the forward pass of a frozen one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property, lru_cache
from math import ceil, prod
from typing import NamedTuple

from castalia.config.attention_kernels import AMPERE, Capability, KernelChoice, training_choice
from castalia.config.float8_matrices import activation_type, float8_matrices
from castalia.config.loss_chunks import BLOCK_BYTES, CHUNK_BYTES
from castalia.config.objective import PAIRED, needs_reference
from castalia.config.scan_chunks import CHUNK_VALUES, SCAN_TOKENS, scan_chunk
from castalia.config.schema import FinetuneConfig, LayerKind, LoraConfig, ModelConfig, OptimizerConfig, RunConfig
from castalia.config.tensor_table import Shapes, adapter_shapes, all_shapes, block_of, local_size, row_of
from castalia.plan.layout import Layout, Stage, blocks_of_rank, in_flight, rank_parts

# Activation functions whose backward pass needs their output, which the next matrix keeps anyway.
_KEEPS_OUTPUT = {"relu", "sigmoid", "identity"}
# Matrices whose input is kept for something else, too.
TWICE = ("attn.out", "mlp.gate", "gmlp.attn.qkv", "gmlp.attn.out", "mamba.in_z", "mamba.x_proj")
SCAN_COPIES = 7  # of the largest tensor of RWKV's scan, that exist at a time in its backward pass
EVERYTHING = FinetuneConfig()  # all tensors train, without adapters


class Moments(NamedTuple):
    """fp32 values of optimizer state per parameter, in the blocks and outside of them."""

    blocks: int = 2
    outside: int = 2

    def of(self, model: ModelConfig, finetune: FinetuneConfig = EVERYTHING) -> int:
        """Values of optimizer state for the whole model, or for the part that trains."""
        sizes = _local_sizes(model, 1, 1, finetune, True)
        return self.blocks * sizes["blocks"] + self.outside * (sum(sizes.values()) - sizes["blocks"])


def moments_of(cfg: OptimizerConfig) -> Moments:
    """What an optimizer keeps; adafactor's few rows and columns count as nothing."""
    momentum = 1 if cfg.momentum else 0
    kept = {"lion": (1, 1), "sgd": (momentum, momentum), "adafactor": (0, 0), "muon": (momentum, 2)}
    return Moments(*kept.get(cfg.name, (2, 2)))


@dataclass(frozen=True)
class Compute:
    """What memory depends on besides the model and the layout."""

    precision: str = "bf16"  # of activations; or "fp16" or "fp32"
    device: str = "cuda"  # or "cpu", where RMSNorm is not one fused operation
    moments: Moments = Moments()
    finetune: FinetuneConfig = EVERYTHING
    objective: str = "causal"
    reference: bool = False  # a frozen reference model is in memory as well
    capability: Capability = AMPERE  # of the GPUs
    documents: bool = False  # tokens attend only within their document
    float8: bool = False  # attention's and dense MLPs' matrices multiply in float8

    @property
    def element_bytes(self) -> int:
        """Bytes of a value in the compute dtype."""
        return 4 if self.precision == "fp32" else 2

    @property
    def sides(self) -> int:
        """Sequences in a sample: 2 for pairs."""
        return 2 if self.objective in PAIRED else 1

    @property
    def casts(self) -> bool:
        """Whether weights are cast to a 16-bit dtype."""
        return self.element_bytes < 4


def compute_of(config: RunConfig, precision: str, device: str, capability: Capability = AMPERE) -> Compute:
    """The `Compute` of a run. `precision`: "bf16", "fp16", "fp8" or "fp32"; `device`: "cuda" or "cpu"."""
    return Compute(
        activation_type(precision),
        device,
        moments_of(config.optimizer),
        config.finetune,
        config.train.objective,
        needs_reference(config),
        capability,
        config.data.mask_documents,
        precision == "fp8",
    )


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, by purpose, at the moment of a step when their sum is largest."""

    masters: int
    moments: int
    gradients: int
    compute_copies: int
    activations: int
    logits: int
    buffers: int

    @property
    def total(self) -> int:
        """The sum."""
        state = self.masters + self.moments + self.gradients
        return state + self.compute_copies + self.activations + self.logits + self.buffers


@dataclass(frozen=True)
class Activations:
    """Activation bytes of one block for one micro-batch."""

    whole: int  # everything that its backward pass needs
    kept: int  # the part kept from the forward to the backward pass under activation checkpointing
    again: int  # the part that the backward pass computes again


@dataclass(frozen=True)
class Attending:
    """What attention keeps besides its inputs and its output, on the last context-parallel rank."""

    choice: KernelChoice
    bias: int  # bytes of the bias, which all blocks of a forward pass share
    scores: int  # elements of one tensor of scores; 0 if the kernel materializes none


def attending(model: ModelConfig, layout: Layout, tokens: int, length: int, compute: Compute) -> Attending:
    """The kernel and its memory for a micro-batch of `tokens` tokens on this rank, in sequences of `length`.

    The bias is [rows or 1, heads or 1, queries, keys], with keys padded to 8 on GPUs; scores are [rows, heads, queries,
    keys].
    """
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
    plain = choice.kernel == "plain"  # adds the bias without keeping it, but activation checkpointing keeps it
    held = choice.sight == "bias" and not (plain and layout.recompute == "none")
    return Attending(choice, bias if held else 0, rows * here * queries * length if plain else 0)


class BlockKind(NamedTuple):
    """What the memory and the time of a block depend on."""

    layer: LayerKind
    windowed: bool = False  # has the sliding window, which other blocks lack

    def __str__(self) -> str:
        return f"{self.layer} windowed" if self.windowed else self.layer


@lru_cache
def block_kinds(model: ModelConfig) -> tuple[BlockKind, ...]:
    """The kind of each block."""
    differ = 0 < model.windowed_share < 1
    return tuple(
        BlockKind(layer, differ and layer in ("dense", "moe") and model.window_of(number) is not None)
        for number, layer in enumerate(model.layer_kinds)
    )


@lru_cache
def alike(model: ModelConfig, kind: BlockKind) -> ModelConfig:
    """The model with all blocks with attention as those of this kind."""
    changes: dict[str, object] = {}
    if 0 < model.windowed_share < 1:
        changes |= {"window_pattern": (True,)} if kind.windowed else {"sliding_window": None}
    if model.experts and len({"dense", "moe"} & set(model.layer_kinds)) == 2:
        every = model.experts.with_({"first": 0, "every": 1})
        changes |= {"experts": every if kind.layer == "moe" else None}
    return model.with_(changes) if changes else model


def activations(model: ModelConfig, layout: Layout, tokens: int, length: int, compute: Compute) -> Activations:
    """What one block keeps of a micro-batch of `tokens` tokens on this rank, in sequences of `length`, on average."""
    kinds = block_kinds(model)
    kept = {kind: block_activations(model, kind, layout, tokens, length, compute) for kind in set(kinds)}
    return _mean([kept[kind] for kind in kinds])


def _mean(blocks: Sequence[Activations]) -> Activations:
    whole, kept, again = (sum(each) // len(blocks) for each in zip(*map(astuple, blocks), strict=True))
    return Activations(whole, kept, again)


def block_activations(
    model: ModelConfig, kind: BlockKind, layout: Layout, tokens: int, length: int, compute: Compute
) -> Activations:
    """`activations` of the blocks of one kind."""
    other = {"mamba": _mamba_block, "rwkv": _rwkv_block}
    if kind.layer in other:
        kept = other[kind.layer](model, layout, tokens, length, compute)
    elif kind.layer in ("gmlp", "amlp"):
        kept = _gated_block(model, layout, tokens, length, compute, kind.layer == "amlp")
    else:
        kept = _attention_block(alike(model, kind), layout, tokens, length, compute)
    return _with_adapters(kept, model, kind.layer, layout, tokens, compute)


def _gated_block(
    model: ModelConfig, layout: Layout, tokens: int, length: int, compute: Compute, attends: bool
) -> Activations:
    """`activations` of a gMLP or aMLP block: both halves before and after the activation function, the normed half,
    the gate, their product, and the spatial matrix."""
    stream, gate = tokens * model.hidden_size, 4 * tokens * model.hidden_size
    products = 2 * gate + gate  # of the first matrix, and of the spatial one
    small = tokens * 4 * model.amlp_size + gate if attends else 0
    inner = 2 * gate + 2 * gate + 3 * gate + small
    # The second norm's input is a half of what is kept anyway.
    norms = _norm_inputs(model, 1, stream, compute) + _norm_inputs(model, 1, gate, compute)
    whole = norms + (stream + inner - gate + length**2) * compute.element_bytes
    if layout.recompute == "none":
        return Activations(whole, whole, 0)
    kept = stream * compute.element_bytes
    if layout.recompute == "selective":
        kept += products * compute.element_bytes
    return Activations(whole, kept, whole - kept)


def _mamba_block(model: ModelConfig, layout: Layout, tokens: int, length: int, compute: Compute) -> Activations:
    """`activations` of a Mamba block: the convolution's input and, in fp32, its sum; what comes of that; the gate
    before and after its function; the scan's output and the product; steps and x in fp32; the states between chunks."""
    size, wide = compute.element_bytes, tokens * model.mamba_width // layout.tp
    selection = tokens * (model.mamba_rank + 2 * model.mamba_sizes.states)
    inner = 6 * wide * size + 2 * 4 * wide + selection * size
    inner += (4 * wide + 8 * tokens * model.mamba_sizes.states) * compute.casts  # of fp32 nothing is cast
    # Of one state of all sequences.
    values = tokens // length * model.mamba_width // layout.tp * model.mamba_sizes.states
    chunk = max(1, CHUNK_VALUES[compute.device] // max(1, values))
    inner += 4 * values * -(-length // chunk)
    stream = tokens * model.hidden_size * size // (layout.tp if layout.sequence_parallel else 1)
    inner += tokens * model.hidden_size * size - stream  # gathered before the mixer
    whole = _norm_inputs(model, 1, stream // size, compute) + stream + inner
    if layout.recompute == "none":
        return Activations(whole, whole, 0)
    kept = stream
    if layout.recompute == "selective":
        kept += (4 * wide + selection) * size
    return Activations(whole, kept, whole - kept)


def _rwkv_block(model: ModelConfig, layout: Layout, tokens: int, length: int, compute: Compute) -> Activations:
    """`activations` of an RWKV block. In the time mix the change from the token before, the five shares of it and what
    they give, the matrices' outputs, the gate before and after its function; in fp32 decays at four points and the
    scan's output; the states between chunks. In the channel mix as much of it as there is."""
    size, sizes, stream, h = compute.element_bytes, model.rwkv_sizes, tokens * model.hidden_size, model.hidden_size
    low = tokens * (2 * 5 * sizes.mix_rank + sizes.decay_rank)
    heads = stream // layout.tp  # of values that belong to heads
    products = 6 * heads + tokens * (5 * sizes.mix_rank + sizes.decay_rank)  # of matrices, in the time mix
    inner = (3 + 10) * stream * size + 4 * heads * size + 3 * 4 * heads + 4 * 4 * heads + low * size
    rows = tokens // length
    chunk = scan_chunk(compute.device, rows * h // layout.tp)
    inner += 4 * rows * h // layout.tp * model.head_size * -(-length // chunk)
    whole = inner + _channel_values(model, tokens, layout.tp) * size
    reads = _inputs_kept(model, compute.finetune)
    if "rwkv.time" not in reads:  # inputs of the low ranks, for whose values alone they are kept
        whole -= (2 * stream + tokens * 5 * sizes.mix_rank) * size
    if "rwkv.channels" not in reads:
        whole -= stream * size
    if layout.recompute == "none":
        return Activations(whole, whole, 0)
    kept = stream * size // (layout.tp if layout.sequence_parallel else 1)
    if layout.recompute == "selective":
        kept += (products + 5 * stream + 3 * heads + tokens * model.rwkv_width // layout.tp) * size
    return Activations(whole, kept, whole - kept)


def _channel_values(model: ModelConfig, tokens: int, tp: int) -> int:
    """Values that the channel mix of an RWKV block keeps: its input, the change from the token before, what it makes of
    both, the receptance and the output; the keys before and after the square."""
    return tokens * (4 * model.hidden_size + (2 * model.hidden_size + 2 * model.rwkv_width) // tp)


def _attention_block(model: ModelConfig, layout: Layout, tokens: int, length: int, compute: Compute) -> Activations:
    """`activations` of a block with attention. All of them are alike, see `alike`."""
    size, tp = compute.element_bytes, layout.tp
    # Elements: of the hidden state [tokens, hidden]; of queries, and of keys or values, [tokens, heads * head size]; of
    # the MLP's inner width [tokens, width].
    stream = tokens * model.hidden_size // (tp if layout.sequence_parallel else 1)
    heads, kv = (n * model.head_size * tokens // tp for n in (model.num_heads, model.kv_heads))
    softmax = 4 * tokens * model.num_heads // tp  # bytes of the flash kernel's log-sums, fp32 [tokens, heads]

    reads = _inputs_kept(model, compute.finetune)  # modules whose input autograd keeps
    eights = _float8_inputs(model, tp, reads) if compute.float8 else {}  # and those of which it keeps float8 values
    reads -= eights.keys()
    reading = ["attn.qkv" in reads, bool({"mlp.up", "mlp.gate", "mlp.router"} & reads)]
    num_norms = 1 if model.has_one_norm else 4 if model.norm_placement == "both" else 2
    outputs = any(reading) if model.has_one_norm else sum(reading)
    how = attending(model, layout, tokens, length, compute)
    attention = 2 * heads + 2 * kv  # q, k and v in one tensor, and the output
    copies = heads + kv if model.position == "rotary" or model.qk_norm else 0
    copies += heads + kv if isinstance(model.qk_norm, str) else 0  # before the norms and after
    copies += heads + 2 * kv if model.clip_qkv else 0  # the unclipped ones
    grouped = model.kv_heads < model.num_heads
    copies += heads if grouped else 0  # queries, copied from their interleaved groups into one tensor
    if how.choice.repeats:  # queries, repeated keys, repeated values and the output
        copies = 4 * heads - attention
    if layout.cp > 1 and layout.cp_kind == "gather":  # keys and values of all context-parallel ranks
        copies += 2 * layout.cp * (heads if how.choice.repeats else kv)
    scores = 0
    if how.choice.kernel == "plain":  # makes scaled copies of its inputs; only values may be used in place
        copies = -(heads + 2 * kv if compute.casts or grouped else 0)
        softmax, scores = 0, _kept_scores(model, how, heads, kv, compute)
    mlp, inner = (int(values * tokens) // tp for values in _mlp_kept(model, reads))
    if model.experts:  # beside the inner activations rows sorted by expert, and outputs before and after their shares
        share = model.layer_kinds.count("moe") / model.attention_layers
        rows = int(share * tokens * model.experts.top_k)
        mlp += rows * (2 * model.hidden_size) // tp
        softmax += rows * (4 * model.hidden_size // tp + 24)  # the output in fp32, and places in int64
    norms = _norm_inputs(model, 1 if model.parallel_residual else num_norms, stream, compute)
    # Outputs, kept by the matrices that follow, and statistics.
    norms += outputs * stream * size + num_norms * 8 * tokens
    masks = 2 * stream * (1 if compute.device == "cuda" else size) if model.hidden_dropout else 0
    whole = norms + (attention + copies + mlp) * size + softmax + scores + masks
    whole += int(tokens * sum(eights.values()))

    if layout.recompute == "none":
        return Activations(whole, whole, 0)
    if layout.recompute == "full":
        return Activations(whole, stream * size, whole - stream * size)
    # Selective: the results of matrix products and of fused attention are kept. The plain kernel's are computed again.
    attended = attention - (heads if how.choice.kernel == "plain" else 0)
    products = attended + inner
    kept = (stream + products + 2 * stream) * size + softmax  # with the block's input and two [tokens, hidden] outputs
    return Activations(whole, kept, whole - (stream + products) * size - softmax)


@lru_cache
def _float8_inputs(model: ModelConfig, tp: int, reads: frozenset[str]) -> dict[str, float]:
    """Modules that keep their input in float8, with its width, averaged over the blocks with attention."""
    widths: dict[str, float] = {}
    for name, (_, columns) in float8_matrices(model, tp)[0].items():
        module = row_of(f"{name}.weight").module
        if module in reads:
            widths[module] = widths.get(module, 0.0) + columns / model.attention_layers
    return widths


class _Inner(NamedTuple):
    """The inner values of a token in one kind of MLP, averaged over the blocks with attention."""

    width: float
    gated: bool
    down: str  # the module whose input they become


def _mlp_widths(model: ModelConfig) -> list[_Inner]:
    """Of MLPs, of the experts that compute a token, and of shared experts."""
    blocks, mixtures = max(1, model.attention_layers), model.layer_kinds.count("moe")
    widths = [_Inner(model.layer_kinds.count("dense") * model.mlp_width / blocks, model.gated_mlp, "mlp.down")]
    if wanted := model.experts:
        chosen, shared = wanted.top_k * model.expert_width, wanted.shared_width or 0
        widths.append(_Inner(mixtures * chosen / blocks, wanted.gated, "mlp.experts"))
        widths.append(_Inner(mixtures * shared / blocks, wanted.gated, "mlp.shared.down"))
    return widths


def _mlp_kept(model: ModelConfig, reads: frozenset[str]) -> tuple[float, float]:
    """Values of a token that MLPs keep inside, and how many of them are outputs of matrix products.

    With a gate both products and the function of one of them are kept. The input of the last matrix comes on top,
    unless it is the output of an activation function that keeps it itself.
    """
    kept = products = 0.0
    for width, gated, down in _mlp_widths(model):
        own = model.activation in _KEEPS_OUTPUT and not gated
        kept += width * ((3 if gated else 1) + (down in reads and not own))
        products += width * (2 if gated else 1)
    return kept, products


def _inner_width(model: ModelConfig) -> float:
    """Inner values of a token in one direction, averaged over the blocks."""
    gates = sum(kind in ("gmlp", "amlp") for kind in model.layer_kinds) * 8 * model.hidden_size
    channels = model.layer_kinds.count("mamba") * 2 * model.mamba_width
    channels += model.layer_kinds.count("rwkv") * model.rwkv_width
    mlps = sum(mlp.width for mlp in _mlp_widths(model)) * model.attention_layers
    return (mlps + gates + channels) / model.num_layers


def _kept_scores(model: ModelConfig, how: Attending, heads: int, kv: int, compute: Compute) -> int:
    """Bytes that the plain kernel keeps, all in fp32: scaled queries and keys, values, and scores.

    Of the scores it keeps the softmax and, with dropout, the mask and the result; of capped ones the tangents, too.
    """
    kv = heads if model.kv_heads < model.num_heads else kv
    dropped = 0 if not model.attention_dropout else 4 + (1 if compute.device == "cuda" else 4)
    values = kv if compute.casts or model.kv_heads < model.num_heads else 0
    tangents = compute.element_bytes if model.attention_softcap else 0
    return 4 * (heads + kv + values) + (4 + dropped + tangents) * how.scores


@lru_cache
def _inputs_kept(model: ModelConfig, finetune: FinetuneConfig) -> frozenset[str]:
    """Modules whose weight or adapter trains, so that autograd keeps their input."""
    names = (name for name in all_shapes(model, finetune) if finetune.trains(name))
    return frozenset(row_of(name).module for name in names if not name.endswith(".bias"))


def _with_adapters(
    block: Activations, model: ModelConfig, kind: LayerKind, layout: Layout, tokens: int, compute: Compute
) -> Activations:
    """The activations of a block with those of its LoRA adapters."""
    lora, size = compute.finetune.lora, compute.element_bytes
    if lora is None or kind not in model.layer_kinds:
        return block
    more = products = 0  # bytes that the backward pass needs, and elements of the outputs of matrices
    for name, shape in _adapters_of(model, kind, lora).items():
        if name.endswith(".lora_a"):
            width = local_size(name, shape, layout.tp) // lora.rank
            mask = 1 if compute.device == "cuda" else size
            # Dropout keeps its output in place of its input, unless the input is kept for another module as well.
            twice = size if row_of(name).module in TWICE else 0
            more += tokens * (lora.rank * size + (width * (mask + twice) if lora.dropout else 0))
            products += tokens * lora.rank
        else:
            products += tokens * local_size(name, shape, layout.tp) // lora.rank
    kept = {"none": more, "selective": products * size, "full": 0}[layout.recompute]
    return Activations(block.whole + more, block.kept + kept, block.again + more - kept)


@lru_cache
def _adapters_of(model: ModelConfig, kind: LayerKind, lora: LoraConfig) -> Shapes:
    """Names and shapes of the adapters of the first block of a kind."""
    first = model.layer_kinds.index(kind)
    return {name: shape for name, shape in adapter_shapes(model, lora).items() if block_of(name) == first}


def _norm_inputs(model: ModelConfig, number: int, stream: int, compute: Compute) -> int:
    """Bytes that norms keep of their inputs: the input itself, or two fp32 tensors where a norm is not fused.

    The second of them is for the gradient of the norm's weight.
    """
    single_operations = model.norm == "scalenorm" or (model.norm == "rmsnorm" and compute.device == "cpu")
    wide = 8 if "norm1" in _inputs_kept(model, compute.finetune) else 4
    return number * stream * (wide if single_operations else compute.element_bytes)


@dataclass(frozen=True)
class Rank:
    """Any rank of one pipeline stage: its tensor-, context- and data-parallel ranks all have the same sizes."""

    model: ModelConfig
    layout: Layout
    stage: Stage
    length: int
    compute: Compute
    again: frozenset[int] = frozenset()  # where layout.recompute is "auto", the blocks that are computed again

    @cached_property
    def tokens(self) -> int:
        """Tokens of one micro-batch on this rank."""
        return self.compute.sides * self.layout.micro_batch * self.length // self.layout.cp

    @cached_property
    def stream(self) -> int:
        """Bytes of one [tokens, hidden] tensor in the compute dtype."""
        return self.tokens * self.model.hidden_size * self.compute.element_bytes

    @cached_property
    def sizes(self) -> Counter[str]:
        """Elements by tensor on one tensor- and expert-parallel rank, with all blocks under "blocks"."""
        return _local_sizes(self.model, self.layout.tp, self.layout.expert, self.compute.finetune)

    @cached_property
    def training(self) -> Counter[str]:
        """`sizes`, of the tensors that train."""
        return _local_sizes(self.model, self.layout.tp, self.layout.expert, self.compute.finetune, True)

    @cached_property
    def unsplit(self) -> int:
        """Expert-parallel ranks beside those over which `shards` divides: ZeRO shards experts over the ranks that are
        left, so that each holds as small a part of them as of all other tensors."""
        return max(1, self.layout.expert // (self.shards * self.layout.cp if self.layout.zero else 1))

    @property
    def block(self) -> int:
        """Parameters of one block, before they are sharded over data-parallel ranks."""
        return self.sizes["blocks"] // self.model.num_layers

    @property
    def float8_block(self) -> int:
        """Of the parameters of one block those that multiply in float8."""
        matrices = float8_matrices(self.model, self.layout.tp)[0].values() if self.compute.float8 else ()
        return sum(map(prod, matrices)) // self.model.num_layers

    @property
    def trained_block(self) -> int:
        """Parameters of one block that train."""
        return self.training["blocks"] // self.model.num_layers

    @cached_property
    def live(self) -> int:
        """Blocks that the backward pass goes through: from the lowest one with a tensor that trains upwards."""
        return -(-self.stage.layers * _live(self.model, self.compute.finetune) // self.model.num_layers)

    @property
    def vocabulary(self) -> int:
        """Elements of the embedding matrix."""
        return self.sizes["embed.weight"]

    @cached_property
    def live_blocks(self) -> tuple[int, ...]:
        """The numbers of the blocks that the backward pass goes through, lowest first."""
        numbers = blocks_of_rank(self.model, self.layout, self.length, self.stage.index)
        return numbers[len(numbers) - self.live :]

    @cached_property
    def one(self) -> Activations:
        """Activations of one block for one micro-batch, on average over the model."""
        kinds = block_kinds(self.model)
        known = {kind: self.of_kind(kind, bool(self.again)) for kind in set(kinds)}
        return _mean([known[kind] for kind in kinds]) if len(known) > 1 else known[kinds[0]]

    @cached_property
    def each(self) -> tuple[Activations, ...]:
        """Activations of each of the live blocks for one micro-batch."""
        kinds = block_kinds(self.model)
        return tuple(self.of_kind(kinds[number], number in self.again) for number in self.live_blocks)

    def of_kind(self, kind: BlockKind, again: bool) -> Activations:
        """Activations of a block for one micro-batch; where recompute=auto, of one that is computed `again` or not."""
        if (kind, again) not in self._of_kinds:
            layout = self._with_policy(again)
            found = block_activations(self.model, kind, layout, self.tokens, self.length, self.compute)
            self._of_kinds[kind, again] = found
        return self._of_kinds[kind, again]

    @cached_property
    def _of_kinds(self) -> dict[tuple[BlockKind, bool], Activations]:
        """What `of_kind` has found out."""
        return {}

    def _with_policy(self, again: bool) -> Layout:
        """The layout with "full" or "none" in place of "auto"."""
        if self.layout.recompute != "auto":
            return self.layout
        return replace(self.layout, recompute="full" if again else "none")

    @cached_property
    def attending(self) -> Attending:
        """The attention kernel and its memory."""
        return attending(self.model, self._with_policy(bool(self.again)), self.tokens, self.length, self.compute)

    @property
    def head_name(self) -> str:
        """The module that the head's matrix belongs to."""
        return "reward" if self.model.reward_head else "embed" if self.model.tie_embeddings else "head"

    @property
    def head(self) -> int:
        """Elements of the head's matrix."""
        return self.sizes[f"{self.head_name}.weight"]

    @cached_property
    def parameters(self) -> int:
        """Parameters of the stage, before sharding; a tied embedding is on the first and on the last stage."""
        return self._on_stage(self.sizes)

    @cached_property
    def trained(self) -> int:
        """Parameters of the stage that train, before sharding."""
        return self._on_stage(self._state(True))

    def _state(self, trained: bool) -> Counter[str]:
        return _local_sizes(self.model, self.layout.tp, self.unsplit, self.compute.finetune, trained)

    @cached_property
    def reference(self) -> int:
        """Parameters of the frozen reference model's stage; 0 without one."""
        plain = _local_sizes(self.model, self.layout.tp, self.unsplit, EVERYTHING)
        return self._on_stage(plain) if self.compute.reference else 0

    def _on_stage(self, sizes: Counter[str]) -> int:
        outside = sum(
            size
            for name, size in sizes.items()
            if name != "blocks" and (self.stage.first if block_of(name) < 0 else self.stage.last)
        )
        if self.stage.last and not self.stage.first and self.head_name == "embed":
            outside += sizes["embed.weight"]
        return self.stage.layers * sizes["blocks"] // self.model.num_layers + outside

    @cached_property
    def masters(self) -> int:
        """Bytes of the fp32 parameters, and of a reference model's in the compute dtype, before sharding."""
        wide = (4 - self.compute.element_bytes) * self.stage.layers * self._wide if self.compute.reference else 0
        return 4 * self._on_stage(self._state(False)) + self.compute.element_bytes * self.reference + wide

    @cached_property
    def moments(self) -> int:
        """Bytes of optimizer state, before sharding."""
        blocks, kept = self.stage.layers * self._state(True)["blocks"] // self.model.num_layers, self.compute.moments
        return 4 * (kept.blocks * blocks + kept.outside * (self.trained - blocks))

    @property
    def shards(self) -> int:
        """Data-parallel ranks that parameters or optimizer state are sharded over."""
        return self.layout.dp // self.layout.dp_replicate if self.layout.zero else 1

    def memory(self) -> Memory:
        """The memory at the moment of a step when it is largest."""
        moments = [self._at_loss(), self.at_end()]
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
        """In the forward pass of a block that is not trained, of which nothing is kept."""
        inner = int(self.tokens * _inner_width(self.model)) // self.layout.tp * self.compute.element_bytes
        return self._memory(
            gradients=self._gradients(done=0),
            copies=self._copies(0, head=False),
            activations=(3 if self.model.gated_mlp else 2) * inner + 3 * self.stream + self.attending.bias,
        )

    def _entering_blocks(self) -> Memory:
        return self._memory(
            gradients=self._gradients(done=0) + self._head_gradient,
            copies=self._copies(max(1, self._cast_blocks), head=False),
            activations=self._most_in_blocks,
        )

    def _in_first_block(self) -> Memory:
        above = self.trained - self.trained_block - (self.training["embed.weight"] if self.stage.first else 0)
        return self._memory(
            gradients=self._gradients(done=above),
            copies=self._copies(1, head=False),
            activations=self.each[0].whole
            + self.attending.bias
            + self._backward_work(self.model.layer_kinds[self.live_blocks[0]]),
        )

    def at_end(self) -> Memory:
        """The memory when all gradients exist: quickly worked out, and `memory` is no less."""
        # A tied embedding's own gradient exists in full before it is added to the head's.
        tied = 4 * self.training["embed.weight"] if self.model.tie_embeddings and self.stage.first else 0
        return self._memory(
            gradients=self._gradients(done=self.trained) + tied,
            copies=self._copies(0, head=False),
            activations=2 * self.stream,
        )

    def _memory(self, *, gradients: int, copies: int, activations: int, logits: int = 0) -> Memory:
        if self.layout.offload:  # state is on the host; a block's gradient is computed here and moved there
            return Memory(
                0, 0, 4 * max(self.trained_block, self._head_gradient // 4), copies, activations, logits, self._buffers
            )
        masters, moments = self.masters // self.shards, self.moments // self.shards
        return Memory(masters, moments, gradients, copies, activations, logits, self._buffers)

    @property
    def _kept(self) -> int:
        held = in_flight(self.layout, self.stage.index)
        blocks = int(held * sum(block.kept for block in self.each))
        return blocks + ceil(held) * self.attending.bias * self.layout.stages_per_rank

    @property
    def _most_in_blocks(self) -> int:
        """The most that exists in the backward pass of a block, when those above it are done."""
        kept, most, layers = self._kept, 0, self.model.layer_kinds
        work = {kind: self._backward_work(kind) for kind in set(layers)}
        for number, block in zip(reversed(self.live_blocks), reversed(self.each), strict=True):
            most = max(most, kept + block.again + work[layers[number]])
            kept -= block.kept
        return most

    def _backward_work(self, kind: LayerKind) -> int:
        """Gradients of the MLP's inner width and of the hidden state in the backward pass of a block."""
        inner = int(self.tokens * _inner_width(self.model)) // self.layout.tp * self.compute.element_bytes
        still_needed = 2 if self.model.activation in _KEEPS_OUTPUT and not self.model.gated_mlp else 1
        reads = _inputs_kept(self.model, self.compute.finetune)
        # The gradient of an adapter's scaled output.
        scaled = inner if self.compute.finetune.lora and "mlp.up" in reads else 0
        mlp = still_needed * inner + scaled + 2 * self.stream
        if kind == "mamba":  # decays, states, their gradients and a product of those, for a chunk
            wide = self.tokens * self.model.mamba_width // self.layout.tp
            mlp += 4 * 4 * min(wide * self.model.mamba_sizes.states, CHUNK_VALUES[self.compute.device])
            mlp += 4 * (3 + self.compute.casts) * wide  # gradients of y, x and steps
        if kind == "rwkv":  # what each token of a group has of each, for a chunk, and gradients
            heads = self.model.hidden_size // self.layout.tp  # what belongs to heads of this rank
            chunk = scan_chunk(self.compute.device, self.tokens // self.length * heads)
            groups = min(chunk, self.length) * self.tokens // self.length * heads
            scan = SCAN_COPIES * 4 * groups * SCAN_TOKENS
            scan += 4 * 5 * self.tokens * heads  # of r, k, v, decays and the output
            # What the channel mix kept is free by then.
            kept = _channel_values(self.model, self.tokens, self.layout.tp)
            mlp += max(0, scan - kept * self.compute.element_bytes)
        mlp += self._float8_work
        return max(mlp, 4 * self.attending.scores + 2 * self.stream)  # the two exist one after the other

    @property
    def _float8_work(self) -> int:
        """What a float8 product's backward pass makes of its gradient, its input and its weight."""
        matrices = float8_matrices(self.model, self.layout.tp)[0].values() if self.compute.float8 else ()
        return max((3 * self.tokens * rows + 2 * self.tokens * columns for rows, columns in matrices), default=0)

    @property
    def _head_gradient(self) -> int:
        if not self.stage.last:
            return 0
        if "head.lora_a" in self.training:  # the head merged with its adapter, and the gradient of that
            return 8 * self.head
        return 4 * self.training[f"{self.head_name}.weight"]

    def _gradients(self, done: int) -> int:
        """Bytes of fp32 gradients when the backward pass has computed those of `done` parameters.

        With gradient accumulation, those of all parameters exist from the second micro-batch on.
        """
        if self.layout.accumulation > 1:
            done = self.trained
        once = self.layout.zero == 1 or self.layout.pp > 1  # gradients stay whole until the end of a step
        if self.layout.zero == 0 or (once and self.layout.accumulation > 1):
            return 4 * done
        # The gradients of a block, their copy in the layout of reduce-scatter, and on CPUs gloo's copy of that.
        at_once = 1 if self.shards == 1 else 3 if self.compute.device == "cpu" else 2
        return 4 * done // self.shards + 4 * at_once * self.trained_block

    @property
    def _cast_blocks(self) -> int:
        kept = self.live - len(self.again) if self.layout.recompute == "auto" else self.live
        return 0 if self.layout.recompute in ("selective", "full") else kept

    def _copies(self, blocks: int, head: bool) -> int:
        """Bytes of weights in the compute dtype, while `blocks` blocks and perhaps the head hold theirs."""
        # Several ranks gather their shards into a copy, even where a shard is the whole parameter.
        size, elsewhere = self.compute.element_bytes, self.layout.gpus > 1 or self.layout.offload
        gathered = size * self.block + (4 - size) * self._wide
        if self.layout.zero < 3 and elsewhere:  # all parameters are gathered for the whole step
            return size * self.parameters + (4 - size) * self.stage.layers * self._wide
        if self.layout.zero == 3 and elsewhere:  # the block being computed and the one being prefetched
            return 2 * gathered + (size * self.head if head else 0)
        cast = self.block - self._wide - self.float8_block  # float8 copies are made anew for each product
        return size * (blocks * cast + (self.head if head else 0)) if self.compute.casts else 0

    @cached_property
    def _wide(self) -> int:
        """Elements of a block that stay fp32, on average."""
        return _wide_values(self.model, self.layout.tp) // self.model.num_layers

    def _loss_work(self) -> int:
        """Bytes of working memory for one chunk of logits, [rows, vocabulary on this rank]."""
        if self.model.reward_head:
            return 0
        vocabulary, size = self.model.padded_vocab_size // self.layout.tp, self.compute.element_bytes
        limit = CHUNK_BYTES[self.compute.device]
        if self.compute.objective != "causal":  # a loss for each token: the backward pass computes logits again
            elements = min(self.tokens, max(1, limit // (4 * vocabulary))) * vocabulary
            again = (4 + (size if self.compute.casts else 0)) * elements
            return max(8 * elements - self._head_gradient, again)  # before the head's gradient exists, and after
        if self.layout.tp > 1:  # whole chunks in fp32
            rows = min(self.tokens, max(1, limit // (4 * vocabulary)))
            if not self.compute.casts:
                return 8 * rows * vocabulary
            softmax = (size + (8 if self.compute.device == "cpu" else 4)) * rows * vocabulary
            return max(softmax, (4 + size) * rows * vocabulary + size * self.vocabulary)
        rows = min(self.tokens, max(1, limit // (size * vocabulary)))
        block = min(rows, max(1, BLOCK_BYTES[self.compute.device] // (4 * vocabulary)))
        softmax = 0 if self.compute.device == "cpu" else 4  # a CPU's overwrites the logits
        return (size * rows + (softmax + (4 if self.compute.casts else 0)) * block) * vocabulary

    @property
    def _buffers(self) -> int:
        """Bytes of tokens, labels and rotary tables."""
        rotary = self.model.rotary_size if self.model.position == "rotary" else 0
        # On a CPU micro-batches are views of the batch.
        micro_batches = self.layout.accumulation if self.compute.device == "cuda" else 1
        return 16 * self.tokens * micro_batches + self.length * rotary * (8 + self.compute.element_bytes)


@lru_cache
def _local_sizes(
    model: ModelConfig, tp: int, expert: int, finetune: FinetuneConfig, trained: bool = False
) -> Counter[str]:
    """Elements on one tensor- and expert-parallel rank of all blocks, as "blocks", and of each other tensor."""
    sizes: Counter[str] = Counter()
    for name, shape in all_shapes(model, finetune).items():
        if not trained or finetune.trains(name):
            size = local_size(name, shape, tp) // (expert if row_of(name).kind == "experts" else 1)
            sizes["blocks" if name.startswith("blocks.") else name] += size
    return sizes


@lru_cache
def _wide_values(model: ModelConfig, tp: int) -> int:
    """Elements on one tensor-parallel rank of what stays fp32 in all blocks."""
    shapes = all_shapes(model, EVERYTHING)
    return sum(local_size(name, shape, tp) for name, shape in shapes.items() if row_of(name).stays_fp32)


@lru_cache
def _live(model: ModelConfig, finetune: FinetuneConfig) -> int:
    """Blocks that gradients flow through."""
    trained = [name for name in all_shapes(model, finetune) if finetune.trains(name)]
    lowest = min(map(block_of, trained), default=model.num_layers)
    return max(0, model.num_layers - max(0, lowest))


def memory_by_stage(model: ModelConfig, layout: Layout, length: int, compute: Compute) -> list[Memory]:
    """The memory of a rank of each pipeline stage."""
    return [Rank(model, layout, stage, length, compute).memory() for stage in rank_parts(model, layout, length)]


def checkpoint_bytes(parameters: int, moments: int, neox: int, fp32: bool) -> dict[str, int]:
    """Bytes of our checkpoints and of GPT-NeoX's, without and with optimizer state.

    Ours hold fp32 weights, which are the master weights, and `moments` values. GPT-NeoX's hold `neox` weights,
    summed over its ranks, in the compute dtype, fp32 master weights unless `fp32`, and two moments of each.
    """
    slim, full = (4, 12) if fp32 else (2, 14)
    return {
        "weights": 4 * parameters,
        "full": 4 * (parameters + moments),
        "neox_slim": slim * neox,
        "neox_full": full * neox,
    }
