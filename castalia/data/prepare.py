"""From text files to an indexed corpus.

    find_files -> chunks of records -> texts -> token ids -> DatasetWriter
    (this process)                     (workers)             (this process, in the order of the input)

The files are the same for any number of workers, memory stays bounded for inputs of any size, and an interrupted
preparation is continued by its journal.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np

from castalia.config.schema import TokenizerConfig
from castalia.data.chat import Chat, conversations, records_of, renderer
from castalia.data.dataset_writer import DatasetWriter, token_dtype
from castalia.data.fast_tokenizer import Encode, fast_encoder, flatten_rows, reference_encoder
from castalia.data.journal import Journal, identity
from castalia.data.record_forms import Kind
from castalia.data.sample_index import IGNORE
from castalia.data.sources import BLOCK_BYTES, Chunk, chunks, find_files, texts_of
from castalia.data.split import without_common_folder, write_sources
from castalia.data.tokenizer import Tokenizer, load_tokenizer
from castalia.data.tokenizer_folder import ids_with_texts
from castalia.errors import DataError
from castalia.machine import usable_cores

CHUNKS_IN_FLIGHT = 4  # for each worker
BYTES_PER_WORKER = 4 * BLOCK_BYTES  # with less input, starting a process takes longer than the work itself


@dataclass(frozen=True)
class Recipe:
    """How texts become token ids."""

    tokenizer: TokenizerConfig
    keys: tuple[str, ...] = ("text",)  # fields; `text|body`: the first that a record has, named by the first word
    append_eod: bool = False
    skip_bad: bool = False
    ftfy: bool = False
    mask_before: tuple[int, ...] = ()  # write labels without loss up to the end of the first occurrence of these ids
    chat: Chat | None = None  # the fields hold conversations in place of texts
    reward: str | None = None  # with chat: the field that says whether a conversation is wanted
    kind: Kind | None = None  # with chat: records of this kind in any form that is known, instead of fields by name

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the corpora that are written, each as `{output}_{name}_document`."""
        if self.chat:
            endings = ("", "_label", "_reward") if self.reward else ("", "_label")
            return tuple(f"{key}{ending}" for key in self.keys for ending in endings)
        return (*self.keys, "label") if self.mask_before else self.keys


@dataclass
class PreparationReport:
    """The progress of a preparation."""

    total_bytes: int  # of the input files
    done_bytes: int = 0
    text_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    empty: int = 0
    bad: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    files: dict[str, dict[str, int]] = field(default_factory=dict)  # by key: documents of each input file, in order
    engine: str = ""  # which engine encoded the text, for people
    end: str = ""  # the id that ends each document, and how the vocabulary writes it
    note: str = ""  # `Tokenizer.note`, or that documents have no ends
    continued: dict[str, int] = field(default_factory=dict)  # the counts with which an interrupted run was continued


@dataclass(frozen=True)
class Encoded:
    """A tokenized chunk: for each output the ids back to back, and the number of ids of each document."""

    outputs: dict[str, tuple[np.ndarray, np.ndarray]]
    text_bytes: int
    empty: int
    bad: list[str]
    done_bytes: int
    path: str  # of the file


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    recipe: Recipe,
    *,
    workers: int | None = None,
    num_docs: int | None = None,
    on_progress: Callable[[PreparationReport], None] = lambda report: None,
) -> PreparationReport:
    """Write a corpus `{output}_{key}_document` for each field, and one of its labels if the recipe has labels.

    `num_docs` stops after this many documents. `workers` None uses all cores. Raises DataError for inputs that cannot
    be used, and then leaves nothing behind. After an interruption, the same call continues the work.
    """
    tokenizer = load_tokenizer(recipe.tokenizer)
    _check(recipe, tokenizer)
    files = find_files(inputs)
    report = PreparationReport(sum(file.stat().st_size for file in files))
    dtype = np.dtype("<i4") if recipe.mask_before or recipe.chat else token_dtype(tokenizer.vocab_size)
    try:
        with ExitStack() as stack:
            prefixes = {name: _prefix(output, name) for name in recipe.outputs}
            writers = {
                name: stack.enter_context(DatasetWriter(p, dtype, resumable=True)) for name, p in prefixes.items()
            }
            sources = [*files, *_tokenizer_files(recipe.tokenizer)]
            known = identity(sources, recipe, tokenizer.ends, num_docs, BLOCK_BYTES)
            journal = stack.enter_context(Journal(output, known, list(writers.values())))
            done, counts = journal.restore()
            report = replace(report, **counts, continued=counts)
            stream = islice(chunks(files, () if recipe.kind else recipe.keys), done, None)
            results = stack.enter_context(closing(_encode_all(stream, recipe, tokenizer, workers, report)))
            for number, encoded in enumerate(results, start=done + 1):
                left = None if num_docs is None else num_docs - report.documents
                _write(encoded, writers, recipe.keys, report, left)
                on_progress(report)
                if num_docs is not None and report.documents >= num_docs:
                    break
                journal.note(number, {name: getattr(report, name) for name in NOTED})
            if not report.documents:
                raise DataError(
                    f"no documents in {', '.join(map(str, files))} ({report.empty} empty, {len(report.bad)} bad)"
                )
            for (
                key,
                counts,
            ) in report.files.items():  # before the index appears, whose sizes they name
                if len(counts) > 1:
                    write_sources(prefixes[key], writers[key].sizes, _by_name(counts))
    except OSError as error:
        raise DataError(f"cannot prepare {output}: {error}") from error
    report.outputs = list(prefixes.values())
    report.note = tokenizer.note
    if tokenizer.eod_id is not None and (recipe.append_eod or recipe.chat):
        report.end = ids_with_texts([tokenizer.eod_id], tokenizer.token)
    elif tokenizer.eod_id is not None and not report.note and tokenizer.encode("")[-1:] != [tokenizer.eod_id]:
        report.note = "documents follow one another with no mark between them; --append-eod ends each with one"
    return report


def _by_name(counts: dict[str, int]) -> list[tuple[str, int]]:
    return list(zip(without_common_folder(list(counts)), counts.values(), strict=True))


NOTED = ("done_bytes", "text_bytes", "documents", "tokens", "empty", "bad", "files")


def _tokenizer_files(config: TokenizerConfig) -> list[Path]:
    given = [Path(path) for path in (config.path, config.merges) if path]
    return [file for path in given for file in ([path] if path.is_file() else sorted(path.glob("*")))]


def _check(recipe: Recipe, tokenizer: Tokenizer) -> None:
    if (recipe.append_eod or (recipe.chat and recipe.chat.for_rm)) and tokenizer.eod_id is None:
        option = "--append-eod" if recipe.append_eod else "--for-rm"
        raise DataError(f"{option}: the tokenizer has no end-of-document token such as <|endoftext|>")
    if recipe.mask_before and len(recipe.keys) > 1:
        raise DataError(f"--mask-before-token works on one key, not on {', '.join(recipe.keys)}")
    if recipe.chat:
        if recipe.mask_before or recipe.append_eod or recipe.ftfy:
            raise DataError("--chat-template excludes --mask-before-token, --append-eod and --ftfy")
        if alternatives := [key for key in recipe.keys if "|" in key]:
            raise DataError(f"--jsonl-keys {alternatives[0]}: alternatives are for texts; name one field")
        renderer(recipe.chat)
    if recipe.ftfy:
        _fix_text()


def _prefix(output: str | Path, name: str) -> str:
    return f"{output}_{name.split('|')[0]}_document"


def _fix_text() -> Callable[[str], str]:
    try:
        return import_module("ftfy").fix_text
    except ImportError:
        raise DataError("--ftfy needs the package ftfy: pip install ftfy") from None


def encode(chunk: Chunk, recipe: Recipe, tokenizer: Tokenizer, encode_texts: Encode) -> Encoded:
    """Tokenize a chunk: texts by `encode_texts`, conversations turn by turn with the tokenizer itself.

    Raises BadRecord for a record that cannot be read, unless `recipe.skip_bad`, and DataError for ids beyond the
    vocabulary.
    """
    parse = None
    if recipe.chat and recipe.kind:
        parse = records_of(recipe.kind, recipe.chat, tokenizer)
    elif recipe.chat:
        parse = conversations(recipe.chat, tokenizer, recipe.reward)
    parsed = texts_of(chunk, recipe.keys, recipe.skip_bad, parse)
    outputs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    empty, text_bytes = parsed.empty, len(chunk.lines) if recipe.chat else 0
    for key, texts in parsed.texts.items():
        if recipe.chat:
            names = [name for name in recipe.outputs if name in (key, f"{key}_label", f"{key}_reward")]
            for name, rows in zip(names, zip(*texts, strict=True) if texts else [()] * len(names), strict=True):
                outputs[name] = flatten_rows(rows)
            _check_ids(outputs[key][0], chunk, tokenizer)
            continue
        text_bytes += sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
        if recipe.ftfy:
            texts = [_fix_text()(text) for text in texts]
        ids, sizes = encode_texts(texts)
        sizes = sizes[sizes > 0]
        empty += len(texts) - len(sizes)  # a tokenizer may drop all characters of a text
        _check_ids(ids, chunk, tokenizer)
        ids = ids.astype(token_dtype(tokenizer.vocab_size))
        end = tokenizer.eod_id if recipe.append_eod else None
        if end is not None and tokenizer.encode("")[-1:] != [end]:  # some tokenizers end texts themselves
            ids, sizes = np.insert(ids, np.cumsum(sizes), end), sizes + 1
        outputs[key] = ids, sizes
        if recipe.mask_before:
            documents = np.split(ids, np.cumsum(sizes)[:-1])
            labels = [mask_labels(document, recipe.mask_before) for document in documents]
            outputs["label"] = np.concatenate(labels), sizes
    return Encoded(outputs, text_bytes, empty, parsed.bad, chunk.done_bytes, chunk.path)


def _check_ids(ids: np.ndarray, chunk: Chunk, tokenizer: Tokenizer) -> None:
    if len(ids) and ids.max() >= tokenizer.vocab_size:
        raise DataError(
            f"{chunk.path}: the tokenizer gave id {ids.max()}, beyond its vocabulary of {tokenizer.vocab_size}; "
            "its file is damaged"
        )


def mask_labels(tokens: np.ndarray, before: Sequence[int]) -> np.ndarray:
    """Labels, int32: the tokens, with -100 up to the end of the first occurrence of the ids `before`, if any."""
    labels = tokens.astype("<i4")
    if len(tokens) >= len(before):
        windows = np.lib.stride_tricks.sliding_window_view(tokens, len(before))
        hits = np.flatnonzero((windows == np.asarray(before)).all(axis=1))
        if len(hits):
            labels[: hits[0] + len(before)] = IGNORE
    return labels


def _write(
    encoded: Encoded,
    writers: dict[str, DatasetWriter],
    keys: Sequence[str],
    report: PreparationReport,
    left: int | None,
) -> None:
    """Append a chunk to the files, but at most `left` of its documents."""
    for name, writer in writers.items():
        ids, sizes = encoded.outputs[name]
        sizes = sizes[:left]
        writer.add_many(ids[: int(sizes.sum())], sizes)
        if name in keys and len(sizes):
            counts = report.files.setdefault(name, {})
            counts[encoded.path] = counts.get(encoded.path, 0) + len(sizes)
    report.documents = len(writers[keys[0]].sizes)
    report.tokens = sum(writers[key].num_tokens for key in keys)
    report.text_bytes += encoded.text_bytes
    report.empty += encoded.empty
    report.bad += encoded.bad
    report.done_bytes = encoded.done_bytes


def _encode_all(
    stream: Iterator[Chunk], recipe: Recipe, tokenizer: Tokenizer, workers: int | None, report: PreparationReport
) -> Generator[Encoded, None, None]:
    """Tokenized chunks in the order of the stream.

    The work is done by threads if the engine releases the interpreter's lock, else by processes.
    """
    first = list(islice(stream, 1))
    encode_texts = None
    if first and not recipe.chat:
        texts = texts_of(first[0], recipe.keys, recipe.skip_bad).texts
        encode_texts, report.engine = fast_encoder(tokenizer, [text for column in texts.values() for text in column])
    share = BYTES_PER_WORKER * (16 if encode_texts else 1)
    workers = min(workers or usable_cores(), 1 + report.total_bytes // share)
    stream = chain(first, stream)
    if workers == 1:
        yield from (encode(chunk, recipe, tokenizer, encode_texts or reference_encoder(tokenizer)) for chunk in stream)
        return
    pool: Executor
    work: Callable[[Chunk], Encoded]
    if encode_texts:
        pool = ThreadPoolExecutor(workers)
        work = partial(encode, recipe=recipe, tokenizer=tokenizer, encode_texts=encode_texts)
    else:
        pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=(recipe,))
        work = _encode_in_worker
    waiting: deque[Future[Encoded]] = deque()
    try:
        for chunk in stream:
            waiting.append(pool.submit(work, chunk))
            if len(waiting) >= workers * CHUNKS_IN_FLIGHT:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError("a worker process died, most likely for lack of memory; use fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker: tuple[Recipe, Tokenizer, Encode]  # in a worker process: set once when it starts


def _start_worker(recipe: Recipe) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tokenizer = load_tokenizer(recipe.tokenizer)
    _worker = recipe, tokenizer, reference_encoder(tokenizer)


def _end_with_parent() -> None:
    """End this worker when its parent does, since a parent that was killed cannot end its workers."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(chunk: Chunk) -> Encoded:
    return encode(chunk, *_worker)
