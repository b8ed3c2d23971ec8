"""The log-probability of every token of a corpus, stored beside it, as the reference of preference tuning."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch

from castalia.data.dataset_writer import DatasetWriter
from castalia.data.indexed import IndexedDataset, open_dataset
from castalia.errors import DataError
from castalia.model.loss import IGNORE
from castalia.model.transformer import Transformer


@torch.no_grad()
def write_log_probabilities(model: Transformer, corpus: str, output: str, length: int, rows: int) -> int:
    """Write a corpus with one fp32 value for each token: the log-probability of the *next* token of its document.

    The last value of each document, and all beyond `length` input tokens, are 0. `rows` documents go through the model
    at a time. Returns the number of documents. Raises DataError for a token beyond the vocabulary of the model.
    """
    documents, limit = open_dataset(corpus), model.cfg.padded_vocab_size
    batches = _batches(documents, rows)
    with DatasetWriter(output, np.float32) as writer:
        while group := list(islice(batches, model.calls_at_once)):
            tokens = [_padded(items, length + 1, 0) for items in group]
            if (largest := max(int(each.max()) for each in tokens)) >= limit:
                raise DataError(f"{corpus}: token id {largest} lies beyond the model's vocabulary of {limit}")
            # tokens [rows, t + 1]: inputs [rows, t], and labels that are shifted by one
            calls: list[Any] = [(torch.from_numpy(each[:, :-1]).to(model.device), {}) for each in tokens]
            for items, hidden in zip(group, model.hidden_each(calls), strict=True):
                labels = torch.from_numpy(_padded(items, length + 1, IGNORE)[:, 1:]).to(model.device)
                losses = model.losses_at(hidden, labels).cpu().numpy()
                for item, loss in zip(items, losses, strict=True):  # loss [t]: of the label at each input token
                    log_probs = np.zeros(len(item), np.float32)
                    known = min(len(item) - 1, length)
                    log_probs[:known] = -loss[:known]
                    writer.add(log_probs)
    return len(documents)


def _batches(documents: IndexedDataset, rows: int) -> Iterator[list[np.ndarray]]:
    remaining = iter(documents)
    while items := list(islice(remaining, rows)):
        yield items


def _padded(items: list[np.ndarray], longest: int, fill: int) -> np.ndarray:
    """int64 [items, tokens], as wide as the longest item, but at most `longest`; `fill` follows shorter items."""
    width = min(max(2, *map(len, items)), longest)  # 2: an input and a label, even if all are empty
    out = np.full((len(items), width), fill, np.int64)
    for row, item in zip(out, items, strict=True):
        row[: min(len(item), width)] = item[:width]
    return out
