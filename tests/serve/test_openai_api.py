"""Every field of OpenAI's interface does what it says, and what is not honoured is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from castalia.config.schema import ModelConfig
from castalia.data.tokenizer import ByteTokenizer
from castalia.evaluate.continuations import Continuation, score_continuations
from castalia.language_model import load_model
from castalia.loading import tokenizer_at
from castalia.plan.serve_plan import ServingPlan
from castalia.serve.engine import TextOptions, TextRow
from castalia.serve.request_fields import RequestError
from castalia.serve.request_prompts import checked_ids, room_for
from castalia.serve.token_text import token_bytes, token_text
from tests.tasks.conftest import verses

TEXT = verses()[0]
CHAT = [{"role": "user", "content": "who?"}]


def post(client: TestClient, path: str, **fields: Any) -> dict[str, Any]:
    answer = client.post(path, json=fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def complete(client: TestClient, **fields: Any) -> dict[str, Any]:
    return post(client, "/v1/completions", **{"model": "neox", "prompt": TEXT, "temperature": 0, **fields})


def talk(client: TestClient, **fields: Any) -> dict[str, Any]:
    given = {"model": "llama", "messages": CHAT, "temperature": 0, "max_tokens": 8, **fields}
    return post(client, "/v1/chat/completions", **given)


def pieces(client: TestClient, path: str, **fields: Any) -> list[dict[str, Any]]:
    with client.stream("POST", path, json={**fields, "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def test_ids_without_a_token_are_refused() -> None:
    """Rows of a model that only fill up its vocabulary, for which a tokenizer has no text."""
    model = SimpleNamespace(
        cfg=ModelConfig(num_layers=1, hidden_size=8, num_heads=1, vocab_size=257, vocab_multiple=64)
    )
    loaded = SimpleNamespace(model=model, tokenizer=ByteTokenizer("bytes"))
    assert model.cfg.padded_vocab_size > 257 and checked_ids(loaded, [3, 256], "prompt") == [3, 256]
    with pytest.raises(RequestError, match="'prompt' has token 257; the tokenizer knows ids below 257"):
        checked_ids(loaded, [3, 257], "prompt")


def test_each_likely_token_has_its_id(client: TestClient, models: Path) -> None:
    """By its text: in JavaScript "7" comes before " the", whatever came first in the answer."""
    words = tokenizer_at(models / "neox")
    logprobs = complete(client, logprobs=20, max_tokens=3)["choices"][0]["logprobs"]
    for values, ids in zip(logprobs["top_logprobs"], logprobs["top_token_ids"], strict=True):
        assert values.keys() == ids.keys() and len(ids) >= 20
        for text, token in ids.items():
            assert text == f"token_id:{token}" or text == token_text(words, token)


@pytest.mark.parametrize("wanted", [None, 0, 1, 5])
def test_texts_that_are_accepted_have_room(wanted: int | None) -> None:
    """Else one would wait for ever, and all others behind it."""
    plan = ServingPlan(weights=0, working=0, kv_each=100, kv_budget=4000, length=512)  # 30 tokens have room
    for length in range(20, 40):
        try:
            most = room_for(SimpleNamespace(plan=plan), [1] * length, wanted, 16, "prompt")
        except RequestError:
            assert length + max(1, wanted or 0) - 1 > 30
        else:
            assert TextRow([1] * length, TextOptions(most), print).capacity * plan.kv_each <= plan.row_budget


def test_echo_tells_the_log_probabilities_of_eval(client: TestClient, models: Path) -> None:
    """To 1e-5 those of a whole forward pass; ids, text and offsets fit together."""
    words, model = tokenizer_at(models / "neox"), load_model(models / "neox")
    ids = words.encode(TEXT)[:90]
    reply = complete(client, prompt=ids, echo=True, logprobs=1, max_tokens=1)
    logprobs = reply["choices"][0]["logprobs"]
    assert logprobs["token_ids"][:-1] == ids and len(logprobs["token_logprobs"]) == len(ids) + 1
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).log_softmax(dim=-1)[0]
    for place in range(1, len(ids)):
        value = logprobs["token_logprobs"][place]
        assert value == pytest.approx(float(expected[place - 1, ids[place]]), abs=1e-5)
        assert value in logprobs["top_logprobs"][place].values()
        likeliest = int(expected[place - 1].argmax()) == ids[place]
        assert likeliest == (value == max(logprobs["top_logprobs"][place].values()))
    score = score_continuations(model, [Continuation(ids[:40], ids[40:])])[0]
    assert sum(logprobs["token_logprobs"][40:-1]) == pytest.approx(score.log_prob, abs=1e-4)
    for token, text, offset in zip(logprobs["tokens"], logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert token.startswith("bytes:") or reply["choices"][0]["text"][offset:].startswith(text)


def test_scores_without_a_text(client: TestClient, models: Path) -> None:
    words = tokenizer_at(models / "neox")
    ids = words.encode(TEXT)[:50]
    echoed = complete(client, prompt=ids, echo=True, logprobs=0, max_tokens=0)["choices"][0]
    assert echoed["text"] == words.decode(ids) and echoed["finish_reason"] == "length"
    reply = post(client, "/v1/score", model="neox", input=[ids, TEXT[:30]])
    assert reply["data"][0]["token_ids"] == ids
    assert [value and -value for value in reply["data"][0]["nll"]] == echoed["logprobs"]["token_logprobs"]
    assert reply["data"][1]["token_ids"] == words.encode(TEXT[:30])
    assert reply["usage"]["total_tokens"] == sum(len(entry["nll"]) for entry in reply["data"])


def test_prompts_of_all_forms_and_several_texts(client: TestClient, models: Path) -> None:
    words = tokenizer_at(models / "neox")
    texts = ["In the", "And God"]
    one = [complete(client, prompt=text)["choices"][0]["text"] for text in texts]
    both = complete(client, prompt=texts)["choices"]
    assert [choice["text"] for choice in both] == one and [choice["index"] for choice in both] == [0, 1]
    as_ids = complete(client, prompt=[words.encode(text) for text in texts])["choices"]
    assert [choice["text"] for choice in as_ids] == one
    drawn = complete(client, prompt=texts, n=3, temperature=1.0, seed=4)["choices"]
    assert len({choice["text"] for choice in drawn}) == 6
    alone = complete(client, prompt=texts[1], n=3, temperature=1.0, seed=4)["choices"]
    assert [choice["text"] for choice in alone] == [choice["text"] for choice in drawn[3:]]
    assert complete(client, prompt="")["usage"]["prompt_tokens"] == 1  # the end of a document begins one


@pytest.mark.parametrize("fields", [{}, {"logprobs": 2, "echo": True, "return_token_ids": True, "prompt_logprobs": 1}])
def test_a_stream_holds_what_comes_at_once(client: TestClient, fields: dict) -> None:
    asked = {"prompt": TEXT, "temperature": 1.0, "seed": 3, "max_tokens": 30, "n": 2, "model": "neox", **fields}
    whole = complete(client, **asked)
    parts = pieces(client, "/v1/completions", **asked, stream_options={"include_usage": True})
    assert len({part["id"] for part in parts}) == 1
    assert parts[-1]["usage"] == whole["usage"] and parts[-1]["choices"] == []
    for choice in whole["choices"]:
        mine = [part["choices"][0] for part in parts[:-1] if part["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in mine) == choice["text"]
        assert [part["finish_reason"] for part in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        if fields:
            for name in ("token_logprobs", "text_offset", "tokens", "bytes"):
                assert [value for part in mine for value in part["logprobs"][name]] == choice["logprobs"][name]
            assert [token for part in mine for token in part["token_ids"]] == choice["token_ids"]
            assert mine[0]["prompt_token_ids"] == choice["prompt_token_ids"]
            assert mine[0]["prompt_logprobs"] == choice["prompt_logprobs"]


def test_answers_in_conversations(client: TestClient, models: Path) -> None:
    words = tokenizer_at(models / "llama")
    reply = talk(client, logprobs=True, top_logprobs=3, return_token_ids=True)
    choice = reply["choices"][0]
    prompt = "<|user|> who?</s><|assistant|>"
    assert choice["prompt_token_ids"] == words.encode_batch([prompt], bare=True)[0]
    assert choice["message"]["role"] == "assistant"
    for entry, token in zip(choice["logprobs"]["content"], choice["token_ids"], strict=True):
        assert entry["token_id"] == token and bytes(entry["bytes"]) == token_bytes(words, token)
        assert len(entry["top_logprobs"]) == 3 and entry["logprob"] == entry["top_logprobs"][0]["logprob"]
    streamed = pieces(client, "/v1/chat/completions", model="llama", messages=CHAT, temperature=0, max_tokens=8)
    assert streamed[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(part["choices"][0]["delta"].get("content", "") for part in streamed)
    assert text == choice["message"]["content"]
    parts = [{"role": "user", "content": [{"type": "text", "text": "who?"}]}]
    assert talk(client, messages=parts)["choices"][0]["message"]["content"] == text
    assert talk(client, max_tokens=None, max_completion_tokens=8)["choices"][0]["message"]["content"] == text


def test_prompt_log_probabilities_as_vllm_writes_them(client: TestClient) -> None:
    choice = complete(client, prompt_logprobs=2, return_token_ids=True)["choices"][0]
    assert choice["prompt_logprobs"][0] is None
    for token, entries in zip(choice["prompt_token_ids"][1:], choice["prompt_logprobs"][1:], strict=True):
        own = entries[str(token)]
        assert sum(entry["rank"] <= 2 for entry in entries.values()) == 2
        assert (own["rank"] == 1) == (own["logprob"] == max(entry["logprob"] for entry in entries.values()))


def test_tokens_of_parts_of_characters_keep_their_bytes(client: TestClient, models: Path) -> None:
    words = tokenizer_at(models / "neox")
    ids = words.encode("☃é")
    reply = complete(client, prompt=ids, echo=True, logprobs=100, max_tokens=0)
    logprobs = reply["choices"][0]["logprobs"]
    assert b"".join(map(bytes, logprobs["bytes"])) == "☃é".encode()
    assert all(name.startswith("bytes:\\x") for name in logprobs["tokens"])
    assert all(len(top) in (100, 101) for top in logprobs["top_logprobs"][1:])  # no two have one name


def test_what_ends_and_bends_a_text(client: TestClient) -> None:
    plain = complete(client, max_tokens=12)["choices"][0]
    stop = plain["text"][3:5]
    cut = complete(client, max_tokens=12, stop=[stop])["choices"][0]
    assert cut["text"] == plain["text"][: plain["text"].index(stop)] and cut["finish_reason"] == "stop"
    assert complete(client, max_tokens=12, stop=stop)["choices"][0] == cut
    assert complete(client, max_tokens=3, logit_bias={"40": 100})["choices"][0]["text"] == "HHH"
    ended = complete(client, logit_bias={"0": 100}, return_token_ids=True)["choices"][0]
    assert (ended["text"], ended["token_ids"], ended["finish_reason"]) == ("", [0], "stop")
    seeds = [complete(client, temperature=1.0, seed=seed)["choices"][0]["text"] for seed in (1, 1, 2)]
    assert seeds[0] == seeds[1] != seeds[2]
    unseeded = {complete(client, temperature=1.0)["choices"][0]["text"] for _ in range(4)}
    assert len(unseeded) > 1
    assert complete(client, temperature=1.0, top_k=1)["choices"][0]["text"] == complete(client)["choices"][0]["text"]
    assert complete(client, temperature=1.0, top_p=1e-9)["choices"][0]["text"] == complete(client)["choices"][0]["text"]


@pytest.mark.parametrize("name", ["neox", "llama"])
def test_tokenizing(client: TestClient, models: Path, name: str) -> None:
    words = tokenizer_at(models / name)
    for special in (True, False):
        ids = words.encode_batch([TEXT], bare=not special)[0]
        reply = post(client, "/tokenize", model=name, prompt=TEXT, add_special_tokens=special)
        assert reply == {"tokens": ids, "count": len(ids), "max_model_len": 96}
    assert post(client, "/detokenize", model=name, tokens=ids)["prompt"] == words.decode(ids)
    info = client.get("/tokenizer_info", params={"model": name}).json()
    assert info["eos_token"] == {"neox": "<|endoftext|>", "llama": "</s>"}[name]
    assert (info["chat_template"] is None) == (name == "neox")


REFUSED = [
    ("/v1/completions", {"prompt": "a", "guided_json": {}}, 400, "guided_json"),
    ("/v1/completions", {"prompt": "a", "min_p": 0.1}, 400, "min_p"),
    ("/v1/completions", {"prompt": "a", "suffix": "b"}, 400, "suffix"),
    ("/v1/completions", {"prompt": "a", "best_of": 2}, 400, "best_of"),
    ("/v1/completions", {"prompt": "a", "temperature": -1}, 400, "temperature"),
    ("/v1/completions", {"prompt": "a", "temperature": "hot"}, 400, "temperature"),
    ("/v1/completions", {"prompt": "a", "temperature": True}, 400, "temperature"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 1.5}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 97}, 400, "prompt"),
    ("/v1/completions", {"prompt": "a", "logprobs": True}, 400, "logprobs"),
    ("/v1/completions", {"prompt": "a", "logprobs": 101}, 400, "logprobs"),
    ("/v1/completions", {"prompt": "a", "n": 0}, 400, "n"),
    ("/v1/completions", {"prompt": "a", "stop": ""}, 400, "stop"),
    ("/v1/completions", {"prompt": "a", "stop": ["b", 3]}, 400, "stop"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"9999": 1}}, 400, "logit_bias"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"1": 101}}, 400, "logit_bias"),
    ("/v1/completions", {"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream_options"),
    ("/v1/completions", {"prompt": "a", "stream": True, "stream_options": {"x": 1}}, 400, "stream_options.x"),
    ("/v1/completions", {"prompt": "a", "model": "../etc"}, 404, "model"),
    ("/v1/completions", {"prompt": "a", "model": "/etc"}, 404, "model"),
    ("/v1/completions", {"prompt": "a", "model": 3}, 400, "model"),
    ("/v1/completions", {"prompt": "a" * 2000}, 400, "prompt"),
    ("/v1/completions", {"prompt": [1, "a"]}, 400, "prompt"),
    ("/v1/completions", {"prompt": []}, 400, "prompt"),
    ("/v1/completions", {"prompt": [-1]}, 400, "prompt"),
    ("/v1/completions", {"prompt": [1 << 70]}, 400, "prompt"),
    ("/v1/completions", {"prompt": [True]}, 400, "prompt"),
    ("/v1/completions", {"prompt": "\ud800"}, 400, "prompt"),
    ("/v1/completions", {"prompt": None}, 400, "prompt"),
    ("/v1/completions", {}, 400, "prompt"),
    ("/v1/chat/completions", {"messages": []}, 400, "messages"),
    ("/v1/chat/completions", {"messages": CHAT, "tools": [{}]}, 400, "tools"),
    ("/v1/chat/completions", {"messages": CHAT, "top_logprobs": 2}, 400, "top_logprobs"),
    ("/v1/chat/completions", {"messages": CHAT, "echo": True}, 400, "echo"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a", "name": "b"}]}, 400, "messages.0.name"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": None}]}, 400, "messages.0.content"),
    ("/v1/chat/completions", {"messages": CHAT, "response_format": {"type": "json"}}, 400, "response_format.type"),
    ("/v1/chat/completions", {"messages": CHAT, "model": "neox"}, 400, "messages"),
    ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 4, "max_completion_tokens": 5}, 400, "max_tokens"),
    ("/v1/score", {"input": "a", "temperature": 1}, 400, "temperature"),
    ("/v1/score", {"input": {}}, 400, "input"),
    ("/tokenize", {}, 400, "prompt"),
    ("/tokenize", {"prompt": "\udc00"}, 400, "prompt"),
    ("/detokenize", {"tokens": ["a"]}, 400, "tokens"),
    ("/detokenize", {"tokens": [100000]}, 400, "tokens"),
]


@pytest.mark.parametrize(("path", "fields", "status", "param"), REFUSED, ids=str)
def test_what_is_refused(client: TestClient, path: str, fields: dict, status: int, param: str | None) -> None:
    once = path not in ("/v1/completions", "/v1/chat/completions") or "stream_options" in fields
    for stream in [{}] if once else [{}, {"stream": True}]:
        model = "llama" if "chat" in path else "neox"
        answer = client.post(
            path,
            content=json.dumps({"model": model, **fields, **stream}),
            headers={"content-type": "application/json"},
        )
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert error["param"] == param and error["message"] and error["type"]
        assert "Traceback" not in answer.text


def test_every_request_of_several_models_names_one(client: TestClient) -> None:
    answer = client.post("/v1/completions", json={"prompt": "a"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")


def test_models_and_metrics(client: TestClient) -> None:
    complete(client)
    assert {entry["id"] for entry in client.get("/v1/models").json()["data"]} == {"llama", "neox"}
    assert client.get("/v1/models/neox").json()["id"] == "neox"
    assert client.get("/v1/models/none").status_code == 404
    lines = client.get("/metrics").text.splitlines()
    figures = dict(line.rsplit(" ", 1) for line in lines)
    assert int(figures['castalia_generated_tokens_total{model="neox"}']) > 0
    assert int(figures['castalia_kv_bytes{model="neox"}']) == 0
    assert client.get("/health").json() == {"status": "ok"}
