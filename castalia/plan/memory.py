"""Bytes on each rank while it trains: what autograd keeps, counted tensor by tensor from the model's own code.

Parameters are fp32 and are the masters. In 16-bit compute each linear map casts its weight where it is used, and autograd
keeps the cast until that block's backward pass. The head and the loss work through chunks of rows, so that fp32 logits
exist for one chunk only.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod

from castalia.config.schema import Model
from castalia.plan.count import block_shapes, local_size, tensor_shapes
from castalia.plan.layout import Layout, Stage, stages

LOGIT_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}  # of one chunk's fp32 logits
_KEEPS_OUTPUT = {"relu", "sigmoid", "identity"}  # their backward pass needs the output, which the next matrix keeps anyway


@dataclass(frozen=True)
class Memory:
    """Bytes at the moment of a step when their sum is largest."""

    masters: int
    moments: int
    gradients: int
    compute_copies: int
    activations: int
    logits: int
    buffers: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Compute:
    """What the memory of activations depends on besides model and layout."""

    element_bytes: int = 2  # of the compute dtype
    device: str = "cuda"  # or "cpu", whose RMSNorm is made of several operations

    @property
    def casts(self) -> bool:
        return self.element_bytes < 4


def block_activations(model: Model, layout: Layout, tokens: int, compute: Compute) -> int:
    """Bytes that one block keeps for its backward pass when nothing is recomputed."""
    size, tp = compute.element_bytes, layout.tp
    stream = tokens * model.hidden_size // (tp if layout.sequence_parallel else 1)  # one [tokens, hidden]
    heads, kv = (n * model.head_size * tokens // tp for n in (model.num_heads, model.kv_heads))
    inner = model.mlp_width * tokens // tp

    num_norms = 1 if model.shared_norm else 2
    num_inputs = 1 if model.parallel_residual else num_norms
    normed = num_norms * stream * size  # the norms' outputs, kept by the matrices that follow
    attention = heads + 2 * kv + heads  # q, k, v in one tensor; the output
    if model.position == "rotary":
        attention += heads + kv
    if model.qk_norm:
        attention += heads + kv
    if model.kv_heads < model.num_heads:
        attention += heads  # queries gathered from their groups
    mlp = inner * (4 if model.gated_mlp else 1 if model.activation in _KEEPS_OUTPUT else 2)
    statistics = 4 * tokens * (2 * num_norms + model.num_heads // tp)  # of norms and softmax
    masks = 2 * stream if model.hidden_dropout else 0
    return _norm_inputs(model, num_inputs, stream, compute) + normed + (attention + mlp) * size + statistics + masks


def _norm_inputs(model: Model, number: int, stream: int, compute: Compute) -> int:
    """What norms keep of their inputs: the input, or where a norm is made of single operations two fp32 tensors."""
    single_operations = model.norm == "scalenorm" or (model.norm == "rmsnorm" and compute.device == "cpu")
    return number * stream * (8 if single_operations else compute.element_bytes)


def kept_activations(model: Model, layout: Layout, tokens: int, compute: Compute, layers: int) -> int:
    """Bytes that `layers` blocks keep between forward and backward of one micro-batch."""
    whole = block_activations(model, layout, tokens, compute)
    stream = tokens * model.hidden_size // (layout.tp if layout.sequence_parallel else 1) * compute.element_bytes
    if layout.recompute == "full":  # the blocks' inputs, and one block at a time in full
        return layers * stream + whole
    if layout.recompute == "selective":
        inner = model.mlp_width * tokens // layout.tp * compute.element_bytes * (4 if model.gated_mlp else 2)
        return layers * (whole - inner) + inner
    return layers * whole


def rank_memory(model: Model, layout: Layout, stage: Stage, length: int, compute: Compute | None = None) -> Memory:
    """Bytes of each category on a rank of this pipeline stage. Every tensor and data rank of a stage has the same."""
    compute = compute or Compute()
    tokens = layout.micro_batch * length // layout.cp
    size = compute.element_bytes
    vocab_matrix = model.padded_vocab_size * model.hidden_size // layout.tp
    block = sum(local_size(name, shape, layout.tp) for name, shape in block_shapes(model).items())
    parameters = stage_parameters(model, layout, stage)
    shards = layout.dp if layout.zero else 1
    stream = tokens * model.hidden_size * size

    in_flight = min(layout.accumulation, layout.pp - stage.index)
    kept = kept_activations(model, layout, tokens, compute, stage.layers) * in_flight
    head_work = head_kept = 0
    if stage.last:
        head_kept = 3 * stream  # the last norm's input and output, the gradient of its output
        head_work = _loss_bytes(vocab_matrix, model.padded_vocab_size // layout.tp, tokens, compute)
    # Of the first block backward: gradients of the inner width and of the stream, what they were made of already freed.
    backward_work = tokens * model.mlp_width // layout.tp * size + 2 * stream

    gradients = _gradient_bytes(layout, parameters, block, vocab_matrix if stage.last else 0, shards)
    copies = _copy_bytes(model, layout, parameters, block, vocab_matrix, stage, size) if compute.casts else 0
    buffers = _buffer_bytes(model, tokens, length, size)
    at_loss = Memory(
        masters=4 * parameters // shards,
        moments=8 * parameters // shards,
        gradients=gradients[0],
        compute_copies=copies,
        activations=kept + head_kept + (backward_work if head_work < backward_work else 0),
        logits=head_work if head_work >= backward_work else 0,
        buffers=buffers,
    )
    one_block = block_activations(model, layout, tokens, compute)
    tied_copy = 4 * vocab_matrix if model.tie_embeddings and stage.first else 0  # the embedding's own gradient, then added
    at_end = Memory(
        masters=at_loss.masters,
        moments=at_loss.moments,
        gradients=gradients[1] + tied_copy,
        compute_copies=min(copies, size * block) if layout.zero in (0, 3) else copies,
        activations=one_block + backward_work,
        logits=0,
        buffers=buffers,
    )
    return max(at_loss, at_end, key=lambda memory: memory.total)


def stage_parameters(model: Model, layout: Layout, stage: Stage) -> int:
    """Parameters on one tensor rank of a stage before any sharding over data ranks."""
    outside = {name: local_size(name, shape, layout.tp) for name, shape in tensor_shapes_outside(model).items()}
    block = sum(local_size(name, shape, layout.tp) for name, shape in block_shapes(model).items())
    total = stage.layers * block
    if stage.first:
        total += outside["embed.weight"] + outside.get("positions.weight", 0)
    if stage.last:
        total += sum(size for name, size in outside.items() if name.startswith(("norm.", "head.")))
        if model.tie_embeddings and not stage.first:
            total += outside["embed.weight"]
    return total


def tensor_shapes_outside(model: Model) -> dict[str, tuple[int, ...]]:
    """The tensors that belong to no block."""
    return tensor_shapes(model.model_copy(update={"num_layers": 0}))


def _gradient_bytes(layout: Layout, parameters: int, block: int, head: int, shards: int) -> tuple[int, int]:
    """fp32 gradients when the (last) loss is taken, and when the backward pass ends."""
    accumulates = layout.accumulation > 1
    if layout.zero == 0:
        return 4 * (parameters + head if accumulates else head), 4 * parameters
    if layout.zero == 1 and accumulates:  # summed in full, cut once for each step
        return 4 * (parameters + head), 4 * parameters
    kept = 4 * parameters // shards
    return (kept if accumulates else 0) + 4 * head, kept + 4 * block


def _copy_bytes(
    model: Model, layout: Layout, parameters: int, block: int, vocab_matrix: int, stage: Stage, size: int
) -> int:
    """Casts of weights that are alive when the loss is taken."""
    head = vocab_matrix if stage.last else 0
    if layout.zero in (1, 2):
        return size * parameters
    if layout.zero == 3:  # the block at work and the one fetched ahead
        return size * (2 * block + head)
    blocks = 1 if layout.recompute == "full" else stage.layers
    return size * (blocks * block + head)


def _loss_bytes(vocab_matrix: int, vocab: int, tokens: int, compute: Compute) -> int:
    """Working memory of one chunk of logits."""
    rows = min(tokens, max(1, LOGIT_CHUNK_BYTES[compute.device] // (4 * vocab)))
    if not compute.casts:
        return 8 * rows * vocab
    softmax = (compute.element_bytes + (8 if compute.device == "cpu" else 4)) * rows * vocab
    product = (4 + compute.element_bytes) * rows * vocab + compute.element_bytes * vocab_matrix
    return max(softmax, product)


def _buffer_bytes(model: Model, tokens: int, length: int, size: int) -> int:
    """Tokens, labels and rotary tables."""
    tables = 4 * length * 2 * model.rotary_size if model.position == "rotary" else 0
    return 16 * tokens + tables + length * model.rotary_size * size


def memory_by_stage(model: Model, layout: Layout, length: int, compute: Compute | None = None) -> list[Memory]:
    return [rank_memory(model, layout, stage, length, compute) for stage in stages(model, layout.pp, length)]


def checkpoint_bytes(parameters: int, original: int, fp32: bool) -> dict[str, int]:
    """Sizes of checkpoints: ours, and the original's from the sum of the parameters over its ranks.

    Ours: fp32 weights, which are the masters, and two moments. The original's: compute weights, fp32 masters where they
    differ from those, two moments.
    """
    weight, full = (4, 12) if fp32 else (2, 14)
    return {
        "weights": 4 * parameters,
        "full": 12 * parameters,
        "original_slim": weight * original,
        "original_full": full * original,
    }


def elements(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(map(prod, shapes.values()))
