"""Floating-point operations per token, and the figure that GPT-NeoX prints for the same model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from math import prod

from castalia.config.float8_matrices import float8_matrices
from castalia.config.schema import LayerKind, ModelConfig
from castalia.plan.count import active_size


def mean_context(length: int, window: int | None = None) -> float:
    """Keys that a query attends to on average in a causal sequence. `window`: tokens before the query's own."""
    if window is None or window >= length:
        return (length + 1) / 2
    seen = window + 1
    return (seen * (seen + 1) / 2 + (length - seen) * seen) / length


def block_flops(model: ModelConfig, length: int, kind: LayerKind) -> float:
    """Forward operations of one block of this kind for one token of a sequence of `length` tokens."""
    if kind in ("gmlp", "amlp"):  # every row of the spatial matrix serves one token, up to which it is used
        spatial = (model.max_positions or 0) * ((model.max_positions or 0) + 1)
        small = 4 * model.amlp_size * mean_context(length) if kind == "amlp" else 0
        mixed = 2 * 4 * model.hidden_size * mean_context(length)
        return 2 * (active_size(model, kind) - spatial) + mixed + small
    if kind == "mamba":  # exp, four products and two sums for each value that a channel remembers
        return 2 * active_size(model, kind) + 7 * model.mamba_width * model.mamba_sizes.states
    if kind == "rwkv":  # the state of each head: it fades, takes in a product, is read; with the token's own
        return 2 * active_size(model, kind) + 7 * model.hidden_size * model.head_size
    share = model.windowed_share  # an average, as blocks of one kind may differ in it
    context = share * mean_context(length, model.sliding_window) + (1 - share) * mean_context(length)
    return 2 * active_size(model, kind) + 4 * model.num_heads * model.head_size * context


def blocks_flops(model: ModelConfig, length: int) -> float:
    """Forward operations of all blocks for one token of a sequence of `length` tokens."""
    return sum(number * block_flops(model, length, kind) for kind, number in Counter(model.layer_kinds).items())


def float8_flops(model: ModelConfig) -> float:
    """Forward operations of one token in the matrices that `precision.compute=fp8` multiplies in float8."""
    return 2 * sum(map(prod, float8_matrices(model, tp=1)[0].values()))


def head_flops(model: ModelConfig) -> float:
    """Forward operations of the output head for one token."""
    return 2 * model.padded_vocab_size * model.hidden_size


def forward_flops(model: ModelConfig, length: int) -> float:
    """Forward operations of one token: 2N + causal attention, where N excludes input embedding and positions."""
    return blocks_flops(model, length) + head_flops(model)


def training_flops(model: ModelConfig, length: int) -> float:
    """Operations of forward and backward pass for one token, without recomputation: the basis of MFU."""
    return 3 * forward_flops(model, length)


def peak_tokens_per_second(model: ModelConfig, length: int, devices: int, flops: float) -> float:
    """Tokens per second of a run whose devices all compute at their peak of `flops`: MFU is a share of this.

    Only the model's own operations count, each once, not what is recomputed (Chowdhery et al. 2022, appendix B).
    """
    return devices * flops / training_flops(model, length)


def executed_flops(model: ModelConfig, length: int, recompute: str, again: Collection[int] = ()) -> float:
    """Operations performed for one token: full activation checkpointing runs the blocks' forward pass twice.

    `again`: with "auto", the blocks that it does so for.
    """
    if recompute == "full":
        return training_flops(model, length) + blocks_flops(model, length)
    kinds = Counter(model.layer_kinds[number] for number in again)
    return training_flops(model, length) + sum(n * block_flops(model, length, kind) for kind, n in kinds.items())


def neox_flops(model: ModelConfig, length: int, recompute: bool = False) -> float:
    """GPT-NeoX's figure per token, which ignores grouped-query attention, MLP width and causality.

    The formula is that of Narayanan et al. (2104.04473), as in `megatron/logging.py`. It has another one for models
    with a mamba or an rwkv layer, whose layers all count as such.
    """
    layers, hidden, vocab = model.num_layers, model.hidden_size, model.padded_vocab_size
    passes = 4 if recompute else 3
    if "mamba" in model.layer_kinds:
        width, states = model.mamba_width, model.mamba_sizes.states
        layer = width * (11 * states + 4 * model.mamba_rank + 1) + 6 * width * hidden + 8 * width
        return passes * (layers * layer + 2 * hidden * vocab)
    if "rwkv" in model.layer_kinds:
        rwkv = hidden**2 * (78 + 18 / model.num_heads) + 84 * hidden
        return layers * rwkv + 16 * hidden + 12 * hidden * vocab
    return 24 * passes * layers * hidden**2 * (1 + length / (6 * hidden) + vocab / (16 * layers * hidden))


def kv_cache_bytes(model: ModelConfig, element_bytes: int = 2) -> int:
    """Bytes that generation keeps of each token: keys and values, in gmlp and amlp blocks halves of gates."""
    gates, kinds = 4 * model.hidden_size, model.layer_kinds
    kept = kinds.count("gmlp") * gates + kinds.count("amlp") * (gates + 2 * model.amlp_size)
    return (2 * model.attention_layers * model.kv_heads * model.head_size + kept) * element_bytes


def state_bytes(model: ModelConfig, element_bytes: int = 2, tp: int = 1) -> int:
    """Bytes that generation keeps of each text on one of `tp` tensor ranks, however long the text is."""
    kinds = model.layer_kinds
    gated = kinds.count("gmlp") + kinds.count("amlp")
    sizes, width = model.mamba_sizes, model.mamba_width // tp
    mamba = width * ((sizes.taps - 1) * element_bytes + 4 * sizes.states)  # the last inputs, and fp32 states
    # The last outputs of norms, and the state of each head.
    rwkv = 2 * model.hidden_size * element_bytes + 4 * model.hidden_size * model.head_size // tp
    # The number of a text's tokens is kept by the first of these kinds.
    return 8 * gated + kinds.count("mamba") * mamba + kinds.count("rwkv") * rwkv
