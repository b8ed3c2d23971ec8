"""Clients that send slowly, or not at all, do not keep their connections."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from castalia.serve import connections, limits
from castalia.serve.app import build_app
from castalia.serve.catalogue import Catalogue
from castalia.serve.listening import listen
from castalia.serve.loaded_models import Library


@pytest.fixture
def port(models: Path, library: Library, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Of a server in a thread, with times of a moment."""
    monkeypatch.setattr(library, "close", lambda: None)  # it serves other tests, too
    for module, name in ((connections, "HEAD_SECONDS"), (connections, "UNREAD_SECONDS"), (limits, "BODY_SECONDS")):
        monkeypatch.setattr(module, name, 0.3)
    listener, address = listen("127.0.0.1", 0)
    given = limits.Limits()
    server = connections.server_of(build_app(Catalogue([str(models)]), library, given), "127.0.0.1", 0, given)
    running = threading.Thread(target=server.run, args=([listener],))
    running.start()
    yield int(address.rsplit(":", 1)[1])
    server.should_exit = True
    running.join(60)
    assert not running.is_alive()


def said(port: int, content: bytes) -> bytes:
    """All that comes until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(content)
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
        except ConnectionResetError:
            pass
        return answer


def test_heads_and_bodies_that_do_not_come(port: int) -> None:
    assert said(port, b"") == b""
    assert said(port, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n") == b""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    answer = said(port, head + b"Content-Length: 100\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 408") and b"the body did not arrive" in answer
    assert said(port, b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_a_body_that_comes_slowly_after_its_refusal(port: int) -> None:
    """Each byte of it would else keep the connection."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: 1000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(head)
        assert connection.recv(65536).startswith(b"HTTP/1.1 415")
        with pytest.raises(ConnectionError):
            for _ in range(100):
                connection.sendall(b"x")
                time.sleep(0.05)
