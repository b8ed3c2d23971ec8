"""The text that a model is judged by, document by document with its source, and how models do on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from castalia.checkpoint.restore import architecture, load_tokenizer_for, require_finite
from castalia.checkpoint.tensors import Checkpoint
from castalia.config.schema import DataConfig, RunConfig
from castalia.data.config_corpora import open_labels
from castalia.data.indexed import IndexedDataset, open_dataset
from castalia.data.sources import documents as texts_of_files
from castalia.data.split import file_of_each, split_documents
from castalia.data.tokenizer import Tokenizer
from castalia.errors import CheckpointError, DataError
from castalia.evaluate.perplexity import bits_per_byte, evaluate, windows
from castalia.loading import build_model
from castalia.model.transformer import Transformer
from castalia.parallel.executor import Executor
from castalia.train.hardware import choose_device, choose_dtype, name_of

MOST_TOKENS = 1 << 18  # that are looked at: enough for three digits, seconds for a small model
MOST_SOURCES = 12  # that are told apart; smaller ones are told of together


class HeldOutDocument(NamedTuple):
    """A held-out text, its source and its tokens."""

    source: str
    tokens: np.ndarray
    labels: np.ndarray | None  # None: every token counts
    text: str


@dataclass(frozen=True)
class HeldOut:
    """Documents that are looked at, in order, of all that are held out."""

    name: str
    documents: tuple[HeldOutDocument, ...]
    of_documents: int
    of_tokens: int
    is_validation: bool  # of the run itself; else a text that was named

    @property
    def text(self) -> bytes:
        """All held-out text as UTF-8."""
        return "".join(document.text for document in self.documents).encode()

    @property
    def num_tokens(self) -> int:
        """Tokens of all held-out documents."""
        return sum(len(document.tokens) for document in self.documents)

    @property
    def counts_all(self) -> bool:
        """Whether every token counts, none being masked by labels."""
        return all(document.labels is None for document in self.documents)


class Place(NamedTuple):
    """Where a held-out document lies."""

    source: str
    text: IndexedDataset
    labels: IndexedDataset | None
    number: int


def validation_text(data: DataConfig, tokenizer: Tokenizer, most_tokens: int = MOST_TOKENS) -> HeldOut:
    """What a run holds out. DataError where it holds out nothing, or where that is no longer here."""
    try:
        places = list(_places(data))
    except DataError as error:
        raise DataError(f"{error}; to report on another text: --data FILE") from None
    if not places:
        raise DataError("the run holds out no text (data.valid, or a part of data.split); name some: --data FILE")
    named = dict.fromkeys(place.text.prefix for place in places)
    return _looked_at(", ".join(Path(name).name for name in named), places, tokenizer, most_tokens, True)


def _places(data: DataConfig) -> list[Place]:
    if data.path:
        text = open_dataset(data.path)
        numbers = split_documents(data, text)["valid"]
        return _in_corpus(text, None, numbers)
    found: list[Place] = []
    for source in data.valid:
        text = open_dataset(source.path)
        found += _in_corpus(text, open_labels(source, text), np.arange(len(text)))
    return found


def _in_corpus(text: IndexedDataset, labels: IndexedDataset | None, numbers: np.ndarray) -> list[Place]:
    files = file_of_each(text)
    return [Place(files[number], text, labels, int(number)) for number in numbers]


def named_text(path: str, tokenizer: Tokenizer, most_tokens: int = MOST_TOKENS) -> HeldOut:
    """Of a corpus (prefix of .bin and .idx) or of text files. DataError where there is none."""
    if Path(f"{path}.idx").is_file():
        text = open_dataset(path)
        return _looked_at(path, _in_corpus(text, None, np.arange(len(text))), tokenizer, most_tokens, False)
    if not Path(path).exists():
        raise DataError(f"{path}: neither a text file nor the prefix of a corpus ({path}.bin and {path}.idx)")
    found: list[HeldOutDocument] = []
    total = 0
    for each in texts_of_files([Path(path)]):
        tokens = encoded(each, tokenizer)
        total += len(tokens)
        # The loop continues without room, to know how much of the text is looked at.
        room = most_tokens - sum(len(document.tokens) for document in found)
        if room > 1:
            found.append(_cut(HeldOutDocument(Path(path).name, tokens, None, each), room, tokenizer))
    if total < 2:
        raise DataError(f"{path} holds no text")
    return HeldOut(path, tuple(found), len(found), total, False)


def encoded(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """With the end of the document, where the tokenizer has one."""
    return np.array(tokenizer.encode(text) + ([] if tokenizer.eod_id is None else [tokenizer.eod_id]), np.int64)


def _looked_at(
    name: str, places: Sequence[Place], tokenizer: Tokenizer, most_tokens: int, is_validation: bool
) -> HeldOut:
    """Of many documents some that are drawn from all of them."""
    sizes = np.array([place.text.sizes[place.number] for place in places], np.int64)
    if sizes.sum() < 2:
        raise DataError(f"{name}: {len(places)} documents with {sizes.sum()} tokens are too few; name others: --data")
    # The same documents each time, so that reports can be compared.
    order = np.random.RandomState(0).permutation(len(places)) if sizes.sum() > most_tokens else np.arange(len(places))
    before = np.cumsum(sizes[order]) - sizes[order]
    chosen = np.sort(order[before < most_tokens - 1])  # a single token predicts nothing: hence - 1
    room, documents = most_tokens, []
    for number in chosen.tolist():
        source, text, labels, item = places[number]
        tokens = text[item].astype(np.int64)
        own = None if labels is None else labels[item].astype(np.int64)
        document = _cut(HeldOutDocument(source, tokens, own, tokenizer.decode(tokens.tolist())), room, tokenizer)
        documents.append(document)
        room -= len(document.tokens)
    return HeldOut(name, tuple(documents), len(places), int(sizes.sum()), is_validation)


def _cut(document: HeldOutDocument, room: int, tokenizer: Tokenizer) -> HeldOutDocument:
    if len(document.tokens) <= room:
        return document
    tokens = document.tokens[:room]
    labels = None if document.labels is None else document.labels[:room]
    # The text is cut as well: bits per byte count the bytes of these tokens alone.
    return HeldOutDocument(document.source, tokens, labels, tokenizer.decode(tokens.tolist()))


@dataclass(frozen=True)
class Score:
    """How a model does on held-out text. Bits per byte are None where some of the text's bytes do not count."""

    loss: float  # nats a token
    tokens: int  # that were predicted
    bytes: int
    bits_per_byte: float | None


class Judged(NamedTuple):
    """A model that is ready to be asked."""

    checkpoint: Checkpoint
    config: RunConfig
    model: Transformer
    tokenizer: Tokenizer
    executor: Executor
    precision: str


def load(checkpoint: Checkpoint, tokenizer_path: str | None) -> Judged:
    """Raises CheckpointError for a reward model, which writes no text, and where there is no tokenizer."""
    config = checkpoint.config or RunConfig()
    if architecture(checkpoint).reward_head:
        raise CheckpointError(f"{checkpoint.path} is a reward model: it scores texts and writes none to report on")
    tokenizer = load_tokenizer_for(checkpoint, tokenizer_path)
    device = choose_device(config.train.device)
    dtype = choose_dtype(config.precision.compute, device)
    model = build_model(checkpoint, device, dtype)
    require_finite(dict(model.named_parameters()), checkpoint.path)
    executor = Executor(model, config.train.micro_batch_size or 8)
    return Judged(checkpoint, config, model, tokenizer, executor, name_of(dtype))


def score(judged: Judged, documents: Sequence[HeldOutDocument]) -> Score:
    """Each token is predicted once, from windows as long as those of training."""
    config, model = judged.config, judged.model.cfg
    tokens = np.concatenate([document.tokens for document in documents])
    if tokens.max() >= model.padded_vocab_size:
        raise DataError(
            f"token id {tokens.max()} of the held-out text lies beyond the vocabulary of {judged.checkpoint.path} "
            f"({model.padded_vocab_size}): it was prepared with another tokenizer"
        )
    counts_all = all(document.labels is None for document in documents)
    labels = None if counts_all else np.concatenate([_labels(document) for document in documents])
    length = min(config.data.seq_length, model.max_positions or config.data.seq_length)
    sizes = np.array([len(document.tokens) for document in documents])
    ends = np.cumsum(sizes).tolist() if config.data.packing == "unpacked" else ()
    shown = windows(
        tokens,
        length,
        length,
        config.train.micro_batch_size or 8,
        sizes if config.data.mask_documents else None,
        labels,
        ends,
    )
    with torch.inference_mode():
        figures = evaluate(judged.executor, shown)
    num_bytes, count = sum(len(document.text.encode()) for document in documents), int(figures["tokens"])
    bits = bits_per_byte(figures["loss"], count, num_bytes) if counts_all and count and num_bytes else None
    return Score(figures["loss"], count, num_bytes, bits)


def _labels(document: HeldOutDocument) -> np.ndarray:
    return document.tokens if document.labels is None else document.labels


def respelled(held_out: HeldOut, tokenizer: Tokenizer) -> list[HeldOutDocument]:
    """The same text in another tokenizer's tokens."""
    return [
        HeldOutDocument(document.source, encoded(document.text, tokenizer), None, document.text)
        for document in held_out.documents
    ]


def by_source(documents: Sequence[HeldOutDocument]) -> dict[str, list[HeldOutDocument]]:
    """The largest sources by name; what is left of many small ones comes as one, and last.

    Of more files than can be told of, folders are told of.
    """
    names = {document.source for document in documents}
    if len(names) > MOST_SOURCES and any("/" in name for name in names):
        documents = [document._replace(source=document.source.split("/")[0]) for document in documents]
    sizes: Counter[str] = Counter()
    for document in documents:
        sizes[document.source] += len(document.text)
    kept = [name for name, _ in sizes.most_common(MOST_SOURCES if len(sizes) <= MOST_SOURCES else MOST_SOURCES - 1)]
    found: dict[str, list[HeldOutDocument]] = {name: [] for name in kept}
    for document in documents:
        name = document.source if document.source in found else f"{len(sizes) - len(kept)} others"
        found.setdefault(name, []).append(document)
    return {name: own for name, own in found.items() if sum(len(document.tokens) for document in own) > 1}
