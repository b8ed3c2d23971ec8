"""One number for each text: the reward of a reward model, or the log-probability of what counts of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from castalia.data.sample_index import IGNORE
from castalia.errors import DataError
from castalia.evaluate.record_batches import LabelledDocument, Record, record_batches
from castalia.parallel.executor import Executor


def score_documents(executor: Executor, documents: Sequence[LabelledDocument], rows: int) -> np.ndarray:
    """The value of each document, `rows` at a time: [documents], float64.

    Raises DataError, with its number, for one that is longer than the model's positions.
    """
    limit = executor.models[0].cfg.max_positions
    longest = max((len(document.ids) for document in documents), default=0)
    for number, document in enumerate(documents, start=1):
        if limit is not None and len(document.ids) - 1 > limit:
            raise DataError(f"text {number} has {len(document.ids) - 1} tokens; the model takes {limit}")
    records = [Record("answer", (document,), {}) for document in documents]
    with executor.evaluating():
        values = list(executor.values(record_batches(records, rows, longest)))
    return np.concatenate([each.cpu().double().numpy() for each in values]) if values else np.zeros(0)


def score_records(executor: Executor, records: Sequence[Record], rows: int) -> list[dict[str, Any]]:
    """The fields of each record and its scores, `rows` texts at a time.

    Reward models add `score`, language models `logprob` and `tokens`; of pairs each begins with chosen_ or rejected_.
    """
    documents = [document for record in records for document in record.documents]
    values = iter(score_documents(executor, documents, rows).tolist())
    judges = executor.models[0].cfg.reward_head

    def scores(document: LabelledDocument, side: str) -> dict[str, Any]:
        """The columns of one answer."""
        if judges:
            return {f"{side}score": next(values)}
        counted = sum(label != IGNORE for label in document.labels[1:])
        return {f"{side}logprob": next(values), f"{side}tokens": counted}

    lines = []
    for record in records:
        sides = ("chosen_", "rejected_") if len(record.documents) == 2 else ("",)
        columns = [scores(document, side) for document, side in zip(record.documents, sides, strict=True)]
        lines.append({**record.fields, **{name: value for each in columns for name, value in each.items()}})
    return lines
