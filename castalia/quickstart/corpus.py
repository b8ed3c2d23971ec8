"""A tokenizer and a corpus out of a folder, and the part of it that is kept for judging the model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from castalia.config.schema import TokenizerConfig
from castalia.data.dataset_writer import DatasetWriter
from castalia.data.indexed import bin_path, idx_path, open_dataset
from castalia.data.prepare import Recipe, prepare
from castalia.data.split import file_of_each, sources_path, write_sources
from castalia.data.tokenizer import engine_text, train_bpe
from castalia.errors import DataError
from castalia.files import write_text
from castalia.quickstart.look import Folder, texts

TOKENIZER_BYTES = 50 << 20  # of files that the vocabulary is learned from
HELD_OUT_SHARE, HELD_OUT_TOKENS = 0.05, 200_000  # the smaller of the two
STRETCH_TOKENS = 1024  # of a long document: what is held out or trained on as one
LEAST_HELD_OUT = 2  # stretches


class Corpus(NamedTuple):
    """What a folder became; the paths are prefixes."""

    tokenizer: str
    train: str
    valid: str
    train_tokens: int
    valid_tokens: int
    bytes: int  # of all text
    bad: list[str]  # records that are not text


def prepare_corpus(folder: Folder, vocab_size: int, output: Path, progress: Callable[[str], None]) -> Corpus:
    """Learn a tokenizer from the folder and write `tokenizer.json`, `train` and `valid` into `output`.

    An interrupted call is continued by the same call. `progress` is told what begins.
    """
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = output / "tokenizer.json"
    if not tokenizer.is_file():
        progress(f"learning a vocabulary of {vocab_size:,} entries")
        bpe = train_bpe(texts(folder, TOKENIZER_BYTES), vocab_size)
        write_text(tokenizer, engine_text(bpe.engine))
    recipe = Recipe(TokenizerConfig(path=str(tokenizer)), append_eod=True, skip_bad=True)
    parts, num_bytes, bad = [], 0, list[str]()
    for key, files in folder.files.items():
        progress(f"turning {len(files):,} files into tokens")
        report = prepare(files, output / "all", replace(recipe, keys=(key,)))
        parts += report.outputs
        num_bytes, bad = num_bytes + report.text_bytes, bad + report.bad
    total = sum(len(open_dataset(part).tokens) for part in parts)
    share = min(HELD_OUT_SHARE, HELD_OUT_TOKENS / total)
    train, valid = output / "train", output / "valid"
    kept, held = hold_out(parts, str(train), str(valid), share)
    for part in parts:  # which is in the two others now
        bin_path(part).unlink()
        idx_path(part).unlink()
        sources_path(part).unlink(missing_ok=True)
    return Corpus(str(tokenizer), str(train), str(valid), kept, held, num_bytes, bad)


def hold_out(prefixes: Sequence[str], train: str, valid: str, share: float) -> tuple[int, int]:
    """Write two corpora out of others, and return their tokens: about `share` of the text goes to the second.

    A hash of its tokens says where a document belongs, so that the same text is never on both sides and every file has
    its part in what is held out. A document that is longer than a stretch is divided into stretches, whose
    neighbours stay together: a folder with one long book has something to hold out, too.
    """
    parts = [open_dataset(prefix) for prefix in prefixes]
    documents = [document for part in parts for document in part]
    files = [name for part in parts for name in file_of_each(part)]
    stretches = [(item, *bounds) for item, document in enumerate(documents) for bounds in _stretches(len(document))]
    if len(stretches) <= LEAST_HELD_OUT:
        raise DataError(
            f"the text has {sum(map(len, documents)):,} tokens: too few to learn from and to hold some of them out; "
            "give more text"
        )
    ranks = [_rank(documents[item][first:end]) for item, first, end in stretches]
    limit = max(share, sorted(ranks)[LEAST_HELD_OUT])  # by chance, too few may rank below the share
    with DatasetWriter(train, parts[0].dtype) as kept, DatasetWriter(valid, parts[0].dtype) as held:
        sides: tuple[list[str], list[str]] = [], []
        for item, first, end, is_held in _joined(stretches, [rank < limit for rank in ranks]):
            (held if is_held else kept).add(documents[item][first:end])
            sides[is_held].append(files[item])
        for writer, side in zip((kept, held), sides, strict=True):
            write_sources(writer.prefix, writer.sizes, [(file, len(list(same))) for file, same in groupby(side)])
    return kept.num_tokens, held.num_tokens


def _stretches(size: int) -> list[tuple[int, int]]:
    """Of a document: the last one may be up to twice as long."""
    count = max(1, size // STRETCH_TOKENS)
    firsts = [number * STRETCH_TOKENS for number in range(count)]
    return list(zip(firsts, [*firsts[1:], size], strict=True))


def _rank(tokens: np.ndarray) -> float:
    """From 0 to 1, by content."""
    return int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest(), "little") / 2**64


def _joined(stretches: list[tuple[int, int, int]], held: list[bool]) -> Iterator[tuple[int, int, int, bool]]:
    """Neighbouring stretches of a document with the same fate as one."""
    begun: tuple[int, int, int, bool] | None = None
    for (item, first, end), is_held in zip(stretches, held, strict=True):
        if begun and (begun[0], begun[3]) == (item, is_held):
            begun = (item, begun[1], end, is_held)
            continue
        if begun:
            yield begun
        begun = (item, first, end, is_held)
    if begun:
        yield begun
