"""The log-probability of every token of a corpus, stored beside it: what preference tuning takes for its reference."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch

from castalia.data.indexed import DatasetWriter, IndexedDataset, open_dataset
from castalia.errors import DataError
from castalia.model.loss import IGNORE
from castalia.model.transformer import Transformer


@torch.no_grad()
def write_log_probabilities(model: Transformer, corpus: str, output: str, length: int, rows: int) -> int:
    """Writes `output`.bin and .idx: for each document an fp32 number for each token, which is of the token after it.

    `length` is the longest input, `rows` how many documents are read at once; what lies beyond, and the last number of
    each document, is 0. Returns the number of documents.
    """
    documents, limit = open_dataset(corpus), model.cfg.padded_vocab_size
    device = next(model.parameters()).device
    with DatasetWriter(output, np.float32) as writer:
        for items in _batches(documents, rows):
            tokens = _padded(items, length + 1, 0)
            labels = torch.from_numpy(_padded(items, length + 1, IGNORE)[:, 1:]).to(device)
            if tokens.max() >= limit:
                raise DataError(f"{corpus}: token id {tokens.max()} lies beyond the model's vocabulary of {limit}")
            hidden = model.hidden(torch.from_numpy(tokens[:, :-1]).to(device))
            losses = model.token_losses(hidden, model.head_weight, labels).cpu().numpy()
            for item, found in zip(items, losses, strict=True):
                numbers = np.zeros(len(item), np.float32)
                known = min(len(item) - 1, length)
                numbers[:known] = -found[:known]
                writer.add(numbers)
    return len(documents)


def _batches(documents: IndexedDataset, rows: int) -> Iterator[list[np.ndarray]]:
    left = iter(documents)
    while items := list(islice(left, rows)):
        yield items


def _padded(items: list[np.ndarray], longest: int, fill: int) -> np.ndarray:
    """int64 [items, tokens], as wide as the longest needs, at most `longest`."""
    width = min(max(2, *map(len, items)), longest)
    out = np.full((len(items), width), fill, np.int64)
    for row, item in zip(out, items, strict=True):
        row[: min(len(item), width)] = item[:width]
    return out
