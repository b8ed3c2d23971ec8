"""Batched generation: prompts are prefilled together, and the text of each row is streamed piece by piece.

prompts -> _prefill in chunks -> KV cache, last hidden states
                                   |
          +-> logits -> choose a token for each row -> TextStream -> TextPiece
          |                        |
          +---- model, one new token for each row <-- rows that are not done
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from math import inf, isfinite
from operator import index
from typing import TYPE_CHECKING, Literal, NamedTuple, Union

import torch
from torch import Tensor

from castalia.checkpoint.restore import require_finite
from castalia.errors import CheckpointError, ConfigError, DataError
from castalia.generate.kv_cache import KVCache, Prompts
from castalia.generate.sampling import Noise, choose
from castalia.generate.text_stream import TextStream, TextTokenizer
from castalia.model.transformer import Transformer
from castalia.plan.stream_plan import PREFILL_CHUNK_TOKENS
from castalia.storage.lazy import name_of
from castalia.streaming.streamed_model import streamed_stage

if TYPE_CHECKING:
    from castalia.parallel.inference import SplitModel

Prompt = str | Sequence[int]
AnyModel = Union[Transformer, "SplitModel"]  # a model on one device (a streamed one as well), or split over ranks


@dataclass(frozen=True)
class Sampling:
    """Settings of generation. Temperature 0 takes the likeliest token; top_k or top_p 0 means all tokens."""

    max_tokens: int = 64  # of each text
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    seed: int = 0
    stop: Sequence[str] = ()  # a text ends before the first of these strings, which may spell special tokens
    num_samples: int = 1  # texts for each prompt
    batch_size: int = 16  # texts that are generated at a time

    def __post_init__(self) -> None:
        """Raises ConfigError for a value out of its range."""
        ranges = {"max_tokens": (1, inf), "temperature": (0, inf), "top_k": (0, inf), "top_p": (0, 1)}
        ranges |= {"num_samples": (1, inf), "batch_size": (1, inf)}
        for name, (least, most) in ranges.items():
            if not least <= (value := getattr(self, name)) <= most:
                raise ConfigError(f"{name}={value}: expected {least} {'or more' if most == inf else f'to {most}'}")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))  # and not each of its letters
        if "" in self.stop:
            raise ConfigError("stop has an empty string, which would end every text before its first letter")


class TextPiece(NamedTuple):
    """The next piece of a row's text. Rows are numbered prompt by prompt, with the samples of a prompt in sequence."""

    row: int
    text: str
    finish_reason: Literal["stop", "length"] | None = None  # why this is the last piece; None: it is not

    @property
    def last(self) -> bool:
        """Whether the row's text is complete."""
        return self.finish_reason is not None


@dataclass
class GenerationRow:
    """A text that is being generated. The model sees `ids[start:]`."""

    number: int
    ids: list[int]
    text: TextStream
    start: int = 0
    count: int = 0  # generated tokens
    done: bool = False

    @property
    def length(self) -> int:
        """The number of tokens that the model sees."""
        return len(self.ids) - self.start

    def take(self, token: int, ends: Collection[int], max_tokens: int) -> TextPiece:
        """Add a token, and return the text that can be shown now."""
        self.count += 1
        text, ended = "", token in ends
        if not ended:
            self.ids.append(token)
            text = self.text.push(token)
            ended = self.text.stopped
        self.done = ended or self.count == max_tokens
        if not self.done:
            return TextPiece(self.number, text)
        return TextPiece(self.number, text + self.text.finish(), "stop" if ended else "length")


def generate(model: AnyModel, tokenizer: TextTokenizer, prompts: Sequence[Prompt], **sampling) -> list[str]:
    """The texts that follow the prompts, `num_samples` for each. Keywords are the fields of `Sampling`.

    Raises DataError as `stream` does.
    """
    options = Sampling(**sampling)
    texts = [""] * (len(prompts) * options.num_samples)
    for piece in stream(model, tokenizer, prompts, options):
        texts[piece.row] += piece.text
    return texts


@torch.inference_mode()
def stream(
    model: AnyModel, tokenizer: TextTokenizer, prompts: Sequence[Prompt], sampling: Sampling, alone: bool = False
) -> Iterator[TextPiece]:
    """Generate text after each prompt (text or token ids), and yield pieces as they come. The model is in eval mode.

    `alone`: the text is that of the new tokens by themselves, which some tokenizers begin without a space.

    An empty prompt begins a document. A row ends at a token that ends texts, before a stop string, or after
    `max_tokens`. Its text depends on the prompt, the seed and the number of the row, but not on the other rows. When a
    row outgrows the positions of the model, it continues with the last half of them in view. Raises DataError for a
    prompt that the model cannot take, CheckpointError if its logits are not finite.
    """
    rows: list[GenerationRow] = []
    for prompt in prompts:
        ids = checked_prompt(model, tokenizer, prompt)
        for _ in range(sampling.num_samples):
            rows.append(
                GenerationRow(len(rows), list(ids), TextStream(tokenizer, [] if alone else ids, tuple(sampling.stop)))
            )
    for first in range(0, len(rows), sampling.batch_size):
        yield from _generate_batch(model, tokenizer, rows[first : first + sampling.batch_size], sampling)


def _generate_batch(
    model: AnyModel, tokenizer: TextTokenizer, rows: list[GenerationRow], sampling: Sampling
) -> Iterator[TextPiece]:
    """Generate until all rows of a batch are done."""
    vocab_size = min(model.cfg.vocab_size or tokenizer.vocab_size, tokenizer.vocab_size)  # never choose padding
    noise = Noise(sampling.seed, [row.number for row in rows], model.device) if sampling.temperature else None
    cache, hidden = _prefill(model, rows, sampling.max_tokens)
    while True:
        logits = checked_logits(model, model.logits(hidden)[:, :vocab_size])  # [rows, h] -> [rows, V]
        tokens = choose(logits, noise, sampling.temperature, sampling.top_k, sampling.top_p)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if not row.done:
                yield row.take(token, tokenizer.end_ids, sampling.max_tokens)
        alive = [i for i, row in enumerate(rows) if not row.done]
        if not alive:
            return
        full = cache.length == cache.capacity
        # Dropping rows copies the cache, so finished rows are computed on until they are half of all.
        if full or 2 * len(alive) <= len(rows):
            rows, tokens = [rows[i] for i in alive], tokens[alive]
            if noise is not None:
                noise.keep(alive)
            if not full:
                cache.keep(alive)
        if full:
            cache, hidden = _prefill(model, rows, sampling.max_tokens)
        else:
            hidden = model.hidden(tokens[:, None], cache=cache)[:, 0]  # [rows, 1, h] -> [rows, h]


def checked_logits(model: AnyModel, logits: Tensor) -> Tensor:
    """The logits, if all are finite. Raises CheckpointError, which tells what of the model is not."""
    # A sum is one pass over the values, and not finite where one of them is not; nor perhaps where all are huge.
    if isfinite(float(logits.sum())) or bool(logits.isfinite().all()):
        return logits
    require_finite(dict(model.named_parameters()), "the model")
    raise CheckpointError(
        f"the model's logits are NaN or infinite though its weights are not: computing in {name_of(logits.dtype)} "
        "overflows; choose bf16 or fp32 (--dtype)"
    )


def _prefill(model: AnyModel, rows: Sequence[GenerationRow], max_tokens: int) -> tuple[KVCache, Tensor]:
    """A cache with the tokens of all rows, and the hidden state of the last token of each row: [rows, h]."""
    limit = model.cfg.max_positions
    for row in rows:
        if limit is not None and row.length > limit:
            row.start = len(row.ids) - max(1, limit // 2)
    capacity = max(row.length for row in rows) + max(max_tokens - row.count for row in rows)
    device = model.device
    streamed = streamed_stage(model)
    on_disk = streamed is not None and streamed.plan.cache_on_disk
    cache = KVCache(len(rows), min(capacity, limit or capacity), device, model.cache_dtype, on_disk)
    contexts = [tuple(row.ids[row.start :]) for row in rows]
    prompts = list(dict.fromkeys(contexts))  # equal rows go through the model once
    calls, lasts = [], []
    for chunk in _prefill_chunks(prompts):
        targets = [[i for i, ids in enumerate(contexts) if ids == prompt] for prompt in chunk]
        lengths = [len(prompt) for prompt in chunk]
        tokens = torch.tensor([list(chain(*chunk))], device=device)  # [1, total]
        calls.append((tokens, {"cache": Prompts(cache, targets, lengths)}))
        lasts.append(torch.tensor(lengths, device=device).cumsum(0) - 1)  # the last token of each prompt
    states = [hidden[0, last] for hidden, last in zip(model.hidden_each(calls), lasts, strict=True)]
    cache.set_lengths([len(ids) for ids in contexts])
    order = [prompts.index(ids) for ids in contexts]
    return cache, torch.cat(states)[torch.tensor(order, device=device)]


def _prefill_chunks(prompts: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Prompts that go through the model together: enough to keep it busy, few enough for its memory."""
    chunk: list[tuple[int, ...]] = []
    for prompt in prompts:
        if chunk and sum(map(len, chunk)) + len(prompt) > PREFILL_CHUNK_TOKENS:
            yield chunk
            chunk = []
        chunk.append(prompt)
    yield chunk


def checked_prompt(model: AnyModel, tokenizer: TextTokenizer, prompt: Prompt) -> list[int]:
    """The ids of a prompt, of an empty one that of the end of a document. Raises DataError as `stream` does."""
    try:
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else [index(token) for token in prompt]
    except TypeError:
        raise DataError(
            f"the prompt {prompt!r} is neither a text nor a list of token ids; prompts are a list of such: [[1, 2, 3]]"
        ) from None
    if not ids:
        if tokenizer.eod_id is None:
            raise DataError("an empty prompt begins with the end-of-document token, which this tokenizer does not have")
        ids = [tokenizer.eod_id]
    limit, num_rows = model.cfg.max_positions, model.cfg.padded_vocab_size
    shown = repr(prompt if len(prompt) <= 40 else f"{prompt[:40]}...")
    if limit is not None and len(ids) > limit:
        raise DataError(f"the prompt {shown} has {len(ids)} tokens; the model takes {limit} (model.max_positions)")
    if foreign := [token for token in ids if not 0 <= token < num_rows]:
        raise DataError(
            f"the prompt {shown} has token {foreign[0]}, but the model knows {num_rows}; is its tokenizer right?"
        )
    return ids


def in_order(pieces: Iterable[TextPiece]) -> Iterator[TextPiece]:
    """The same text row after row: rows are written side by side, and later ones wait until those before are done."""
    waiting: dict[int, TextPiece] = {}
    current = 0
    for piece in pieces:
        if piece.row in waiting:
            piece = piece._replace(text=waiting[piece.row].text + piece.text)
        waiting[piece.row] = piece
        while current in waiting:
            ready = waiting.pop(current)
            yield ready
            if not ready.last:  # more of this row is still to come
                break
            current += 1
