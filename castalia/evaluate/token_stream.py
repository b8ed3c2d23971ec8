"""Token streams for evaluation, from indexed corpora and from text files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from castalia.config.schema import DataConfig
from castalia.data.config_corpora import open_labels
from castalia.data.indexed import open_dataset
from castalia.data.sample_index import IGNORE
from castalia.data.sources import documents
from castalia.data.split import sources_of, split_documents
from castalia.data.tokenizer import Tokenizer
from castalia.errors import DataError


class Stream(NamedTuple):
    """Documents to evaluate, as one sequence of tokens."""

    name: str
    tokens: np.ndarray  # [tokens], all documents back to back
    sizes: np.ndarray  # [documents], in tokens
    num_bytes: int | None  # UTF-8 bytes of the text; None without a tokenizer
    labels: np.ndarray | None = None  # [tokens]: the token itself, or -100 if it does not count; None: all count
    sources: tuple[str, ...] = ()  # the file or corpus of each document; empty if unknown

    @property
    def num_counted(self) -> int:
        """The number of predicted tokens: those that count, except the first."""
        return len(self.tokens) - 1 if self.labels is None else int((self.labels[1:] != IGNORE).sum())

    def masked_after(self, token: int) -> Stream:
        """The stream without the tokens that follow `token`, which begin a document unrelated to the one before."""
        labels = (self.tokens if self.labels is None else self.labels).astype(np.int64)
        labels[1:][self.tokens[:-1] == token] = IGNORE  # labels stand at their own tokens here, not shifted
        return self._replace(labels=labels)

    def by_source(self, tokenizer: Tokenizer | None) -> dict[str, Stream]:
        """The documents of each source as a stream of their own. Empty for fewer than two known sources."""
        if len(set(self.sources)) < 2:
            return {}
        streams: dict[str, Stream] = {}
        for name in dict.fromkeys(self.sources):
            mine = np.array([source == name for source in self.sources])
            tokens = self.tokens[np.repeat(mine, self.sizes)]
            labels = None if self.labels is None else self.labels[np.repeat(mine, self.sizes)]
            parts = np.split(tokens, np.cumsum(self.sizes[mine])[:-1])
            size = sum(len(tokenizer.decode(part.tolist()).encode()) for part in parts) if tokenizer else None
            if len(tokens) > 1:
                streams[name] = Stream(name, tokens, self.sizes[mine], size, labels)
        return streams


def read_stream(path: str, tokenizer: Tokenizer | None) -> Stream:
    """The stream of a corpus, given by the prefix of its .bin and .idx, or of a text file, which is tokenized here.

    Raises DataError if there is neither, if the text needs a tokenizer, or if there is nothing to evaluate.
    """
    if Path(f"{path}.idx").is_file():
        return indexed_stream(path, None, tokenizer)
    if not Path(path).exists():
        raise DataError(f"{path}: neither a text file nor the prefix of a corpus ({path}.bin and {path}.idx)")
    if tokenizer is None:
        raise DataError(f"{path} is text, but the checkpoint names no tokenizer; give one with --tokenizer")
    pieces, num_bytes = [], 0
    for text in documents([Path(path)]):
        ids = tokenizer.encode(text) + ([] if tokenizer.eod_id is None else [tokenizer.eod_id])
        pieces.append(np.array(ids, np.int64))
        num_bytes += len(text.encode())
    if not num_bytes:
        raise DataError(f"{path} holds no text")
    return _stream(path, pieces, num_bytes)


def validation_stream(data: DataConfig, tokenizer: Tokenizer | None) -> Stream:
    """All documents that a run holds out for validation. Raises DataError if there are none."""
    if data.path:
        which = split_documents(data, open_dataset(data.path))["valid"].tolist()
        return indexed_stream(data.path, which, tokenizer)
    if not data.valid:
        raise DataError("the run has no validation data (data.valid, or a part of data.split); name some with --data")
    parts = [indexed_stream(source.path, None, tokenizer) for source in data.valid]
    stored = [open_labels(source, open_dataset(source.path)) for source in data.valid]
    labels = [
        part.tokens if own is None else np.concatenate(list(own)) for part, own in zip(parts, stored, strict=True)
    ]
    num_bytes = [part.num_bytes for part in parts if part.num_bytes is not None]
    return Stream(
        ", ".join(part.name for part in parts),
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.sizes for part in parts]),
        sum(num_bytes) if len(num_bytes) == len(parts) else None,
        np.concatenate(labels) if any(stored) else None,
        tuple(name for part in parts for name in part.sources or (part.name,) * len(part.sizes)),
    )


def indexed_stream(prefix: str, which: Sequence[int] | None, tokenizer: Tokenizer | None) -> Stream:
    """The stream of the documents `which` of a corpus, None for all. Raises DataError for fewer than two tokens."""
    dataset = open_dataset(prefix)
    items = [dataset[i] for i in which] if which is not None else list(dataset)
    num_tokens = sum(map(len, items))
    if num_tokens < 2:
        raise DataError(f"{prefix}: {len(items)} documents with {num_tokens} tokens are too few to evaluate")
    num_bytes = sum(len(tokenizer.decode(item.tolist()).encode()) for item in items) if tokenizer else None
    known = sources_of(dataset)
    sources = tuple(known[0][file] for file in known[1][slice(None) if which is None else which]) if known else ()
    return _stream(prefix, items, num_bytes)._replace(sources=sources)


def require_known_ids(stream: Stream, rows: int) -> None:
    """Raise DataError if a token id has no row in the model."""
    largest = int(stream.tokens.max())
    if largest >= rows:
        raise DataError(
            f"{stream.name}: token id {largest} lies beyond the model's vocabulary of {rows}; "
            "it was prepared with another tokenizer"
        )


def _stream(name: str, items: Sequence[np.ndarray], num_bytes: int | None) -> Stream:
    return Stream(name, np.concatenate(items), np.array([len(item) for item in items]), num_bytes)
