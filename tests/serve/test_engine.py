"""Continuous batching writes the same bits as a text that is alone, whatever arrives meanwhile."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from castalia.config.schema import ExpertsConfig, ModelConfig
from castalia.data.tokenizer import ByteTokenizer
from castalia.generate.generation import Sampling, stream
from castalia.generate.packed_model import pack
from castalia.model.init import initialize
from castalia.model.transformer import Transformer
from castalia.plan.serve_plan import CHUNK_TOKENS, STEP_TOKENS, serving_plan
from castalia.serve import engine as engine_module
from castalia.serve.engine import Drawn, Engine, Event, Failed, PromptScores, TextOptions, TextRow
from castalia.serve.slot_batch import exact_widths

TINY = ModelConfig(
    num_layers=2,
    hidden_size=48,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=257,
    vocab_multiple=64,
    max_positions=512,
    init_std=0.3,
    output_init_method="normal",
)
KINDS = [
    {},
    {"position": "learned", "norm": "layernorm", "parallel_residual": True},
    {"position": "alibi", "num_kv_heads": 4},
    {"sliding_window": 7},
    {"sliding_window": 7, "window_pattern": (False, True)},
    {"gated_mlp": True, "norm": "rmsnorm", "tie_embeddings": True},
    {"experts": ExpertsConfig(count=4, top_k=2), "hidden_size": 64},
    {"pattern": ("attention", "amlp"), "amlp_size": 16},
    {"pattern": ("mamba",)},
    {"pattern": ("rwkv",)},
]


def make_model(**update: object) -> Transformer:
    model = Transformer(TINY.model_copy(update=update))
    initialize(model, model.cfg, seed=1)
    return model.eval()


def make_engine(memory: int = 1 << 30, **update: object) -> Engine:
    model = make_model(**update)
    pack(model, rows=64)
    plan = serving_plan(model.cfg, 4, memory)
    assert plan is not None
    return Engine(model, ByteTokenizer("bytes"), plan)


def row_of(prompt: str | Sequence[int], **options: object) -> tuple[TextRow, list[Event]]:
    events: list[Event] = []
    ids = list(prompt.encode()) if isinstance(prompt, str) else list(prompt)
    return TextRow(ids, TextOptions(**{"max_tokens": 12, **options}), events.append), events


def run(engine: Engine, *rows: TextRow) -> None:
    engine.submit(rows)
    while engine.busy:
        engine.step()


def written(events: Sequence[Event]) -> list[tuple]:
    assert not [event for event in events if isinstance(event, Failed)]
    return [(event.token, event.score) for event in events if isinstance(event, Drawn)]


@pytest.mark.parametrize("update", KINDS, ids=str)
def test_a_text_has_the_same_bits_alone_and_among_others_that_come_and_go(update: dict) -> None:
    """Tokens, their log-probabilities, and those of the prompt, to the last bit."""
    options = {"temperature": 1.0, "seed": 7, "top": 3, "prompt_top": 2, "max_tokens": 20}
    prompts = ["ab", "the " * 40, "In the beginning", "\n"]
    alone = []
    for prompt in prompts:
        row, events = row_of(prompt, **options)
        run(make_engine(**update), row)
        alone.append(events)
    engine, draw = make_engine(**update), random.Random(3)
    ours = [row_of(prompt, **options) for prompt in prompts]
    others = [
        row_of("x" * draw.randrange(1, 300), temperature=draw.random() * 2, seed=n, max_tokens=draw.randrange(1, 40))[0]
        for n in range(64)
    ]
    waiting = [*others, *(row for row, _ in ours)]
    draw.shuffle(waiting)
    while waiting or engine.busy:
        for row in waiting[: draw.randrange(4)]:
            engine.submit([row])
            waiting.remove(row)
        engine.step()
        draw.choice(others).cancelled = draw.random() < 0.05
    widest = max(engine.widths)
    assert widest >= 32
    for expected, (_, events) in zip(alone, ours, strict=True):
        assert written(events) == written(expected)
        assert scores(events) == scores(expected)


def scores(events: Sequence[Event]) -> list:
    return [score for event in events if isinstance(event, PromptScores) for score in event.scores]


@pytest.mark.parametrize("update", KINDS, ids=str)
def test_texts_are_those_of_generate(update: dict) -> None:
    words, prompts = ByteTokenizer("bytes"), ["In the beginning", "a" * 200]
    for temperature, top_k, top_p in ((0.0, 0, 0.0), (0.9, 0, 0.0), (0.9, 20, 0.0), (0.9, 0, 0.8)):
        for prompt in prompts:
            sampling = Sampling(max_tokens=20, temperature=temperature, top_k=top_k, top_p=top_p, seed=5)
            pieces = stream(make_model(**update), words, [prompt], sampling)
            row, events = row_of(prompt, temperature=temperature, top_k=top_k, top_p=top_p, seed=5, max_tokens=20)
            run(make_engine(**update), row)
            assert "".join(event.text for event in events if isinstance(event, Drawn)) == "".join(
                piece.text for piece in pieces
            )


def test_scores_are_those_of_a_whole_forward_pass() -> None:
    model, text = make_model(), "In the beginning God created the heaven and the earth. " * 5
    ids = list(text.encode())
    row, events = row_of(ids, prompt_top=2, max_tokens=0)
    engine = make_engine()
    run(engine, row)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).log_softmax(dim=-1)[0, :, : engine.vocab_size]
    found = scores(events)
    assert len(ids) > 2 * CHUNK_TOKENS and len(found) == len(ids) - 1
    for place, score in enumerate(found):
        own = expected[place, ids[place + 1]]
        assert score.log_prob == pytest.approx(float(own), abs=1e-5)
        assert score.rank == int((expected[place] > own).sum()) + 1
        assert score.top[0][0] == int(expected[place].argmax())
        assert (score.rank == 1) == (score.log_prob == score.top[0][1])  # the same float, not a near one


@pytest.mark.parametrize("pattern", [("attention",), ("mamba", "attention"), ("mamba",)], ids="-".join)
def test_prefixes_are_computed_once_and_change_nothing(pattern: tuple[str, ...]) -> None:
    engine = make_engine(pattern=pattern)
    shared = "the same beginning of all " * 20
    first, events = row_of(shared + "one", prompt_top=0)
    run(engine, first)
    assert engine.counters["prefix_tokens"] == 0
    passes = []
    hidden = engine.model.hidden
    engine.model.hidden = lambda tokens, **options: passes.append(tokens.shape) or hidden(tokens, **options)
    second, _ = row_of(shared + "two", prompt_top=0)
    again, same = row_of(shared + "one", prompt_top=0)
    run(engine, second, again)
    whole = len(shared) // CHUNK_TOKENS * CHUNK_TOKENS
    assert engine.counters["prefix_tokens"] == 2 * whole + len(shared + "one") - whole
    assert [shape for shape in passes if shape[1] > 1] == [(1, len(shared + "two") - whole)]
    assert written(same) == written(events)
    assert scores(same) == scores(events)


def test_of_a_model_whose_states_grow_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, kept = make_engine(pattern=("amlp", "attention"), amlp_size=16), []
    monkeypatch.setattr(engine.prefixes, "add", lambda *chunk: kept.append(chunk))
    for _ in range(2):
        row, events = row_of("a" * CHUNK_TOKENS + "b", max_tokens=2)
        run(engine, row)
        assert len(written(events)) == 2
    assert not kept and engine.counters["prefix_tokens"] == 0


def test_prefixes_are_dropped_by_least_use() -> None:
    engine = make_engine()
    engine.prefixes.budget = 3 * CHUNK_TOKENS * (engine.plan.kv_each + 4 * TINY.hidden_size)
    for letter in "abca":
        run(engine, row_of(letter * CHUNK_TOKENS, max_tokens=1)[0])
    assert engine.counters["prefix_tokens"] == CHUNK_TOKENS
    run(engine, row_of("d" * CHUNK_TOKENS, max_tokens=1)[0], row_of("a" * CHUNK_TOKENS, max_tokens=1)[0])
    assert engine.counters["prefix_tokens"] == 2 * CHUNK_TOKENS
    run(engine, row_of("b" * CHUNK_TOKENS, max_tokens=1)[0])
    assert engine.counters["prefix_tokens"] == 2 * CHUNK_TOKENS
    assert engine.prefixes.bytes <= engine.prefixes.budget


def test_texts_wait_for_room_and_requests_take_turns() -> None:
    """A request of many texts does not keep out one that comes later, and no more is reserved than there is."""
    engine = make_engine()
    engine.plan = replace(engine.plan, kv_budget=8 * 40 * engine.plan.kv_each)
    order: list[str] = []

    def named(name: str) -> TextRow:
        return TextRow(
            [65] * 30, TextOptions(11), lambda e: order.append(name) if isinstance(e, Drawn) and e.finish_reason else 0
        )

    rows = [named("many") for _ in range(40)]  # a request holds them until all are done
    engine.submit(rows)
    engine.step()
    rows.append(named("one"))
    engine.submit(rows[-1:])
    most = 0
    while engine.busy:
        engine.step()
        most = max(most, engine.kv_bytes)
        assert sum(row.cache is not None for row in rows) == len(engine.filling) + len(engine.writing)
    assert most <= engine.plan.row_budget
    assert len(order) == 41 and order.index("one") < 20


def test_a_running_text_goes_on_while_a_long_prompt_is_read() -> None:
    engine = make_engine()
    row, events = row_of("short", max_tokens=30)
    engine.submit([row])
    engine.step()
    before = len(events)
    engine.submit([row_of("long " * 100, max_tokens=1)[0]])
    for _ in range(3):  # the prompt takes four steps
        engine.step()
    assert len(events) == before + 3
    assert engine.filling


def test_prompts_that_come_together_are_written_together_and_stall_others_for_no_longer_than_told() -> None:
    engine = make_engine()
    running, events = row_of("short", max_tokens=30)
    engine.submit([running])
    engine.step()
    products: list[int] = []
    logits = engine.model.logits
    engine.model.logits = lambda x: products.append(len(x)) or logits(x)
    others = [row_of(chr(65 + n) * 100, max_tokens=5) for n in range(8)]
    for row, _ in others:
        engine.submit([row])
    before, read = len(events), engine.counters["prompt_tokens"]
    engine.step()
    assert engine.counters["prompt_tokens"] - read == 6 * 100  # the first whole chunk past the limit is the last
    assert 5 * 100 < STEP_TOKENS <= 6 * 100
    engine.step()
    assert len(events) == before + 2
    assert len(products) == 2  # of all texts together, with those that begin
    while not all(events[-1].finish_reason for _, events in others):
        engine.step()
    assert engine.counters["steps"] == 6  # as many as five tokens take, and the one between the two groups


def test_a_text_that_nobody_waits_for_frees_its_slot() -> None:
    engine = make_engine()
    row, events = row_of("a", max_tokens=400)
    engine.submit([row])
    engine.step()
    row.cancelled = True
    told = len(events)
    engine.step()
    assert not engine.busy and not engine.kv_bytes and len(events) == told


def test_stops_bias_and_penalties() -> None:
    def text(**options: object) -> tuple[str, str | None]:
        row, events = row_of("In", temperature=0.0, **options)
        run(make_engine(), row)
        drawn = [event for event in events if isinstance(event, Drawn)]
        return "".join(event.text for event in drawn), drawn[-1].finish_reason

    plain, reason = text()
    assert reason == "length" and len(plain) > 4
    assert text(stop=(plain[3],)) == (plain[: plain.index(plain[3])], "stop")
    assert text(bias={ord("q"): 100.0}) == ("q" * 12, "length")
    assert text(bias={256: 100.0}) == ("", "stop")  # the end of a document
    letters, _ = text(bias={ord("q"): 100.0, ord("r"): 99.0}, presence_penalty=2.0)
    assert letters == "q" + ("r" + "q" * 11)[: len(letters) - 1] or set(letters) == {"q", "r"}
    assert set(text(bias={ord("q"): 100.0, ord("r"): 99.0}, frequency_penalty=2.0)[0]) == {"q", "r"}


def test_values_that_are_not_finite_end_one_text_with_a_message() -> None:
    engine = make_engine()
    row, events = row_of("a")
    logits = engine.model.logits
    engine.model.logits = lambda x: logits(x) * float("nan")
    run(engine, row)
    assert isinstance(events[-1], Failed) and "NaN" in events[-1].message
    engine.model.logits = logits
    row, events = row_of("a")
    run(engine, row)
    assert len(written(events)) == 12


def test_rows_that_fill_up_the_vocabulary_are_never_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer may have no word for them, and fail where it is asked."""
    engine = make_engine()
    logits = engine.model.logits
    monkeypatch.setattr(engine.model, "logits", lambda x: logits(x) + 99.0 * (torch.arange(320) >= 257))
    row, events = row_of("ab", top=20, prompt_top=20)
    run(engine, row)
    told = [token for score in scores(events) for token, _ in score.top]
    told += [token for _, score in written(events) for token, _ in score.top]
    assert len(told) > 200 and max(told) < 257


@pytest.mark.parametrize("fails_at", ["a prompt", "a token", "a choice"])
def test_a_step_that_fails_ends_every_text(fails_at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the one whose prompt was being read, and those whose token was just computed: nobody waits in vain."""
    engine = make_engine()
    told = [row_of("a" * 4, max_tokens=9) for _ in range(3)]
    engine.submit([row for row, _ in told])
    for _ in range(0 if fails_at == "a prompt" else 4):
        engine.step()

    def broken(*values: object, **options: object) -> None:
        raise MemoryError("no room")

    module, name = (engine_module, "choose") if fails_at == "a choice" else (engine.model, "hidden")
    monkeypatch.setattr(module, name, broken)
    with pytest.raises(MemoryError):
        engine.step()
    engine.fail("it failed")
    assert [events[-1] for _, events in told] == [Failed("it failed")] * 3
    assert not engine.busy and not engine.kv_bytes


def test_widths_that_change_bits_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """If batches of another width add in another order, a text would depend on its neighbours."""
    model = make_engine().model
    hidden = model.hidden

    def uneven(tokens: torch.Tensor, **options: object) -> torch.Tensor:
        return hidden(tokens, **options) * (1.0 + 1e-6 * (len(tokens) in (1, 3, 8)))

    monkeypatch.setattr(model, "hidden", uneven)
    with torch.inference_mode():
        assert exact_widths(model, (2, 3, 4, 6, 8)) == [2, 4, 6]


def test_the_plan_says_where_a_model_has_no_room() -> None:
    assert serving_plan(TINY, 4, 300_000_000) is None
    small, large = serving_plan(TINY, 4, 310_000_000), serving_plan(TINY, 4, 10**10)
    assert small is not None and large is not None
    assert small.row_budget >= small.length * small.kv_each
    assert small.kv_budget < large.kv_budget <= 10**10 / 4
    assert small.prefix_budget + small.row_budget == small.kv_budget
