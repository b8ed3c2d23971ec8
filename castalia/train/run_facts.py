"""Facts of a run that the planner cannot derive from its config: free disk space, corpora, schedule. Needs no torch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from castalia.config.schema import CheckpointConfig, DataConfig, RunConfig, split_shares
from castalia.errors import DataError
from castalia.plan.run_plan import CorpusFacts, RunFacts
from castalia.train.schedule import is_save_step, learning_rate

if TYPE_CHECKING:
    import numpy as np

SAMPLED_DOCUMENTS = 10_000
SAMPLED_TOKENS = 1 << 22  # of all corpora together: a few milliseconds, however large they are


def collect_run_facts(config: RunConfig) -> RunFacts:
    """What this machine knows of the run. Facts of files that are not here stay unknown."""
    steps = config.train.steps
    return RunFacts(
        corpora=corpora(config),
        rate=learning_rate(config, steps) if steps else None,
        kept_checkpoints=num_kept_checkpoints(config.checkpoint, steps) + keeps_best_apart(config) if steps else None,
        free_bytes=shutil.disk_usage(_existing(Path(config.checkpoint.dir or "."))).free,
    )


def num_kept_checkpoints(checkpoint: CheckpointConfig, steps: int) -> int:
    """How many checkpoints are left at the end of a run of `steps` steps."""
    powers = {int(checkpoint.log_base**n) for n in range(64)} if checkpoint.log_base else set()
    multiples = range(0, steps + 1, checkpoint.every or steps)
    candidates = {*checkpoint.steps, *multiples, *powers, steps}
    saved = sorted(step for step in candidates if step <= steps and is_save_step(checkpoint, step, steps))
    if not checkpoint.keep_last:
        return len(saved)
    # Of the checkpoints before the last `keep_last`, multiples of `keep_every` stay.
    older = saved[: -checkpoint.keep_last]
    milestones = sum(step % checkpoint.keep_every == 0 for step in older) if checkpoint.keep_every else 0
    return milestones + len(saved) - len(older)


def keeps_best_apart(config: RunConfig) -> bool:
    """Whether the best checkpoint may be one that is not kept anyway, and takes room of its own."""
    saves, every, data = config.checkpoint, config.eval.every, config.data
    has_data = split_shares(data.split)[1] > 0 if data.path else bool(data.valid)
    if not saves.keep_best or not every or config.eval.batches == 0 or not has_data:
        return False
    return bool(saves.keep_last or not saves.every or every % saves.every)


def corpora(config: RunConfig) -> tuple[CorpusFacts, ...]:
    """Facts of the training corpora; empty if the files of any are missing."""
    sources = [(config.data.path, 1.0)] if config.data.path else [(s.path, s.weight) for s in config.data.train]
    if not sources or not all(Path(f"{path}.{end}").is_file() for path, _ in sources for end in ("bin", "idx")):
        return ()
    from castalia.data.corpora import sampled_largest_id
    from castalia.data.indexed import open_dataset  # imported here, because a plan without data need not wait for NumPy

    facts = []
    for path, weight in sources:
        data = open_dataset(path)
        largest, looked_at = sampled_largest_id(data, SAMPLED_TOKENS // len(sources))
        documents = max(len(data.doc_index) - 1, 0) or len(data)
        tokens = int(data.sizes.sum(dtype="int64"))
        samples = None if config.data.packing == "packed" else samples_of_whole_documents(data.sizes, config.data)
        facts.append(CorpusFacts(str(path), tokens, documents, weight, largest, looked_at, samples))
    return tuple(facts)


def samples_of_whole_documents(sizes: np.ndarray, data: DataConfig) -> float:
    """The number of samples in one pass over documents of these `sizes` [documents], which are not cut.

    For many documents it is estimated from the first SAMPLED_DOCUMENTS.
    """
    usable = sizes if data.allow_chopped else sizes[sizes <= data.seq_length + 1]
    if data.packing == "unpacked":
        return len(usable)
    samples, room = 0, -1  # -1: even an empty first document opens a sample
    for size in usable[:SAMPLED_DOCUMENTS].tolist():
        if size > room:
            samples, room = samples + 1, data.seq_length + 1
        room -= size
    return samples * max(1.0, len(usable) / SAMPLED_DOCUMENTS)


def refuse_foreign_tokens(config: RunConfig) -> None:
    """Raises DataError if a corpus holds token ids beyond the vocabulary, because another tokenizer wrote it."""
    vocabulary = config.model.vocab_size if config.model else None
    for corpus in corpora(config):
        if vocabulary and corpus.largest_id is not None and corpus.largest_id >= vocabulary:
            place = config.place("data.path", "data.train")
            named = f" of {config.tokenizer.path}" if config.tokenizer.path else ""
            raise DataError(
                f"{place}{corpus.path} holds the token id {corpus.largest_id}, but the vocabulary{named} has "
                f"{vocabulary} entries: the corpus was tokenised with another tokenizer. Prepare it with the tokenizer "
                "of this config, or name the one that it was prepared with (tokenizer.path)"
            )


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder
