"""What a model writes, and the training text that is nearest to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from castalia.config.schema import RunConfig
from castalia.data.indexed import IndexedDataset, open_dataset
from castalia.data.split import split_documents
from castalia.data.tokenizer import Tokenizer
from castalia.errors import DataError
from castalia.generate.generation import generate
from castalia.report.copied import CommonRun, longest_runs
from castalia.report.held_out import HeldOut, Judged

TEMPERATURES = (0.5, 0.8, 1.0)
SAMPLE_TOKENS = 120
PROMPT_WORDS = 8
COPIED_BYTES = 200  # in a row: about 50 tokens of English, which Carlini et al. (2023) call memorised
SHORTEST_BYTES = 24  # of a run that is looked for
SEARCHED_TOKENS = 1 << 27


class Nearest(NamedTuple):
    """The longest stretch that a sample shares with the training text."""

    text: str
    bytes: int
    source: str  # corpus and document
    before: str  # what stands around it there
    after: str


class Sample(NamedTuple):
    """A generated text and the training text nearest to it."""

    temperature: float
    prompt: str
    text: str
    nearest: Nearest | None  # None: nothing as long as what was looked for, or nothing was searched
    copied: bool


class Search(NamedTuple):
    """What the samples were compared with."""

    tokens: int
    of_tokens: int
    shortest_bytes: int  # about; shorter runs are not looked for
    usual_bytes: float | None  # longest run of a passage of held-out text as long as the samples: what is common


def training_corpora(config: RunConfig) -> list[tuple[IndexedDataset, np.ndarray | None]]:
    """Each with a mask [documents] of what is not training text; none if any is no longer here."""
    try:
        if config.data.path:
            text = open_dataset(config.data.path)
            excluded = np.ones(len(text), bool)
            excluded[split_documents(config.data, text)["train"]] = False
            return [(text, excluded)]
        return [(open_dataset(source.path), None) for source in config.data.train]
    except DataError:
        return []


def write_samples(judged: Judged, held_out: HeldOut) -> tuple[list[Sample], Search | None]:
    """At each temperature one of a whole document and one that continues held-out text; and what was searched."""
    tokenizer = judged.tokenizer
    prompts = [
        *([""] if tokenizer.eod_id is not None else []),
        *_opening(held_out, tokenizer, judged.model.cfg.max_positions),
    ]
    written = [
        (temperature, prompt, text)
        for temperature in TEMPERATURES
        for prompt, text in zip(
            prompts,
            generate(judged.model, tokenizer, prompts, temperature=temperature, max_tokens=SAMPLE_TOKENS, seed=1),
            strict=True,
        )
    ]
    corpora = training_corpora(judged.config)
    if not corpora:
        return [Sample(*each, None, False) for each in written], None
    return compared(written, corpora, tokenizer, held_out)


def compared(
    written: Sequence[tuple[float, str, str]],
    corpora: Sequence[tuple[IndexedDataset, np.ndarray | None]],
    tokenizer: Tokenizer,
    held_out: HeldOut,
) -> tuple[list[Sample], Search]:
    """Texts, each with its temperature and prompt, and what they share with the training text."""
    spelled = [np.array(tokenizer.encode(text), np.int64) for _, _, text in written]
    passages = _passages(held_out)
    token_bytes = max(1.0, len(held_out.text) / max(held_out.num_tokens, 1))
    shortest = max(3, math.ceil(SHORTEST_BYTES / token_bytes))
    texts = [corpus for corpus, _ in corpora]
    runs, searched = longest_runs(
        [*spelled, *passages], texts, shortest, SEARCHED_TOKENS, lambda number: corpora[number][1]
    )
    samples = []
    for (temperature, prompt, text), run, tokens in zip(written, runs, spelled, strict=False):
        near = None if run is None else _shown(run, tokens, texts, tokenizer)
        least = min(COPIED_BYTES, max(len(text.encode()), COPIED_BYTES // 4))
        samples.append(Sample(temperature, prompt, text, near, near is not None and near.bytes >= least))
    usual = [_size(run, tokens, tokenizer) for run, tokens in zip(runs[len(written) :], passages, strict=True)]
    mean = sum(usual) / len(usual) if usual else None
    return samples, Search(searched.tokens, searched.of_tokens, round(shortest * token_bytes), mean)


def _opening(held_out: HeldOut, tokenizer: Tokenizer, positions: int | None) -> list[str]:
    """The first words of a held-out document, as many as half of the model's positions hold."""
    for document in held_out.documents:
        words = document.text.split(" ")
        if len(words) > 2 * PROMPT_WORDS:
            prompts = (" ".join(words[:number]) for number in range(PROMPT_WORDS, 0, -1))
            fitting = (each for each in prompts if len(tokenizer.encode(each)) <= (positions or 1 << 20) // 2)
            return list(islice(fitting, 1))
    return []


def _passages(held_out: HeldOut) -> list[np.ndarray]:
    """As long as the samples, from the middle of documents: what runs of ordinary text have in common with other."""
    long = [document.tokens for document in held_out.documents if len(document.tokens) > SAMPLE_TOKENS]
    chosen = long[:: max(1, len(long) // 8)][:8]
    return [tokens[(len(tokens) - SAMPLE_TOKENS) // 2 :][:SAMPLE_TOKENS] for tokens in chosen]


def _size(run: CommonRun | None, tokens: np.ndarray, tokenizer: Tokenizer) -> int:
    return 0 if run is None else len(tokenizer.decode(tokens[run.start : run.stop].tolist()).encode())


def _shown(run: CommonRun, tokens: np.ndarray, corpora: Sequence[IndexedDataset], tokenizer: Tokenizer) -> Nearest:
    document = corpora[run.corpus][run.document].astype(np.int64)
    text = tokenizer.decode(tokens[run.start : run.stop].tolist())
    before = tokenizer.decode(document[max(0, run.at - 20) : run.at].tolist())
    after = tokenizer.decode(document[run.at + run.length : run.at + run.length + 20].tolist())
    source = f"{Path(corpora[run.corpus].prefix).name}, document {run.document:,}"
    return Nearest(text, len(text.encode()), source, before, after)
