"""Scores of continuations are those of plain forward passes, whatever prefixes are shared."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from castalia.config.schema import ModelConfig
from castalia.errors import DataError
from castalia.evaluate import continuations
from castalia.evaluate.continuations import Continuation, score_continuations
from castalia.evaluate.prefix_tree import build_tree, pieces
from castalia.model.init import initialize
from castalia.model.mamba import MambaMixer
from castalia.model.transformer import Transformer

BASE = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "vocab_size": 50, "max_positions": 64}
KINDS = {
    "rotary": {},
    "grouped": {"num_kv_heads": 2},
    "learned": {"position": "learned", "tie_embeddings": True},
    "alibi": {"position": "alibi"},
    "window": {"sliding_window": 5},
    "RWKV": {"pattern": ("rwkv", "attention"), "num_layers": 3},
    "window of some blocks": {"sliding_window": 5, "window_pattern": (True, False)},
    "Mamba": {"pattern": ("mamba", "attention"), "num_layers": 3},
    "gMLP": {"pattern": ("gmlp", "attention", "amlp"), "num_layers": 3},
}


def built(**options) -> Transformer:
    model = Transformer(ModelConfig(**BASE | options))
    initialize(model, model.cfg, seed=3)
    return model.eval()


@torch.no_grad()
def alone(model: Transformer, context, tokens, limit=64) -> tuple[float, bool]:
    ids = [*context, *tokens][-(limit + 1) :]
    logits = model(torch.tensor([ids[:-1]]))[0, -len(tokens) :]
    values = logits.log_softmax(-1)[range(len(tokens)), list(tokens)]
    return float(values.sum()), logits.argmax(-1).tolist() == list(tokens)


def requests(seed: int = 0) -> list[Continuation]:
    rng = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [rng.randrange(50) for _ in range(count)]

    shots, asked = ids(20), []
    for _ in range(6):  # questions after the same examples, four answers each
        question = shots + ids(rng.randrange(1, 9))
        asked += [Continuation(question, ids(rng.randrange(1, 5))) for _ in range(4)]
    asked += [Continuation(shots, ids(1)) for _ in range(3)]  # a context that others go on from
    asked += [Continuation(ids(70), ids(3)), Continuation(ids(1), ids(60)), asked[0]]  # too long; long; twice
    return asked


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens_a_pass", [7, 2048])
def test_scores_are_those_of_each_request_alone(kind: str, tokens_a_pass: int, monkeypatch) -> None:
    monkeypatch.setattr(continuations, "PREFILL_CHUNK_TOKENS", tokens_a_pass)
    model, asked = built(**KINDS[kind]), requests()
    for score, (context, tokens) in zip(score_continuations(model, asked), asked, strict=True):
        log_prob, greedy = alone(model, context, tokens)
        assert score.log_prob == pytest.approx(log_prob, abs=1e-4)
        assert score.greedy == greedy


def test_only_what_has_nothing_before_it_begins_with_a_new_state(monkeypatch) -> None:
    model, made, new_state = built(**KINDS["Mamba"]), [], MambaMixer.new_state
    monkeypatch.setattr(MambaMixer, "new_state", lambda *given: made.append(given) or new_state(*given))
    score_continuations(model, [Continuation([first, *range(20)], [n]) for first in (1, 2) for n in range(30)])
    assert len(made) == 2 * model.cfg.layer_kinds.count("mamba")


def test_greedy_continuations_are_told(monkeypatch) -> None:
    model, context = built(), [5, 6, 7]
    ids = list(context)
    for _ in range(4):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    best = Continuation(context, ids[3:])
    other = Continuation(context, [*ids[3:-1], (ids[-1] + 1) % 50])
    assert [score.greedy for score in score_continuations(model, [best, other])] == [True, False]


def test_shared_tokens_are_computed_once() -> None:
    sequences = [(*range(20), n) for n in range(30)]
    assert sum(piece.size for piece in pieces(build_tree(sequences))) == 20 + 30


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=12))
def test_a_tree_holds_every_sequence_once(lists: list[list[int]]) -> None:
    sequences = sorted({tuple(ids) for ids in lists})
    segments = [s for piece in pieces(build_tree(sequences)) for s in piece.segments]
    for number, ids in enumerate(sequences):
        path = [s for s in segments if s.first <= number < s.end and s.start < len(ids)]
        assert [ids[s.start : s.stop] for s in path] == [sequences[s.first][s.start : s.stop] for s in path]
        assert sum(s.stop - s.start for s in path) == len(ids)
    distinct = {ids[:n] for ids in sequences for n in range(1, len(ids) + 1)}
    assert sum(s.stop - s.start for s in segments) == len(distinct)


@pytest.mark.parametrize(
    ("context", "tokens", "message"),
    [
        ([], [1], "needs a context and a continuation"),
        ([1], [], "needs a context and a continuation"),
        ([1], [1] * 65, "65 tokens is longer than the model's 64 positions"),
        ([1], [999], "token 999 lies beyond the model's vocabulary"),
    ],
)
def test_what_has_no_score_is_refused(context, tokens, message: str) -> None:
    with pytest.raises(DataError, match=message):
        score_continuations(built(), [Continuation(context, tokens)])
