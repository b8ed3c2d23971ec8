"""Writing text: prompts go in together, each row's text comes out piece by piece."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple, Union

import torch
from torch import Tensor

from castalia.checkpoint.restore import require_finite
from castalia.errors import CheckpointError, DataError
from castalia.generate.kv_cache import KVCache, Prompts
from castalia.generate.sampling import Noise, choose
from castalia.generate.text_stream import TextStream, TextTokenizer
from castalia.model.transformer import Transformer
from castalia.storage.lazy import name_of

if TYPE_CHECKING:
    from castalia.parallel.inference import SplitModel

PREFILL_CHUNK_TOKENS = 2048  # tokens of several prompts that are read at a time
Prompt = str | Sequence[int]
AnyModel = Union[Transformer, "SplitModel"]  # the whole model, or parts of it on several ranks


@dataclass(frozen=True)
class Sampling:
    """How texts are written. Temperature 0 takes the likeliest token; top_k and top_p 0 mean all tokens."""

    max_tokens: int = 64  # of one text
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    seed: int = 0
    stop: Sequence[str] = ()  # a text ends before any of these
    num_samples: int = 1  # texts for each prompt
    batch_size: int = 16  # texts that are written at a time


class TextPiece(NamedTuple):
    """Text that follows in a row; rows are numbered prompt by prompt, the samples of one prompt side by side."""

    row: int
    text: str
    last: bool


@dataclass
class Row:
    """One text that is being written; the model sees `ids[start:]`."""

    number: int
    ids: list[int]
    text: TextStream
    start: int = 0
    count: int = 0  # tokens written
    done: bool = False

    @property
    def length(self) -> int:
        return len(self.ids) - self.start

    def take(self, token: int, ends: Collection[int], max_tokens: int) -> TextPiece:
        """Add the next token; the text that it makes certain."""
        self.count += 1
        text = ""
        if token in ends:
            self.done = True
        else:
            self.ids.append(token)
            text = self.text.push(token)
            self.done = self.text.stopped or self.count == max_tokens
        return TextPiece(self.number, text + (self.text.finish() if self.done else ""), self.done)


def generate(model: AnyModel, tokenizer: TextTokenizer, prompts: Sequence[Prompt], **sampling) -> list[str]:
    """The texts that follow the prompts, `num_samples` for each in turn. Keywords are the fields of `Sampling`."""
    options = Sampling(**sampling)
    texts = [""] * (len(prompts) * options.num_samples)
    for piece in stream(model, tokenizer, prompts, options):
        texts[piece.row] += piece.text
    return texts


@torch.inference_mode()
def stream(
    model: AnyModel, tokenizer: TextTokenizer, prompts: Sequence[Prompt], sampling: Sampling
) -> Iterator[TextPiece]:
    """Write after each prompt (text or token ids; an empty one begins a document), yielding the pieces as they come.

    A row ends with any of the tokens that end a text, before a stop string, or after `max_tokens`. What it holds
    depends on the prompt, the seed and the row's number, not on the other rows. A row that outgrows the model's
    positions goes on with the later half of them in view. The model should be in eval mode. DataError for a prompt it
    cannot take.
    """
    rows: list[Row] = []
    for prompt in prompts:
        ids = _prompt_ids(model, tokenizer, prompt)
        for _ in range(sampling.num_samples):
            rows.append(Row(len(rows), list(ids), TextStream(tokenizer, ids, tuple(sampling.stop))))
    for first in range(0, len(rows), sampling.batch_size):
        yield from _write(model, tokenizer, rows[first : first + sampling.batch_size], sampling)


def _write(model: AnyModel, tokenizer: TextTokenizer, rows: list[Row], sampling: Sampling) -> Iterator[TextPiece]:
    """One batch of rows, until all are done."""
    vocab_size = min(model.cfg.vocab_size or tokenizer.vocab_size, tokenizer.vocab_size)  # padding is never chosen
    device = next(model.parameters()).device
    noise = Noise(sampling.seed, [row.number for row in rows], device) if sampling.temperature else None
    cache, hidden = _read(model, rows, sampling.max_tokens)
    while True:
        logits = model.logits(hidden)[:, :vocab_size]
        if not logits.isfinite().all():
            raise _not_finite(model, logits)
        tokens = choose(logits, noise, sampling.temperature, sampling.top_k, sampling.top_p)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if not row.done:
                yield row.take(token, tokenizer.end_ids, sampling.max_tokens)
        alive = [i for i, row in enumerate(rows) if not row.done]
        if not alive:
            return
        full = cache.length == cache.capacity
        if full or 2 * len(alive) <= len(rows):  # rows that are done go along until they are half: dropping them copies
            rows, tokens = [rows[i] for i in alive], tokens[alive]
            if noise is not None:
                noise.keep(alive)
            if not full:
                cache.keep(alive)
        if full:
            cache, hidden = _read(model, rows, sampling.max_tokens)
        else:
            hidden = model.hidden(tokens[:, None], cache=cache)[:, 0]


def _not_finite(model: AnyModel, logits: Tensor) -> CheckpointError:
    require_finite(dict(model.named_parameters()), "the model")
    return CheckpointError(
        f"the model's logits are NaN or infinite though its weights are not: computing in {name_of(logits.dtype)} "
        "overflows; choose bf16 or fp32 (--dtype)"
    )


def _read(model: AnyModel, rows: Sequence[Row], max_tokens: int) -> tuple[KVCache, Tensor]:
    """A cache filled with what the rows hold, and the hidden state [rows, h] of each one's last token."""
    limit = model.cfg.max_positions
    for row in rows:
        if limit is not None and row.length > limit:
            row.start = len(row.ids) - max(1, limit // 2)
    capacity = max(row.length for row in rows) + max(max_tokens - row.count for row in rows)
    device = next(model.parameters()).device
    cache = KVCache(len(rows), min(capacity, limit or capacity), device)
    held = [tuple(row.ids[row.start :]) for row in rows]
    prompts = list(dict.fromkeys(held))  # rows that hold the same are read once
    states = []
    for portion in _portions(prompts):
        readers = [[i for i, ids in enumerate(held) if ids == prompt] for prompt in portion]
        lengths = [len(prompt) for prompt in portion]
        tokens = torch.tensor([list(chain(*portion))], device=device)
        hidden = model.hidden(tokens, cache=Prompts(cache, readers, lengths))
        states.append(hidden[0, torch.tensor(lengths, device=device).cumsum(0) - 1])
    cache.set_lengths([len(ids) for ids in held])
    order = [prompts.index(ids) for ids in held]
    return cache, torch.cat(states)[torch.tensor(order, device=device)]


def _portions(prompts: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Prompts that go through the model together: enough to keep it busy, few enough for its memory."""
    portion: list[tuple[int, ...]] = []
    for prompt in prompts:
        if portion and sum(map(len, portion)) + len(prompt) > PREFILL_CHUNK_TOKENS:
            yield portion
            portion = []
        portion.append(prompt)
    yield portion


def _prompt_ids(model: AnyModel, tokenizer: TextTokenizer, prompt: Prompt) -> list[int]:
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    if not ids:
        if tokenizer.eod_id is None:
            raise DataError("an empty prompt begins with the end-of-document token, which this tokenizer does not have")
        ids = [tokenizer.eod_id]
    limit, num_rows = model.cfg.max_positions, model.cfg.padded_vocab_size
    shown = repr(prompt if len(prompt) <= 40 else f"{prompt[:40]}...")
    if limit is not None and len(ids) > limit:
        raise DataError(f"the prompt {shown} has {len(ids)} tokens; the model takes {limit} (model.max_positions)")
    if max(ids) >= num_rows:
        raise DataError(
            f"the prompt {shown} has token {max(ids)}, but the model knows {num_rows}; is its tokenizer right?"
        )
    return ids
