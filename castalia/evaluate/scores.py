"""One number for each text: the reward of a reward model, or the log-probability of what counts of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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
    return np.concatenate([each.double().cpu().numpy() for each in values]) if values else np.zeros(0)
