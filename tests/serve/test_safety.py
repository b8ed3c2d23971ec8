"""Whatever clients do: the right status, no traceback, and the others go on."""

from __future__ import annotations

import json
import random
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from starlette.datastructures import URL
from starlette.requests import Request
from starlette.testclient import TestClient

from castalia.errors import ConfigError
from castalia.serve.answers import EventStream
from castalia.serve.app import build_app
from castalia.serve.catalogue import Catalogue
from castalia.serve.limits import Limits
from castalia.serve.listening import listen
from castalia.serve.loaded_models import Library
from tests.serve.server_process import Served, serving

GOOD = {"model": "neox", "prompt": "In the", "max_tokens": 4}


@pytest.fixture(scope="module")
def served(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("safe") / "log"
    words = [str(models), "--device", "cpu", "--memory", "2GB", "--max-body", "100KB"]
    with serving(log, *words) as served:
        httpx.post(f"{served.url}/v1/completions", json=GOOD, timeout=60).raise_for_status()
        yield served
        assert httpx.post(f"{served.url}/v1/completions", json=GOOD, timeout=60).status_code == 200
        assert not log.read_text()  # no traceback, and nothing else


def odd_value(draw: random.Random, depth: int = 0) -> object:
    """Any JSON."""
    kinds = ["", "a", "\ud800", "☃" * 9, 0, 1, -1, 2**40, 10**30, 1.5, 1e300, True, False, None, [], {}]
    if depth < 3 and draw.random() < 0.4:
        inner = [odd_value(draw, depth + 1) for _ in range(draw.randrange(4))]
        return inner if draw.random() < 0.5 else {str(n): value for n, value in enumerate(inner)}
    return draw.choice(kinds)


TEXTS = {
    "max_tokens": 2, "n": 1, "temperature": 0.5, "top_p": 0.5, "top_k": 3, "stop": "x", "seed": 3,
    "logit_bias": {"3": 1}, "stream": True, "prompt_logprobs": 1, "return_token_ids": True,
}  # fmt: skip
FIELDS = {
    "/v1/completions": {"prompt": "a", "logprobs": 1, "echo": True, **TEXTS},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "logprobs": True, **TEXTS},
    "/v1/score": {"input": "a", "add_special_tokens": True},
    "/tokenize": {"prompt": "a", "add_special_tokens": False},
    "/detokenize": {"tokens": [1, 2]},
}


def odd_body(draw: random.Random, path: str) -> bytes:
    """A request that was bent: fields of other types, of other names, or bytes that are no JSON."""
    known = FIELDS[path]
    body: object = {name: value for name, value in known.items() if draw.random() < 0.8}
    body["model"] = draw.choice(["neox", "llama"])  # type: ignore[index]
    for _ in range(draw.randrange(3)):
        body[draw.choice([*known, "model", "x", "__class__"])] = odd_value(draw)  # type: ignore[index]
    if draw.random() < 0.1:
        body = odd_value(draw)
    content = json.dumps(body).encode()
    kind = draw.random()
    if kind < 0.1:
        return content[: draw.randrange(len(content) + 1)]
    if kind < 0.2:
        return bytes(byte ^ (draw.random() < 0.05) * draw.randrange(256) for byte in content)
    if kind < 0.25:
        return b"[" * draw.randrange(100_000)
    return content


def fuzz(client: httpx.Client | TestClient, number: int, seed: int) -> dict[int, int]:
    """How often each status came."""
    draw, statuses = random.Random(seed), {}
    for _ in range(number):
        path = draw.choice(list(FIELDS))
        body = odd_body(draw, path)
        answer = client.post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (200, 400, 404, 413), (body[:500], answer.text[:500])
        if answer.status_code != 200:
            assert answer.json()["error"]["message"]
        assert "Traceback" not in answer.text
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
    return statuses


def test_malformed_requests(client: TestClient) -> None:
    statuses = fuzz(client, 300, seed=1)
    assert statuses[400] > 100 and statuses[200] > 20


@pytest.mark.campaign
def test_malformed_requests_at_length(served: Served) -> None:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        fuzz(client, 500, seed=2)
        before = served.memory()
        print(fuzz(client, 10_000, seed=3), before, served.memory())
        assert served.memory() < before + 30_000_000


def test_bodies_that_are_too_large(served: Served) -> None:
    with httpx.Client(base_url=served.url, timeout=30) as client:
        large = json.dumps({"model": "neox", "prompt": "a" * 200_000}).encode()
        kind = {"content-type": "application/json"}
        assert client.post("/v1/completions", content=large, headers=kind).status_code == 413

        def parts() -> Iterator[bytes]:
            yield from (large[at : at + 1000] for at in range(0, len(large), 1000))

        with suppress(httpx.WriteError, httpx.ReadError):  # the connection may be closed before all is sent
            assert client.post("/v1/completions", content=parts(), headers=kind).status_code == 413


def raw(served: Served, content: bytes, wait: bool = True) -> bytes:
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
        connection.sendall(content)
        return connection.recv(65536) if wait else b""


def test_what_is_no_http(served: Served) -> None:
    for content in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"A" * 100_000 + b"\r\n\r\n"):
        try:
            said = raw(served, content)
        except ConnectionError:
            said = b""
        assert said == b"" or said.startswith(b"HTTP/1.1 4"), said
    assert b" 405 " in raw(served, b"GET /v1/completions HTTP/1.1\r\nHost: localhost\r\n\r\n")
    for path in (b"/../../etc/passwd", b"/%2e%2e/%2e%2e/etc/passwd", b"/v1/models/..%2f..%2fetc/passwd"):
        said = raw(served, b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b" 404 " in said and b"root:" not in said


def test_clients_that_leave(served: Served) -> None:
    """Texts that nobody waits for are given up, streamed or not."""
    for stream in (True, False):
        body = json.dumps(GOOD | {"stream": stream, "max_tokens": 90, "n": 128, "logit_bias": {"0": -100}}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        for _ in range(4):
            raw(served, head + b"Content-Length: %d\r\n\r\n" % len(body) + body, wait=stream)
    for _ in range(200):
        figures = httpx.get(f"{served.url}/metrics").text
        if all(f'castalia_{name}{{model="neox"}} 0\n' in figures for name in ("writing", "filling", "waiting")):
            return
    pytest.fail(figures)


def test_half_a_request_holds_nothing_up(served: Served) -> None:
    held = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(50)]
    for number, connection in enumerate(held):
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: loc"[: number + 1])
    assert httpx.post(f"{served.url}/v1/completions", json=GOOD, timeout=60).status_code == 200
    for connection in held:
        connection.close()


def test_names_of_the_server(client: TestClient, models: Path, library: Library) -> None:
    limits = Limits(hosts=frozenset({"localhost", "::1"}))
    app = build_app(Catalogue([str(models)]), library, limits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "close", lambda: None)  # it serves other tests, too
        with TestClient(app, base_url="http://localhost") as inner:
            assert inner.get("/v1/models").status_code == 200
            assert inner.get("/v1/models", headers={"host": "[::1]:80"}).status_code == 200
            answer = inner.get("/v1/models", headers={"host": "evil.example"})
            assert answer.status_code == 403 and "evil.example" in answer.json()["error"]["message"]


def test_keys(models: Path, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "close", lambda: None)
    app = build_app(Catalogue([str(models)]), library, Limits(api_key="secret"))
    with TestClient(app) as client:
        for path in ("/v1/models", "/api/models", "/metrics", "/tokenizer_info"):
            for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
                assert client.get(path, headers=given).status_code == 401, path
        good = {"authorization": "Bearer secret"}
        assert client.get("/v1/models", headers=good).status_code == 200
        assert client.get("/health").status_code == 200
        assert client.get("/").status_code == 200
        # Versions of Starlette that take the Host header as it is see this path in the URL of any request.
        monkeypatch.setattr(Request, "url", URL("http://x/health?/v1/models"))
        assert client.get("/v1/models").status_code == 401
    app = build_app(Catalogue([str(models)]), library, Limits(api_key="schlüssel"))
    with TestClient(app) as client:
        key = {"authorization": "Bearer schlüssel".encode()}
        assert client.get("/v1/models", headers=key).status_code == 200


def test_requests_that_are_too_many_and_too_long(
    models: Path, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "close", lambda: None)
    app = build_app(Catalogue([str(models)]), library, Limits(requests=2, seconds=0.2))
    long = {"model": "neox", "prompt": ["a"] * 64, "n": 8, "max_tokens": 90, "logit_bias": {"0": -100}}
    with TestClient(app) as client:
        answer = client.post("/v1/completions", json=long)
        assert answer.status_code == 408 and "0.2 seconds" in answer.json()["error"]["message"]
        app.running = 2
        answer = client.post("/v1/completions", json=GOOD)
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert client.get("/health").status_code == 200


def test_the_page_keeps_the_limits(models: Path, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "close", lambda: None)
    with TestClient(build_app(Catalogue([str(models)]), library, Limits(body_bytes=50))) as client:
        for path in ("/api/pieces", "/api/lens", "/v1/score"):
            assert client.post(path, json={"model": "neox", "text": "a" * 50}).status_code == 413, path


def test_all_that_may_take_long_has_its_time(models: Path, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "close", lambda: None)
    with TestClient(build_app(Catalogue([str(models)]), library, Limits(seconds=1e-9))) as client:
        for path in (
            "/api/models",
            "/api/runs",
            "/api/inspect?model=neox",
            "/api/diff?a=neox&b=neox",
            "/tokenizer_info?model=neox",
        ):
            assert client.get(path).status_code == 408, path
        for path, fields in (
            ("/api/pieces", {"text": "a"}),
            ("/api/lens", {"text": "a"}),
            ("/tokenize", {"prompt": "a"}),
        ):
            assert client.post(path, json={"model": "neox", **fields}).status_code == 408, path


def test_a_stream_that_fails_in_the_middle_says_so_and_keeps_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    async def pieces() -> AsyncIterator[dict[str, int]]:
        yield {"a": 1}
        raise ValueError("/home/someone/secret")

    client = TestClient(EventStream(pieces, 9.0))
    first, second = client.get("/").text.split("\n\n")[:2]
    assert first == 'data: {"a": 1}' and "the server failed: ValueError" in second and "secret" not in second
    assert [record.exc_info[1].args for record in caplog.records] == [("/home/someone/secret",)]


def test_the_end_finishes_what_runs(models: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "log", str(models), "--device", "cpu", "--memory", "2GB") as served:
        body = GOOD | {"prompt": ["a"] * 32, "n": 2, "max_tokens": 80, "logit_bias": {"0": -100}, "stream": True}
        begun, ended = threading.Event(), []

        def ask() -> None:
            with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=120) as answer:
                for line in answer.iter_lines():
                    begun.set()
                    ended.append(line)

        asking = threading.Thread(target=ask)
        asking.start()
        assert begun.wait(60)
        code = served.end()
        asking.join(60)
        assert ended[-2] == "data: [DONE]"
        reasons = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in ended if line.startswith("data: {")]
        assert reasons.count("length") == 64
        assert code == -15
        assert not served.log.read_text()


def test_what_the_command_refuses(models: Path) -> None:
    from castalia.cli.serve import command

    with pytest.raises(ConfigError, match="--api-key"):
        command([str(models)], host="0.0.0.0", max_body="8MB")
    with pytest.raises(ConfigError, match="NAME=PATH"):
        command([str(models)], host="localhost", adapter=["x"], max_body="8MB", max_requests=1, max_seconds=1)
    with pytest.raises(ConfigError, match="--max-body"):
        command([str(models)], host="localhost", max_body="much", max_requests=1, max_seconds=1)
    listener, address = listen("127.0.0.1", 0)
    with listener, pytest.raises(ConfigError, match="choose another port"):
        listen("127.0.0.1", int(address.rsplit(":", 1)[1]))
