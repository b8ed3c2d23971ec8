"""What serving a model takes, by arithmetic: weights, what a step works with, and keys and values of the texts."""

from __future__ import annotations

from dataclasses import dataclass

from castalia.config.schema import ModelConfig
from castalia.config.tensor_table import block_of, local_size, row_of, tensor_shapes
from castalia.plan.flops import kv_cache_bytes, state_bytes
from castalia.plan.layout import Layout, rank_parts
from castalia.plan.stream_plan import LOGITS_BYTES, PROGRAM_BYTES, block_working_bytes

ROWS = 64  # texts that are written at a time
CHUNK_TOKENS = 128  # of a prompt, between two steps of the texts that are being written
STEP_TOKENS = 512  # of all prompts, between two steps
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


def serving_plan(
    model: ModelConfig, element_bytes: int, memory: int, layout: Layout | None = None
) -> ServingPlan | None:
    """The plan for so many bytes of memory; None where not even one text of full length has room beside the weights.

    `layout`: of a model that is split over processes; the plan is then that of the process which holds most.
    """
    layout = layout or Layout()
    vocab, (weights, layers) = model.padded_vocab_size, _held(model, layout, element_bytes)
    if model.tie_embeddings and layout.gpus == 1:  # a copy of the head in the order that multiplies fastest
        weights += vocab * model.hidden_size * element_bytes
    tokens = max(ROWS, CHUNK_TOKENS)
    working = block_working_bytes(model, tokens, element_bytes) + tokens * vocab * LOGITS_BYTES
    # Where only some blocks have attention, one rank may have all of those.
    part = model.num_layers if model.other_kinds else layers
    kv_each = kv_cache_bytes(model, element_bytes) * part // model.num_layers // layout.tp
    length = model.max_positions or UNKNOWN_LENGTH
    state_each = state_bytes(model, element_bytes, layout.tp)
    least = (length * kv_each + state_each) * PREFIX_SHARE // (PREFIX_SHARE - 1) + PREFIX_SHARE
    left = memory - PROGRAM_BYTES - weights - working
    if left < least:
        return None
    budget = max(least, min(ROWS * least, left // KV_SHARE))
    return ServingPlan(weights, working, kv_each, budget, length, state_each)


def _held(model: ModelConfig, layout: Layout, element_bytes: int) -> tuple[int, int]:
    """Bytes of the parameters of the rank that holds most, and the blocks of the rank with most of them."""
    sizes = {
        name: local_size(name, shape, layout.tp) * row_of(name).held_bytes(element_bytes)
        for name, shape in tensor_shapes(model).items()
    }
    weights = layers = begin = 0
    for stage in rank_parts(model, layout, model.max_positions or 1):
        own = {str(number) for number in range(begin, begin + stage.layers)}
        begin += stage.layers
        held = 0
        for name, size in sizes.items():
            first, _, rest = name.partition(".")
            if first == "blocks":
                held += size * (rest.partition(".")[0] in own)
            elif block_of(name) < 0:
                is_head = name == "embed.weight" and model.tie_embeddings
                held += size * (stage.first or (is_head and stage.last))
            else:
                held += size * stage.last
        weights, layers = max(weights, held), max(layers, stage.layers)
    return weights, layers
