"""Opens the corpora that a config names, with their indexes, as the `Samples` of a split."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from castalia.bars import Advance
from castalia.config.batch import batch_plan, pass_multiple, sum_until
from castalia.config.load import load_config
from castalia.config.objective import PAIRED
from castalia.config.schema import DataStage, RunConfig, Source, Text
from castalia.data.blend import blend, normalized, weights_by_documents
from castalia.data.index_cache import cached, digest_of, index_names
from castalia.data.indexed import IndexedDataset, open_dataset
from castalia.data.interventions import Interventions, read_interventions
from castalia.data.loader import Batch, Later, SampledCorpus, Samples, Split
from castalia.data.sample_index import (
    Index,
    build_overflowing,
    build_packed,
    build_unpacked,
    trainable,
)
from castalia.data.split import split_documents
from castalia.data.tokenizer import load_tokenizer
from castalia.errors import ConfigError, DataError

log = logging.getLogger(__name__)
LONG_INDEX = 10_000_000  # samples; the order of so many takes a while
BLEND_CACHED_FROM = 1 << 20  # samples; a blend of fewer is computed faster than it is read from a file
# (config, source, its text, number of samples or None for one epoch, name in the names of index files) -> corpus
OpenCorpus = Callable[[RunConfig, Source, IndexedDataset, int | None, str], SampledCorpus]


def batch_at(run: RunConfig | str | Path, step: int, split: Split = "train") -> Batch:
    """The global batch of a step of a run, which is its folder or its config.

    Steps are counted from 1, as in metrics.jsonl and by `castalia data batch`. Raises DataError as `open_data` and
    `Samples.batch` do.
    """
    if step < 1:
        raise DataError(f"there is no step {step}: a run's first step is 1")
    return _opened(run if isinstance(run, RunConfig) else load_config(run), split).batch(step - 1)


def open_data(config: RunConfig, split: Split = "train", open_corpus: OpenCorpus | None = None) -> Samples:
    """Open the corpora of a split. Their index is built or read later, see `Samples.build_index`.

    `open_corpus` replaces the way in which a source becomes a corpus (pairs of preference tuning). Raises DataError if
    the config gives the split no documents.
    """
    plan = batch_plan(config)
    wanted = _neox_sample_count(config, split, plan.batch_size)
    sources: Sequence[Source] = getattr(config.data, split)
    blended = None
    if config.data.path is not None:
        corpora: tuple[SampledCorpus, ...] = (_open_part(config, config.data.path, split, wanted),)
    elif sources:
        corpora, blended = _open_blend(config, sources, split, wanted, open_corpus or _open_corpus)
    else:
        raise DataError(f"no {split} data: give data.path or data.{split}")
    warmup = config.train.batch_size_warmup if split == "train" else None
    interventions = _interventions(config) if split == "train" else None
    staged = config.data.stages if split == "train" else ()
    return Samples(
        corpora=corpora,
        later_blend=blended,
        seq_length=config.data.seq_length,
        batch_size=plan.batch_size,
        unit=warmup.unit if warmup else pass_multiple(config, plan.batch_size),
        vocab_size=config.model.vocab_size if config.model else None,
        masked_after=load_tokenizer(config.tokenizer, neox=config.neox_exact).eod_id
        if config.data.mask_after_eod
        else None,
        mask_documents=config.data.mask_documents,
        exact=config.neox_exact,
        length_warmup=config.data.seq_length_warmup if split == "train" else None,
        batch_warmup=warmup,
        earlier=config.train.earlier_batches if split == "train" else (),
        cut=config.data.packing != "packed",
        has_whole=config.train.objective == "orpo",
        interventions=interventions,
        stages=tuple((stage.first_step - 1, _stage(config, stage, interventions)) for stage in staged),
    )


def _stage(config: RunConfig, stage: DataStage, interventions: Interventions | None) -> Samples:
    """The samples of a run that is in this stage from its first step on."""
    corpora = {"data.path": None, "data.train": stage.train} if stage.train else {}
    length = stage.seq_length or config.data.seq_length
    # The interventions are the run's, whose rows may be longer than this stage's.
    own = config.with_({"data.stages": (), "data.intervene": None, "data.seq_length": length, **corpora})
    return replace(open_data(own), interventions=interventions)


def _interventions(config: RunConfig) -> Interventions | None:
    """The interventions that the config names. Raises DataError for steps and rows that the run does not have."""
    if config.data.intervene is None:
        return None
    if config.train.objective != "causal":
        raise DataError(f"data.intervene changes sequences; train.objective={config.train.objective} has others")
    interventions = read_interventions(config.data.intervene, config.data.seq_length + 1)
    sizes = config.train.batch_size_warmup, batch_plan(config).batch_size, config.train.earlier_batches
    layout, weighted = config.parallel, any(change.weight != 1.0 for change in interventions.rows.values())
    if weighted and (layout.pp > 1 or layout.cp > 1 or config.train.z_loss or config.neox_exact):
        raise DataError(
            f"{interventions.path}: weights of rows need parallel.pp=1, parallel.cp=1, train.z_loss=0 and no "
            "neox_exact; replace or mask rows, or change these"
        )
    for step, row in interventions.rows:
        if config.train.steps is not None and step >= config.train.steps:
            raise DataError(f"{interventions.path}: step {step + 1}: the run's steps are 1 to {config.train.steps}")
        size = sum_until(sizes[0], step + 1, *sizes[1:]) - sum_until(sizes[0], step, *sizes[1:])
        if row >= size:
            raise DataError(f"{interventions.path}: step {step + 1} has rows 0 to {size - 1}, and no row {row}")
    return interventions


_opened = lru_cache(maxsize=6)(open_data)


def has_data(config: RunConfig, split: Split) -> bool:
    """Whether the config gives the split any documents."""
    if config.data.path is None:
        return bool(getattr(config.data, split))
    return len(split_documents(config.data, open_dataset(config.data.path))[split]) > 0


def _neox_sample_count(config: RunConfig, split: Split, batch_size: int) -> int | None:
    """The number of samples for which GPT-NeoX builds its index, which decides their order; None: one epoch."""
    if config.train.steps is None or config.train.epochs is not None:
        return None
    if split != "train" and config.eval.batches is None:
        return _enough_for_all(config, split)
    batches = config.eval.batches or 0
    evaluations = config.train.steps // config.eval.every + 1 if config.eval.every else 1
    return {
        "train": sum_until(
            config.train.batch_size_warmup, config.train.steps, batch_size, config.train.earlier_batches
        ),
        "valid": evaluations * batches * batch_size,
        "test": batches * batch_size,
    }[split]


def _enough_for_all(config: RunConfig, split: Split) -> int:
    """A number of samples of which each source's share holds all its documents."""
    sources: Sequence[Source] = getattr(config.data, split)
    if config.data.path is not None:
        return len(open_dataset(config.data.path))
    weights = normalized([source.weight for source in sources]).tolist()
    sizes = (len(open_dataset(source.path)) for source in sources)
    return max(math.ceil(size / weight) for size, weight in zip(sizes, weights, strict=True)) + 1


def _most_samples(config: RunConfig, split: Split, sizes: np.ndarray) -> int:
    """The samples of as many passes over documents of these `sizes` as are shuffled together."""
    passes = config.data.shuffled_passes
    if split != "train" or passes is None:
        return sys.maxsize
    if config.data.packing != "packed" or config.train.objective in PAIRED:
        return passes * len(sizes)
    return max(1, (passes * int(sizes.sum(dtype=np.int64)) - 1) // config.data.seq_length)


def repeats_order(config: RunConfig) -> bool:
    """Whether training takes more passes over a corpus than are shuffled together, so that their order comes again.

    Raises DataError for a corpus that is not there.
    """
    wanted, sources = _neox_sample_count(config, "train", batch_plan(config).batch_size), config.data.train
    if wanted is None:
        return False
    if config.data.path is not None:
        text = open_dataset(config.data.path)
        return wanted > _most_samples(config, "train", text.sizes[split_documents(config.data, text)["train"]])
    weights = normalized([source.weight for source in sources]).tolist()
    sizes = (open_dataset(source.path).sizes for source in sources)
    return any(
        math.ceil(wanted * weight * 1.005) > _most_samples(config, "train", of_source)
        for of_source, weight in zip(sizes, weights, strict=True)
    )


def _open_part(config: RunConfig, prefix: str, split: Split, wanted: int | None) -> SampledCorpus:
    data = open_dataset(prefix)
    documents = split_documents(config.data, data)[split]
    if not len(documents):
        raise DataError(
            f"no {split} data: data.split={config.data.split!r} gives it none of the {len(data)} documents of {prefix}"
            + (" (equal ones count as one: data.holdout=hash)" if config.data.holdout == "hash" else "")
        )
    if wanted is not None:
        wanted = min(wanted, _most_samples(config, split, data.sizes[documents]))
    return _index(config, data, None, documents, wanted, split)


def _open_blend(
    config: RunConfig, sources: Sequence[Source], split: Split, wanted: int | None, open_corpus: OpenCorpus
) -> tuple[tuple[SampledCorpus, ...], Later[tuple[np.ndarray, np.ndarray]]]:
    texts = [open_dataset(source.path) for source in sources]
    if config.data.weight_by_documents:
        weights = weights_by_documents([len(text) for text in texts], config.data.weight_alpha)
    else:
        weights = normalized([source.weight for source in sources])
    limits = [_most_samples(config, split, text.sizes) for text in texts]
    # So many positions that the source which repeats least has all its passes in them.
    shares = list(zip(limits, weights.tolist(), strict=True))
    whole = max(math.ceil(min(limit / weight, sys.maxsize)) if weight else 0 for limit, weight in shares)
    bounded = wanted is not None and any(math.ceil(wanted * weight * 1.005) > limit for limit, weight in shares)
    if wanted is not None:
        wanted = min(wanted, whole)
    corpora = []
    for number, (source, text, weight) in enumerate(zip(sources, texts, weights.tolist(), strict=True)):
        share = None if wanted is None else min(math.ceil(wanted * weight * 1.005), limits[number])
        corpora.append(open_corpus(config, source, text, share, f"{split}_{number}"))

    def make(advance: Advance) -> tuple[np.ndarray, np.ndarray]:
        # GPT-NeoX blends as many as it has; of sources that repeat within their share the index has too few.
        size = wanted if bounded and wanted else sum(len(corpus.index) for corpus in corpora)
        advance(0, f"blending {size:,} samples")
        if size < BLEND_CACHED_FROM:
            return blend(weights, size)
        prefix, fingerprint = sources[0].path, digest_of(weights, size)
        names = [f"{Path(prefix).name}_{split}_blend_{fingerprint}"]
        parts = ("dataset_index", "dataset_sample_index")
        index, sample = cached(prefix, config.data.cache_dir, names, parts, fingerprint, lambda: blend(weights, size))
        return index, sample

    return tuple(corpora), Later(make)


def _open_corpus(
    config: RunConfig, source: Source, text: IndexedDataset, wanted: int | None, name: str
) -> SampledCorpus:
    labels = open_labels(source, text)
    corpus = _index(config, text, labels, np.arange(len(text), dtype=np.int32), wanted, name)
    return with_judgements(corpus, source, source.rewards) if config.train.objective == "kto" else corpus


def open_labels(source: Text, text: IndexedDataset) -> IndexedDataset | None:
    """The labels of a source, or None if it names none. Raises DataError unless there is one label for each token."""
    return _open_aligned(source.labels, source.path, text, "labels")


def _open_aligned(prefix: str | None, path: str, text: IndexedDataset, what: str) -> IndexedDataset | None:
    if prefix is None:
        return None
    aligned = open_dataset(prefix)
    if not np.array_equal(aligned.sizes, text.sizes):
        raise DataError(f"{what} {prefix} do not match {path}: each document needs as many {what} as tokens")
    return aligned


def with_judgements(corpus: SampledCorpus, source: Text, rewards: str | None = None) -> SampledCorpus:
    """The corpus as preference tuning reads it: each sample is one document, with its rewards and references.

    Raises DataError if the files have other sizes than the corpus.
    """
    references = _open_aligned(source.references, source.path, corpus.text, "references")
    if rewards is None:
        return replace(corpus, references=references, alone=True)
    judged = open_dataset(rewards)
    if len(judged) != len(corpus.text) or (len(judged) and judged.sizes.min() < 1):
        raise DataError(
            f"rewards {rewards} hold {len(judged)} items for the {len(corpus.text)} documents of {source.path}: "
            "each document needs its number"
        )
    return replace(corpus, references=references, rewards=judged, alone=True)


def _index(
    config: RunConfig,
    text: IndexedDataset,
    labels: IndexedDataset | None,
    documents: np.ndarray,
    wanted: int | None,
    name: str,
) -> SampledCorpus:
    """Build the index of a corpus, or read it from its files. `name` is the split in the names of those files."""
    data, seed = config.data, config.seed
    length, packing = data.seq_length, data.packing
    usable = _usable(config, text, labels, documents)

    def build(advance: Advance) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if wanted and wanted >= LONG_INDEX:  # so that nobody waits without knowing for what
            passes = wanted * length / max(1, int(text.sizes[documents].sum(dtype=np.int64)))
            log.warning(
                "%s: working out the order of %s samples,\n  %s passes over it; if that is too many: Ctrl-C, and "
                "a smaller train.steps or train.batch_size",
                text.prefix,
                f"{wanted:,}",
                f"{passes:,.0f}" if passes >= 1000 else f"{passes:.3g}",
            )
        if packing == "packed":
            index = build_packed(text.sizes, documents, wanted, length, seed, advance)
        elif wanted is None:
            raise ConfigError(f"data.packing={packing} needs train.steps: its samples have no epochs")
        elif packing == "unpacked":
            index = build_unpacked(documents[usable], wanted, seed)
        else:
            index = build_overflowing(text.sizes, documents, usable, wanted, length, seed)
        return index.documents, index.bounds, index.order

    def make(advance: Advance) -> Index:
        names = index_names(text.prefix, name, wanted, length, seed, packing, data.allow_chopped)
        fingerprint = digest_of(text.sizes, documents, usable)
        parts = ("doc_idx", "sample_idx", "shuffle_idx")
        return Index(*cached(text.prefix, data.cache_dir, names, parts, fingerprint, lambda: build(advance), advance))

    return SampledCorpus(text, labels, Later(make))


def warn_of_lost_labels(text: IndexedDataset, documents: np.ndarray, usable: np.ndarray, seq_length: int) -> None:
    """Warn of documents whose labels all lie beyond the sequence length, and of those that are cut there."""
    unseen, cut = len(usable) - int(usable.sum()), int((text.sizes[documents[usable]] > seq_length + 1).sum())
    if unseen or cut:
        log.warning(
            "%s: of %d documents %d are left out, as they have no label within data.seq_length=%d, and %d are cut "
            "there with the labels that follow",
            text.prefix,
            len(documents),
            unseen,
            seq_length,
            cut,
        )


def _usable(
    config: RunConfig, text: IndexedDataset, labels: IndexedDataset | None, documents: np.ndarray
) -> np.ndarray:
    """Which documents may be sampled, a mask [documents]. Plain packing takes all."""
    data = config.data
    usable = np.ones(len(documents), bool)
    if data.packing == "packed":
        return usable
    if data.packing == "unpacked" and labels is None:
        raise ConfigError("data.packing=unpacked needs labels: give each source of data.train its `labels`")
    if labels is not None:
        usable &= trainable(labels, documents, data.seq_length + (data.packing != "unpacked"))
        warn_of_lost_labels(text, documents, usable, data.seq_length)
    if not data.allow_chopped:
        usable &= text.sizes[documents] <= data.seq_length + 1
    return usable
