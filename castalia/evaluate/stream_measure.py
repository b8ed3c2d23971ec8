"""A stream of tokens judged by a model: how windows over it are cut, and what comes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from castalia.config.schema import DataConfig, ModelConfig
from castalia.data.loader import Batch
from castalia.data.tokenizer import Tokenizer
from castalia.errors import ConfigError
from castalia.evaluate.perplexity import bits_per_byte, evaluate, num_windows, windows
from castalia.evaluate.token_stream import Stream, read_stream, require_known_ids, validation_stream
from castalia.parallel.executor import Executor

Watch = Callable[[Iterator[Any], Callable[[Any], int], int], Iterator[Any]]  # items, the size of one, that of all


def unwatched(items: Iterator[Any], size: Callable[[Any], int], total: int) -> Iterator[Any]:
    """A `Watch` that shows nothing."""
    return items


@dataclass(frozen=True)
class StreamMeasure:
    """A stream, and how windows over it are cut."""

    stream: Stream
    length: int  # tokens of a window
    stride: int  # tokens from one window to the next
    by_document: bool  # tokens see only their own document
    ends: tuple[int, ...]  # where windows begin anew
    spells_all: bool  # every token of the text counts, so that its bytes do, too

    @property
    def num_windows(self) -> int:
        """How many windows there are."""
        return num_windows(len(self.stream.tokens), self.length, self.stride, self.ends)

    def batches(self, rows: int) -> Iterator[Batch]:
        """The windows, `rows` at a time."""
        stream, sizes = self.stream, self.stream.sizes if self.by_document else None
        return windows(stream.tokens, self.length, self.stride, rows, sizes, stream.labels, self.ends)

    def figures(self, executor: Executor, rows: int, watch: Watch = unwatched) -> dict[str, Any]:
        """Loss, perplexity and tokens of a model; with bits per byte where they are known.

        `watch` shows the progress of the batches that it is given and hands on.
        """
        batches = watch(self.batches(rows), lambda batch: int(batch.loss_mask.sum()), self.stream.num_counted)
        found: dict[str, Any] = dict(evaluate(executor, batches))
        if self.stream.num_bytes and self.spells_all:
            found["bits_per_byte"] = bits_per_byte(found["loss"], int(found["tokens"]), self.stream.num_bytes)
        return found

    def by_source(self, tokenizer: Tokenizer | None) -> dict[str, StreamMeasure]:
        """The same for the documents of each source alone. Empty for fewer than two known sources."""
        parts = self.stream.by_source(tokenizer)
        return {
            name: replace(self, stream=part, ends=tuple(np.cumsum(part.sizes).tolist()) if self.ends else ())
            for name, part in parts.items()
        }


def measure_stream(
    config: DataConfig, model: ModelConfig, data: str | None, tokenizer: Tokenizer | None, stride: int | None = None
) -> StreamMeasure:
    """What a run's config says of `data`, a corpus or a text file; None: of its own validation data.

    Raises DataError for data that cannot be read, or of another vocabulary, and ConfigError for a stride that is no
    part of the window.
    """
    stream = read_stream(data, tokenizer) if data else validation_stream(config, tokenizer)
    require_known_ids(stream, model.padded_vocab_size)
    length = window_length(config, model)
    if stride is not None and not 0 < stride <= length:
        raise ConfigError(f"--stride {stride} must lie between 1 and the window's {length} tokens (data.seq_length)")
    spells_all = stream.labels is None  # else some of the text's bytes are not predicted
    if config.mask_after_eod and tokenizer and tokenizer.eod_id is not None:
        stream = stream.masked_after(tokenizer.eod_id)
    # As in training on unpacked documents, no window goes over the end of one.
    unpacked = config.packing == "unpacked" and not data
    ends = tuple(np.cumsum(stream.sizes).tolist()) if unpacked else ()
    return StreamMeasure(stream, length, stride or length, config.mask_documents, ends, spells_all)


def window_length(config: DataConfig, model: ModelConfig) -> int:
    """Tokens of a window: a sample's in training, as far as the model has positions."""
    return min(config.seq_length, model.max_positions or config.seq_length)
