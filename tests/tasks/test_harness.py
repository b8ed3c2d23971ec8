"""Tasks have the same answers as from lm-eval's own model of transformers, request by request."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM

from castalia.checkpoint.opener import open_checkpoint
from castalia.data.tokenizer import train_bpe
from castalia.errors import DataError
from castalia.evaluate import continuations
from castalia.language_model import load_model
from castalia.loading import tokenizer_at
from castalia.tasks.harness import TaskModel
from castalia.tasks.task_run import open_task_model
from tests.tasks.conftest import verses


@pytest.fixture(scope="session")
def ours(folder: Path) -> TaskModel:
    return TaskModel(load_model(folder), tokenizer_at(folder))


@pytest.fixture(scope="session")
def theirs(folder: Path) -> HFLM:
    return HFLM(pretrained=str(folder), device="cpu", batch_size=4, dtype="float32")


def asked(*args: Any) -> SimpleNamespace:
    return SimpleNamespace(args=args)


TEXTS = verses()
LONG = " ".join(TEXTS)
PAIRS = [
    ("And the", " king"),
    ("And the ", "king"),  # the space goes to the continuation
    ("And the king", " said unto them, Go."),
    ("And the king", " said"),
    ("And the king", " said"),
    ("", "In the beginning"),
    ("", " In"),
    (LONG, " and it was so."),  # longer than the model
    (LONG[:-40], LONG[-40:]),
    ("Éé ☃", " ☃☃"),
    ("<s>And", " the"),
    *((f"{TEXTS[0]}\n{TEXTS[1]}\nAnd", f" {word}") for word in ("he", "she", "they went", "it came to pass")),
]


def test_log_likelihoods(ours: TaskModel, theirs: HFLM) -> None:
    requests = [asked(*pair) for pair in PAIRS]
    for pair, mine, other in zip(
        PAIRS, ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        assert mine[0] == pytest.approx(other[0], abs=1e-4), pair
        assert mine[1] == other[1], pair


@torch.no_grad()
def test_greedy_continuations(ours: TaskModel, theirs: HFLM) -> None:
    ids = ours.tok_encode("And the king")
    start = len(ids)
    for _ in range(4):
        ids.append(int(ours.model(torch.tensor([ids]))[0, -1].argmax()))
    requests = [((str(n), ""), ids[:start], ids[start:n]) for n in range(start + 1, len(ids) + 1)]
    requests.append((("other", ""), ids[:start], [*ids[start:-1], (ids[-1] + 1) % 256]))
    found = ours._loglikelihood_tokens(requests)
    assert [best for _, best in found] == [True] * 4 + [False]
    assert found == [(pytest.approx(v, abs=1e-4), best) for v, best in theirs._loglikelihood_tokens(requests, True)]


def test_whole_texts(ours: TaskModel, theirs: HFLM) -> None:
    texts = (*TEXTS[:5], LONG, "A")
    plain, pairs = [asked(text) for text in texts], [asked("", text) for text in texts]  # the second since lm-eval 0.5
    found = ours.loglikelihood_rolling(plain)
    assert ours.loglikelihood_rolling(pairs) == [(value, False) for value in found]
    new = not lm_eval.__version__.startswith("0.4")
    expected = theirs.loglikelihood_rolling(pairs if new else plain, disable_tqdm=True)
    assert found == pytest.approx([value[0] for value in expected] if new else expected, abs=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"until": ["\n", "."], "max_gen_toks": 12, "do_sample": False},
        {"until": " ", "max_gen_toks": 12},
        {"max_gen_toks": 9, "temperature": 0.0},
        {"until": ["th", "zz"], "max_new_tokens": 20, "do_sample": False, "temperature": 1.0},
    ],
)
def test_texts(ours: TaskModel, theirs: HFLM, options: dict[str, Any]) -> None:
    requests = [asked(context, dict(options)) for context in (*TEXTS[:4], "And", LONG)]
    assert ours.generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)


@pytest.mark.parametrize("open_for_answer", [True, False])
def test_conversations(ours: TaskModel, theirs: HFLM, open_for_answer: bool) -> None:
    if ours.words.folder.template is None:
        with pytest.raises(DataError, match="has no chat template"):
            ours.apply_chat_template([{"role": "user", "content": "Who?"}])
        return
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "He"}]
    turns = turns[:1] if open_for_answer else turns
    assert ours.apply_chat_template(turns, open_for_answer) == theirs.apply_chat_template(turns, open_for_answer)
    assert ours.chat_template(True) == theirs.chat_template(True)


def test_nothing_is_certain(ours: TaskModel) -> None:
    assert ours._loglikelihood_tokens([(("a", ""), [5], [])]) == [(0.0, True)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "num_beams has no counterpart here"),
        ({"max_gen_toks": 96}, "asks for texts of 96 tokens, but the model sees 96"),
    ],
)
def test_settings_that_cannot_act_are_refused(ours: TaskModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ours.generate_until([asked("And", options)])


def test_a_tokenizer_of_another_model_is_refused(neox_folder: Path, tmp_path: Path) -> None:
    words = train_bpe(verses(), 320)
    with pytest.raises(DataError, match=r"has ids up to 319 \('.+'\), but the model has 300 rows"):
        TaskModel(load_model(neox_folder), words)


def test_a_reward_model_is_refused(neox_folder: Path) -> None:
    model = load_model(neox_folder)
    model.cfg = model.cfg.model_copy(update={"reward_head": True})
    with pytest.raises(DataError, match="this reward model predicts none"):
        TaskModel(model, tokenizer_at(neox_folder))


def test_sampled_texts_are_reproducible_and_differ(ours: TaskModel) -> None:
    requests = [asked("And", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8})] * 2
    first = ours.generate_until(requests)
    assert first == ours.generate_until(requests) and first[0] != first[1]


def test_torch_has_no_gradients(ours: TaskModel) -> None:
    assert torch.is_grad_enabled() and all(p.grad is None for p in ours.model.parameters())


def test_streamed_answers_have_the_bits_of_the_model_in_memory(folder: Path, ours: TaskModel, monkeypatch) -> None:
    """With several passes at a time through each block."""
    monkeypatch.setattr(continuations, "PREFILL_CHUNK_TOKENS", 64)
    cpu = torch.device("cpu")
    streamed = open_task_model(open_checkpoint(folder), torch.float32, cpu, memory=2_000_000_000)
    assert streamed.streamed is not None and streamed.model.calls_at_once > 1
    requests = [asked(*pair) for pair in PAIRS]
    assert streamed.loglikelihood(requests) == ours.loglikelihood(requests)
    wanted = [asked(text, {"until": ["\n"], "max_gen_toks": 8}) for text in TEXTS[:3]]
    assert streamed.generate_until(wanted) == ours.generate_until(wanted)
    streamed.close()
