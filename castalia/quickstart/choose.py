"""The choice of a model and its training for a text, a machine and a time: pure functions of a few numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from castalia.config.schema import ModelConfig
from castalia.errors import DataError
from castalia.plan.count import count, non_embedding
from castalia.plan.flops import training_flops
from castalia.plan.layout import Layout
from castalia.plan.memory import Compute, memory_by_stage
from castalia.quickstart.family import SIZES, model_of
from castalia.quickstart.measured import (
    BASE_BATCH_TOKENS,
    BASE_LAYERS,
    BASE_RATE,
    BYTES_PER_TOKEN,
    expected_bits_per_byte,
)

MAX_PASSES = 10  # over the text: from then on a model learns it by heart
MOST_PARAMETERS = 2  # in the blocks, for each token of the text
TOKENS_PER_PARAMETER = 20  # where a size is asked for instead of a time: Hoffmann et al. 2022
LEAST_BYTES = 20_000
TRAINING_SHARE = 0.85  # of the time that is left; the rest is for evaluation, saving, and for being wrong
MEMORY_SHARE = 0.6  # of what is free
LEAST_STEPS = 20


class Pace(NamedTuple):
    """How fast a machine trains: seconds for a token are seconds_per_token + operations / flops."""

    seconds_per_token: float
    flops: float

    def tokens_per_second(self, model: ModelConfig, length: int) -> float:
        """The speed of training, from a fixed cost for each token and the rate of its operations."""
        return 1 / (self.seconds_per_token + training_flops(model, length) / self.flops)


@dataclass(frozen=True)
class Choice:
    """A model and its training. `tokens` are those of all passes, `seconds` those of training alone."""

    layers: int
    width: int
    vocab_size: int
    length: int
    batch_size: int
    micro_batch_size: int
    rate: float
    tokens: int
    passes: float
    parameters: int  # all of them
    tokens_per_second: float
    bits_per_byte: float  # expected, of held-out text
    limit: str  # what keeps it from being longer: "time", "text" or "size"

    @property
    def seconds(self) -> float:
        """Of training alone."""
        return self.tokens / self.tokens_per_second

    @property
    def steps(self) -> int:
        """Updates that the tokens allow, at least LEAST_STEPS."""
        return max(LEAST_STEPS, round(self.tokens / (self.batch_size * self.length)))


def choose(
    text_bytes: int,
    pace: Pace,
    memory_bytes: int,
    *,
    seconds: float | None = None,
    size: float | None = None,
    xz_bits_per_byte: float = 2.0,
    device: str = "cpu",
    precision: str = "bf16",
) -> Choice:
    """The size with the lowest expected loss of those that fit memory, text and `seconds`; or the one nearest `size`.

    Either `seconds` of training or `size`, parameters of the whole model, is given. Raises DataError for too
    little text.
    """
    if text_bytes < LEAST_BYTES:
        raise DataError(f"{text_bytes:,} bytes of text are too little to learn from; give at least {LEAST_BYTES:,}")
    candidates = [
        made
        for layers, width in SIZES
        if (made := _made(layers, width, text_bytes, pace, memory_bytes, seconds, xz_bits_per_byte, device, precision))
    ]
    if not candidates:
        need = "the smallest model of the family does not fit into its memory"
        raise DataError(f"this machine has {memory_bytes / 2**30:.1f} GiB free: {need}; free some")
    if size is not None:
        return min(candidates, key=lambda made: abs(math.log(made.parameters / size)))  # by ratio
    tokens = text_bytes / _bytes_per_token(candidates[0].vocab_size)
    small = [made for made in candidates if _blocks(made) <= MOST_PARAMETERS * tokens]
    return min(small or candidates[:1], key=lambda made: made.bits_per_byte)  # where the text bears none: the smallest


def _made(
    layers: int,
    width: int,
    text_bytes: int,
    pace: Pace,
    memory_bytes: int,
    seconds: float | None,
    xz_bits_per_byte: float,
    device: str,
    precision: str,
) -> Choice | None:
    """A size with the training that suits it; None where it does not fit into memory."""
    vocab_size = vocabulary(text_bytes, width)
    length = sequence_length(width)
    model = model_of(layers, width, vocab_size, length)
    speed = pace.tokens_per_second(model, length)
    unique = text_bytes / _bytes_per_token(vocab_size)
    wanted = non_embedding(model) * TOKENS_PER_PARAMETER if seconds is None else speed * seconds
    tokens = min(wanted, MAX_PASSES * unique)
    limit = "size" if seconds is None else "text" if wanted > tokens else "time"
    batch_tokens = max(batch_of(tokens), length)
    batch_size = batch_tokens // length
    micro = _micro_batch(model, batch_size, length, MEMORY_SHARE * memory_bytes, Compute(precision, device))
    if micro is None:
        return None
    passes = tokens / unique
    bits = expected_bits_per_byte(non_embedding(model), text_bytes, passes, xz_bits_per_byte)
    rate = rate_of(batch_tokens, layers)
    total = count(model).total
    return Choice(
        layers, width, vocab_size, length, batch_size, micro, rate, round(tokens), passes, total, speed, bits, limit
    )


def fitted_to(
    choice: Choice, tokens: float, tokens_per_second: float, train_tokens: int, text_bytes: int, xz_bits_per_byte: float
) -> Choice:
    """The same model for as many tokens as the measured speed allows: batch, rate and what to expect follow them."""
    batch_tokens = max(batch_of(tokens), choice.length)
    passes = tokens / train_tokens
    return replace(
        choice,
        tokens=round(tokens),
        tokens_per_second=tokens_per_second,
        batch_size=batch_tokens // choice.length,
        micro_batch_size=min(choice.micro_batch_size, batch_tokens // choice.length),
        rate=rate_of(batch_tokens, choice.layers),
        passes=passes,
        bits_per_byte=expected_bits_per_byte(_blocks(choice), text_bytes, passes, xz_bits_per_byte),
    )


def _blocks(made: Choice) -> int:
    return non_embedding(model_of(made.layers, made.width, made.vocab_size, made.length))


def vocabulary(text_bytes: int, width: int) -> int:
    """Entries: more for more text, which fills them, and no more than 16 for each dimension of the model, which would
    spend most of its time on them."""
    by_text = next((size for size in BYTES_PER_TOKEN if size**2 * 2 >= text_bytes), max(BYTES_PER_TOKEN))
    by_width = max(size for size in BYTES_PER_TOKEN if size <= max(1024, 16 * width))
    return min(by_text, by_width)


def _bytes_per_token(vocab_size: int) -> float:
    return BYTES_PER_TOKEN[vocab_size]


def sequence_length(width: int) -> int:
    """Tokens of a sequence for a model of this width."""
    return 256 if width <= 256 else 512 if width <= 640 else 1024


def batch_of(tokens: float) -> int:
    """Tokens of a batch, a power of two that grows with the root of all tokens: 2,048 for a million."""
    wanted = BASE_BATCH_TOKENS * math.sqrt(tokens / 1e6)
    return 2 ** min(19, max(9, round(math.log2(wanted))))


def rate_of(batch_tokens: int, layers: int) -> float:
    """The learning rate: larger batches are less noisy and bear larger steps, by the root of their size; of more layers
    each takes smaller ones, by the root of their number."""
    batch = min(2.0, max(0.5, math.sqrt(batch_tokens / BASE_BATCH_TOKENS)))
    return float(f"{BASE_RATE * batch * math.sqrt(BASE_LAYERS / layers):.2g}")


def _micro_batch(model: ModelConfig, batch_size: int, length: int, room: float, compute: Compute) -> int | None:
    """Sequences of one forward pass: as many as there is room for, a power of two."""
    micro = batch_size
    while micro and memory_by_stage(model, Layout(micro_batch=micro), length, compute)[0].total > room:
        micro //= 2
    return micro or None
