"""Token-weighted loss, perplexity and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise

import numpy as np
import torch

from castalia.data.loader import Batch
from castalia.data.sample_index import IGNORE
from castalia.model.sums import sum_dtype
from castalia.parallel.executor import Executor


def evaluate(executor: Executor, batches: Iterable[Batch]) -> dict[str, float]:
    """Mean loss over all predicted tokens of all batches, its perplexity, and the number of these tokens.

    Every rank gets whole batches, and takes its rows of them. Without predicted tokens the loss is NaN.
    """
    total, count = torch.zeros((), dtype=sum_dtype(executor.device), device=executor.device), 0
    with executor.evaluating():
        for batch, loss in executor.losses(batches):
            total += loss
            count += int(batch.loss_mask.sum())
    mean = executor.numbers(total)[0] / count if count else math.nan  # the only wait for the device
    return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "tokens": count}


def windows(
    tokens: np.ndarray,
    length: int,
    stride: int,
    rows: int,
    sizes: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    ends: Sequence[int] = (),
) -> Iterator[Batch]:
    """Batches of `rows` windows that together predict every token of a stream once, except the first.

        length 4, stride 2     tokens      0 1 2 3 4 5 6 7 8
                               window 1    i P P P P
                               window 2        i i i P P
                               window 3            i i i P P      i input only, P predicted

    Each window predicts only the tokens that the one before it did not. With the `sizes` of documents, tokens see only
    their own document, and its first token is not predicted. `labels` [tokens] are -100 for tokens that do not count.
    The stream starts anew after each of the `ends`.
    """
    numbers = None if sizes is None else np.repeat(np.arange(len(sizes)), sizes)  # of the document of each token
    answers, remaining = tokens if labels is None else labels, _spans(ends or (len(tokens),), length, stride)
    while part := list(islice(remaining, rows)):
        inputs = np.zeros((len(part), length), np.int64)
        targets = np.full((len(part), length), IGNORE, np.int64)
        for row, (start, stop, known) in enumerate(part):
            inputs[row, : stop - start - 1] = tokens[start : stop - 1]
            targets[row, known : stop - start - 1] = answers[start + 1 + known : stop]
        documents = None
        if numbers is not None:
            at = np.minimum(
                np.array([start for start, _, _ in part])[:, None] + np.arange(length + 1), len(numbers) - 1
            )
            # at [rows, length + 1]: the place of each token and its successor in the stream
            documents = np.ascontiguousarray(numbers[at[:, :-1]])
            targets[documents != numbers[at[:, 1:]]] = IGNORE
        yield Batch(inputs, targets, targets != IGNORE, documents)


def num_windows(num_tokens: int, length: int, stride: int, ends: Sequence[int] = ()) -> int:
    """How many windows `windows` makes of a stream."""
    return sum(1 for _ in _spans(ends or (num_tokens,), length, stride))


def _spans(ends: Sequence[int], length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Of each window: its tokens [start, stop), and how many of its predictions the window before it makes."""
    for begin, end in pairwise((0, *ends)):
        # A window is due while more is left than the `length - stride` known predictions; the first always is.
        for start in range(begin, max(begin + 1, end - 1 - (length - stride)), stride):
            yield start, min(start + length + 1, end), length - stride if start > begin else 0


def bits_per_byte(loss: float, tokens: int, num_bytes: int) -> float:
    """Bits that the model needs for a byte of text, which is comparable across tokenizers. `loss` is in nats."""
    return loss * tokens / (math.log(2) * num_bytes)
