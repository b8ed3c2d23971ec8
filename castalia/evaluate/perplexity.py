"""Token-weighted loss, perplexity and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from castalia.data.loader import Batch
from castalia.data.samples import IGNORE
from castalia.parallel.engine import Engine
from castalia.train.step import as_rows


def evaluate(engine: Engine, batches: Iterable[Batch]) -> dict[str, float]:
    """Mean loss over all predicted tokens, whatever their batch. Every rank is given the whole batches."""
    total, count = torch.zeros((), dtype=torch.float64, device=engine.device), 0
    with engine.evaluating():
        for batch in batches:
            total += engine.loss_sum(as_rows(batch))
            count += int(batch.loss_mask.sum())
    mean = total.item() / count if count else math.nan
    return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "tokens": count}


def windows(
    tokens: np.ndarray, length: int, stride: int, rows: int, sizes: np.ndarray | None = None
) -> Iterator[Batch]:
    """Batches of `rows` windows that predict every token of a stream once, except the first.

    Windows begin `stride` apart; each predicts only what the one before it did not. With the `sizes` of the documents
    tokens see only their own, and the first of each is not predicted.
    """
    numbers = None if sizes is None else np.repeat(np.arange(len(sizes)), sizes)
    starts = range(0, max(1, len(tokens) - 1 - (length - stride)), stride)
    for first in range(0, len(starts), rows):
        part = starts[first : first + rows]
        inputs = np.zeros((len(part), length), np.int64)
        labels = np.full((len(part), length), IGNORE, np.int64)
        for row, start in enumerate(part):
            window = tokens[start : start + length + 1]
            inputs[row, : len(window) - 1] = window[:-1]
            known = length - stride if start else 0
            labels[row, known : len(window) - 1] = window[1 + known :]
        documents = None
        if numbers is not None:
            at = np.minimum(np.array(part)[:, None] + np.arange(length + 1), len(numbers) - 1)
            documents = np.ascontiguousarray(numbers[at[:, :-1]])
            labels[documents != numbers[at[:, 1:]]] = IGNORE
        yield Batch(inputs, labels, labels != IGNORE, documents)


def bits_per_byte(loss: float, tokens: int, num_bytes: int) -> float:
    """How many bits the model needs for a byte of text; comparable across tokenizers."""
    return loss * tokens / (math.log(2) * num_bytes)
