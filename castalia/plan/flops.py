"""Floating-point operations of a token, and what GPT-NeoX would print for the same model."""

from __future__ import annotations

from castalia.config.schema import ModelConfig
from castalia.plan.count import block_size


def mean_context(length: int, window: int | None = None) -> float:
    """Keys that a query sees on average in a causal sequence; a window counts the tokens before itself."""
    if window is None or window >= length:
        return (length + 1) / 2
    seen = window + 1
    return (seen * (seen + 1) / 2 + (length - seen) * seen) / length


def block_flops(model: ModelConfig, length: int) -> float:
    """Forward operations of one block for one token of a sequence of `length` tokens."""
    attention = 4 * model.num_heads * model.head_size * mean_context(length, model.sliding_window)
    return 2 * block_size(model) + attention


def head_flops(model: ModelConfig) -> float:
    """Forward operations of the output head for one token."""
    return 2 * model.padded_vocab_size * model.hidden_size


def forward_flops(model: ModelConfig, length: int) -> float:
    """2N + causal attention, N without the input embedding and positions."""
    return model.num_layers * block_flops(model, length) + head_flops(model)


def training_flops(model: ModelConfig, length: int) -> float:
    """Operations of one token's forward and backward pass, recomputation not counted: what MFU divides by."""
    return 3 * forward_flops(model, length)


def executed_flops(model: ModelConfig, length: int, recompute: str) -> float:
    """Operations really done for one token: full recomputation runs the blocks' forward pass twice."""
    again = model.num_layers * block_flops(model, length) if recompute == "full" else 0.0
    return training_flops(model, length) + again


def original_flops(model: ModelConfig, length: int, recompute: bool = False) -> float:
    """GPT-NeoX's own figure for a token. It knows neither grouped-query attention nor MLP widths nor causality."""
    layers, hidden, vocab = model.num_layers, model.hidden_size, model.padded_vocab_size
    passes = 4 if recompute else 3
    return 24 * passes * layers * hidden**2 * (1 + length / (6 * hidden) + vocab / (16 * layers * hidden))


def kv_cache_bytes(model: ModelConfig, element_bytes: int = 2) -> int:
    """Bytes of the key/value cache for each token."""
    return 2 * model.num_layers * model.kv_heads * model.head_size * element_bytes
