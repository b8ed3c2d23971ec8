"""What serving a model takes, by arithmetic: weights, what a step works with, and keys and values of the texts."""

from __future__ import annotations

from dataclasses import dataclass

from castalia.config.schema import ModelConfig
from castalia.plan.count import count
from castalia.plan.flops import kv_cache_bytes, state_bytes
from castalia.plan.stream_plan import LOGITS_BYTES, PROGRAM_BYTES, block_working_bytes

ROWS = 64  # texts that are written at a time
CHUNK_TOKENS = 128  # of a prompt, between two steps of the texts that are being written
PREFIX_SHARE = 4  # one part in so many of the bytes for keys and values holds prefixes that several texts share
KV_SHARE = 4  # one part in so many of the memory that is left, so that several checkpoints have room
UNKNOWN_LENGTH = 4096  # tokens of a text, for models without a last position


@dataclass(frozen=True)
class ServingPlan:
    """Bytes of a model that is served, and the budget for the keys and values of its texts."""

    weights: int
    working: int
    kv_each: int  # of a token
    kv_budget: int  # of all texts and shared prefixes together
    length: int  # tokens of a text at most, with its prompt
    state_each: int = 0  # of a text: states of blocks without attention

    @property
    def longest(self) -> int:
        """Tokens of the longest text for which there is room."""
        room = self.row_budget - self.state_each
        return min(self.length, room // self.kv_each) if self.kv_each else self.length

    @property
    def total(self) -> int:
        """What the model takes of the memory."""
        return self.weights + self.working + self.kv_budget

    @property
    def prefix_budget(self) -> int:
        """The part of the budget that holds shared prefixes."""
        return self.kv_budget // PREFIX_SHARE

    @property
    def row_budget(self) -> int:
        """The part of the budget that holds the texts."""
        return self.kv_budget - self.prefix_budget


def serving_plan(model: ModelConfig, element_bytes: int, memory: int) -> ServingPlan | None:
    """The plan for so many bytes of memory; None where not even one text of full length has room beside the weights."""
    vocab = model.padded_vocab_size
    copied_head = vocab * model.hidden_size if model.tie_embeddings else 0  # in the order that multiplies fastest
    weights = (count(model).total + copied_head) * element_bytes
    tokens = max(ROWS, CHUNK_TOKENS)
    working = block_working_bytes(model, tokens, element_bytes) + tokens * vocab * LOGITS_BYTES
    kv_each, length = kv_cache_bytes(model, element_bytes), model.max_positions or UNKNOWN_LENGTH
    state_each = state_bytes(model, element_bytes)
    least = (length * kv_each + state_each) * PREFIX_SHARE // (PREFIX_SHARE - 1) + PREFIX_SHARE
    left = memory - PROGRAM_BYTES - weights - working
    if left < least:
        return None
    budget = max(least, min(ROWS * least, left // KV_SHARE))
    return ServingPlan(weights, working, kv_each, budget, length, state_each)
