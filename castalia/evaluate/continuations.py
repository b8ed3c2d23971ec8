"""Log-probabilities of continuations after contexts, with every shared prefix computed once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from castalia.errors import DataError
from castalia.evaluate.prefix_tree import BranchCache, Piece, build_tree, pieces
from castalia.plan.stream_plan import PREFILL_CHUNK_TOKENS, SCORED_LOGITS
from castalia.streaming.streamed_model import streamed_stage


class Continuation(NamedTuple):
    """Token ids whose probability is asked for, after the ids of a context that is not empty."""

    context: Sequence[int]
    tokens: Sequence[int]


class ContinuationScore(NamedTuple):
    """The log-probability of a continuation, in nats, and whether greedy decoding would write it."""

    log_prob: float
    greedy: bool


class Wanted(NamedTuple):
    """What a request asks of the sequence that the model sees for it: `targets` from the place `first` on."""

    request: int
    first: int  # the place whose output predicts the first token of the continuation
    targets: Sequence[int]


def score_continuations(
    model: Any, requests: Sequence[Continuation], limit: int | None = None
) -> list[ContinuationScore]:
    """The scores of all requests, in their order; see `scores_as_they_come`."""
    scores = dict(scores_as_they_come(model, requests, limit))
    return [scores[number] for number in range(len(requests))]


@torch.inference_mode()
def scores_as_they_come(
    model: Any, requests: Sequence[Continuation], limit: int | None = None
) -> Iterator[tuple[int, ContinuationScore]]:
    """The number and the score of each request, from a model in eval mode, on one device or split over ranks.

    `limit`: the model sees so many tokens at most, and earlier ones are cut off; by default as many as it has
    positions. Raises DataError for a continuation without tokens, or longer than the limit, and for ids that the model
    does not have.
    """
    limit = limit or model.cfg.max_positions
    below: dict[tuple[int, ...], list[Wanted]] = {}
    for number, (context, tokens) in enumerate(requests):
        _check(context, tokens, limit, model.cfg.padded_vocab_size)
        seen = (*context, *tokens)[:-1][-(limit or 0) :]  # the last token is predicted, never seen
        below.setdefault(seen, []).append(Wanted(number, len(seen) - len(tokens), tokens))
    sequences = sorted(below)  # what `build_tree` takes: sorted and distinct
    wanted = [below[ids] for ids in sequences]
    streamed, device = streamed_stage(model), model.device
    on_disk = streamed is not None and streamed.plan.cache_on_disk
    cache = BranchCache(getattr(model, "stage", model), device, on_disk)
    left = [len(tokens) for _, tokens in requests]  # a continuation may be spread over several passes
    log_probs, greedy = [0.0] * len(requests), [True] * len(requests)
    parts = _passes(pieces(build_tree(sequences)))
    while group := list(islice(parts, model.calls_at_once)):
        calls = []
        for part in group:
            ids = chain(*(sequences[s.first][s.start : s.stop] for piece in part for s in piece.segments))
            calls.append((torch.tensor([list(ids)], device=device), {"cache": cache.of(part)}))
        for part, hidden in zip(group, model.hidden_each(calls), strict=True):  # hidden [1, t, h]
            for request, log_prob, best in _predictions(model, hidden[0], _targets(part, wanted)):
                log_probs[request] += log_prob
                greedy[request] &= best
                left[request] -= 1
                if not left[request]:
                    yield request, ContinuationScore(log_probs[request], greedy[request])


def _check(context: Sequence[int], tokens: Sequence[int], limit: int | None, num_ids: int) -> None:
    if not context or not tokens:
        raise DataError("a log-probability needs a context and a continuation of at least one token each")
    if limit and len(tokens) > limit:
        raise DataError(f"a continuation of {len(tokens)} tokens is longer than the model's {limit} positions")
    if max(*context, *tokens) >= num_ids:
        raise DataError(
            f"token {max(*context, *tokens)} lies beyond the model's vocabulary of {num_ids}; is its tokenizer right?"
        )


def _passes(waiting: Iterable[Piece]) -> Iterator[list[Piece]]:
    part: list[Piece] = []
    for piece in waiting:
        if part and sum(each.size for each in part) + piece.size > PREFILL_CHUNK_TOKENS:
            yield part
            part = []
        part.append(piece)
    if part:
        yield part


def _targets(part: Sequence[Piece], wanted: Sequence[Sequence[Wanted]]) -> list[tuple[int, int, int]]:
    """The row of the pass, the predicted token and the request of each value that the pass can give."""
    targets, row = [], 0
    for segment in chain.from_iterable(piece.segments for piece in part):
        # A shared segment serves every sequence that goes through it, each with targets of its own.
        for asked in chain.from_iterable(wanted[segment.first : segment.end]):
            first, end = max(asked.first, segment.start), min(asked.first + len(asked.targets), segment.stop)
            for place in range(first, end):
                targets.append((row + place - segment.start, asked.targets[place - asked.first], asked.request))
        row += segment.stop - segment.start
    return targets


def _predictions(
    model: Any, hidden: Tensor, targets: Sequence[tuple[int, int, int]]
) -> Iterator[tuple[int, float, bool]]:
    """For each target its request, log-probability, and whether no token is likelier. hidden [t, h]."""
    # The head runs once for a row, however many requests ask for a token after it.
    rows = sorted({row for row, _, _ in targets})
    by_row: dict[int, list[tuple[int, int]]] = {row: [] for row in rows}
    for row, token, request in targets:
        by_row[row].append((token, request))
    step = max(1, SCORED_LOGITS // model.cfg.padded_vocab_size)
    for first in range(0, len(rows), step):
        some = rows[first : first + step]
        logits = model.logits(hidden[torch.tensor(some, device=hidden.device)]).float()  # [rows, V]
        pairs = [(i, token, request) for i, row in enumerate(some) for token, request in by_row[row]]
        at = torch.tensor([(i, token) for i, token, _ in pairs], device=hidden.device)
        # [pairs]; `log_softmax` would fill another [rows, V] for a few values of it.
        values = logits[at[:, 0], at[:, 1]] - logits.logsumexp(dim=1)[at[:, 0]]
        best = logits.argmax(dim=1)[at[:, 0]] == at[:, 1]
        for (_, _, request), value, is_best in zip(pairs, values.tolist(), best.tolist(), strict=True):
            yield request, value, is_best
