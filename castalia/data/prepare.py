"""From text to an indexed corpus: chunks are tokenized by a pool of processes and written in the order of the input,
so that the files are the same for any number of workers and memory stays bounded for any size."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from importlib import import_module
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from castalia.config.schema import Tokenizer as TokenizerConfig
from castalia.data.indexed import Writer, token_dtype
from castalia.data.samples import IGNORE
from castalia.data.sources import BLOCK_BYTES, Chunk, chunks, find_files, texts_of
from castalia.data.tokenizer import Tokenizer, load_tokenizer
from castalia.errors import DataError

CHUNKS_IN_FLIGHT = 4  # for each worker


@dataclass(frozen=True)
class Recipe:
    """How a text becomes token ids."""

    tokenizer: TokenizerConfig
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    skip_bad: bool = False
    ftfy: bool = False
    mask_before: tuple[int, ...] = ()  # labels: no loss up to and including the first occurrence of these ids


@dataclass
class Report:
    """What has been done so far."""

    total_bytes: int  # of the input files
    done_bytes: int = 0
    text_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    empty: int = 0
    bad: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Encoded:
    """A tokenized chunk: for each key the ids back to back and the number of ids of each document."""

    tokens: dict[str, np.ndarray]
    sizes: dict[str, list[int]]
    text_bytes: int
    empty: int
    bad: list[str]
    done_bytes: int


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    recipe: Recipe,
    *,
    workers: int | None = None,
    num_docs: int | None = None,
    on_progress: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Write `{output}_{key}_document.{bin,idx}`, and `{output}_label_document` when labels are masked.

    `num_docs` stops after so many documents. `workers` None takes all cores. DataError leaves nothing half-written.
    """
    tokenizer = load_tokenizer(recipe.tokenizer)
    _check(recipe, tokenizer)
    files = find_files(inputs)
    report = Report(sum(file.stat().st_size for file in files))
    stream = chunks(files, recipe.keys[0])
    workers = min(workers or len(os.sched_getaffinity(0)), 1 + report.total_bytes // (4 * BLOCK_BYTES))
    dtype = np.dtype("<i4") if recipe.mask_before else token_dtype(tokenizer.vocab_size)
    try:
        with ExitStack() as stack:
            writers = {key: stack.enter_context(Writer(f"{output}_{key}_document", dtype)) for key in recipe.keys}
            labels = stack.enter_context(Writer(f"{output}_label_document", dtype)) if recipe.mask_before else None
            results = stack.enter_context(closing(_encode_all(stream, recipe, tokenizer, workers)))
            for encoded in results:
                left = None if num_docs is None else num_docs - report.documents
                _write(encoded, writers, labels, recipe, report, left)
                on_progress(report)
                if num_docs is not None and report.documents >= num_docs:
                    break
            if not report.documents:
                raise DataError(
                    f"no documents in {', '.join(map(str, files))} ({report.empty} empty, {len(report.bad)} bad)"
                )
    except OSError as error:
        raise DataError(f"cannot prepare {output}: {error}") from error
    report.outputs = [writer.prefix for writer in (*writers.values(), *([labels] if labels else []))]
    return report


def _check(recipe: Recipe, tokenizer: Tokenizer) -> None:
    if recipe.append_eod and tokenizer.eod_id is None:
        raise DataError("--append-eod: the tokenizer has no end-of-document token such as <|endoftext|>")
    if recipe.mask_before and len(recipe.keys) > 1:
        raise DataError(f"--mask-before-token works on one key, not on {', '.join(recipe.keys)}")
    if recipe.ftfy:
        _fix_text()


def _fix_text() -> Callable[[str], str]:
    try:
        return import_module("ftfy").fix_text
    except ImportError:
        raise DataError("--ftfy needs the package ftfy: pip install ftfy") from None


def encode(chunk: Chunk, recipe: Recipe, tokenizer: Tokenizer) -> Encoded:
    found = texts_of(chunk, recipe.keys, recipe.skip_bad)
    tokens, sizes, empty, text_bytes = {}, {}, found.empty, 0
    for key, texts in found.texts.items():
        text_bytes += sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
        if recipe.ftfy:
            texts = [_fix_text()(text) for text in texts]
        ids = [row for row in tokenizer.encode_batch(texts) if row]
        empty += len(texts) - len(ids)  # a tokenizer may drop all of a text
        if recipe.append_eod and tokenizer.eod_id is not None:
            for row in ids:
                row.append(tokenizer.eod_id)
        sizes[key] = [len(row) for row in ids]
        flat = np.fromiter(chain.from_iterable(ids), np.int64, sum(sizes[key]))
        if len(flat) and flat.max() >= tokenizer.vocab_size:
            raise DataError(
                f"{chunk.path}: the tokenizer gave id {flat.max()}, beyond its vocabulary of {tokenizer.vocab_size}; "
                "its file is damaged"
            )
        tokens[key] = flat.astype(token_dtype(tokenizer.vocab_size))
    return Encoded(tokens, sizes, text_bytes, empty, found.bad, chunk.done_bytes)


def mask_labels(tokens: np.ndarray, before: Sequence[int]) -> np.ndarray:
    """A copy, int32, with -100 up to and including the first occurrence of the ids `before`; unchanged without one."""
    labels = tokens.astype("<i4")
    if len(tokens) >= len(before):
        windows = np.lib.stride_tricks.sliding_window_view(tokens, len(before))
        hits = np.flatnonzero((windows == np.asarray(before)).all(axis=1))
        if len(hits):
            labels[: hits[0] + len(before)] = IGNORE
    return labels


def _write(
    encoded: Encoded,
    writers: dict[str, Writer],
    labels: Writer | None,
    recipe: Recipe,
    report: Report,
    left: int | None,
) -> None:
    """Append a chunk to the files, at most `left` documents of it."""
    for key, writer in writers.items():
        sizes = encoded.sizes[key][:left]
        tokens = encoded.tokens[key][: sum(sizes)]
        writer.add_many(tokens, sizes)
        if labels is not None:
            for document in np.split(tokens, np.cumsum(sizes)[:-1]) if sizes else ():
                labels.add(mask_labels(document, recipe.mask_before))
        report.tokens += len(tokens)
    report.documents += len(encoded.sizes[recipe.keys[0]][:left])
    report.text_bytes += encoded.text_bytes
    report.empty += encoded.empty
    report.bad += encoded.bad
    report.done_bytes = encoded.done_bytes


def _encode_all(
    stream: Iterable[Chunk], recipe: Recipe, tokenizer: Tokenizer, workers: int
) -> Generator[Encoded, None, None]:
    """Encoded chunks in the order of the stream."""
    if workers == 1:
        yield from (encode(chunk, recipe, tokenizer) for chunk in stream)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=(recipe,))
    waiting: deque[Future[Encoded]] = deque()
    try:
        for chunk in stream:
            waiting.append(pool.submit(_encode_in_worker, chunk))
            if len(waiting) >= workers * CHUNKS_IN_FLIGHT:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError("a worker process died, most likely for lack of memory; use fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker: tuple[Recipe, Tokenizer]  # in a worker process: set once when it starts


def _start_worker(recipe: Recipe) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops us
    _worker = recipe, load_tokenizer(recipe.tokenizer)


def _encode_in_worker(chunk: Chunk) -> Encoded:
    return encode(chunk, *_worker)
