"""What a request may take: size, time, number; and who may ask."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from castalia.errors import CastaliaError, out_of_memory
from castalia.serve.loaded_models import Busy
from castalia.serve.replies import error_body
from castalia.serve.request_fields import RequestError
from castalia.strict_json import to_json

log = logging.getLogger("castalia.serve")
BODY_SECONDS = 30  # in which a body has to arrive
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Gone(Exception):
    """The client has closed the connection."""


@dataclass(frozen=True)
class Limits:
    """What one request and all of them may take."""

    body_bytes: int = 8 << 20
    seconds: float = 600.0
    requests: int = 256  # at a time
    api_key: str | None = None
    hosts: frozenset[str] = field(default_factory=frozenset)  # names by which clients may call it; empty: any


class Guard:
    """Refuses requests of strangers, and those that are too many; everything else goes to the application."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits = app, limits
        self.running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "websocket":  # there are none here
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(Request(scope))
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        self.running += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.running -= 1

    def _refusal(self, request: Request) -> Response | None:
        host = _host_of(request.headers.get("host", ""))
        if self.limits.hosts and host not in self.limits.hosts:
            # A page from elsewhere whose name was made to mean this machine would get here.
            return refused(f"this server is not called {host!r}", 403)
        path = request.scope["path"]  # of a URL with the Host header in it, versions of Starlette differ
        guarded = path.startswith(("/v1", "/api", "/tokenize", "/detokenize", "/metrics"))
        if self.limits.api_key is not None and guarded and not self._knows_key(request):
            return refused("give the server's key: Authorization: Bearer KEY", 401)
        if self.running >= self.limits.requests and path != "/health":
            answer = refused(f"{self.running} requests are running, which is the most; try again later", 429)
            answer.headers["retry-after"] = "1"
            return answer
        return None

    def _knows_key(self, request: Request) -> bool:
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        known = (self.limits.api_key or "").encode()
        return kind.lower() == "bearer" and hmac.compare_digest(key.strip().encode("latin-1"), known)


def _host_of(header: str) -> str:
    """`localhost` of `localhost:8000`, `::1` of `[::1]:8000`."""
    return header[1:].partition("]")[0] if header.startswith("[") else header.partition(":")[0].lower()


def refused(message: str, status: int, param: str | None = None, code: str | None = None) -> Response:
    """An error in OpenAI's form."""
    return JSONResponse(error_body(message, status, param, code), status)


def refusal_of(error: Exception) -> Response:
    """The answer to a request that failed."""
    if isinstance(error, ClientDisconnect | Gone):
        return Response(status_code=499)  # which nobody reads
    param, code = (error.param, error.code) if isinstance(error, RequestError) else (None, None)
    return refused(*words_of(error), param, code)


def words_of(error: Exception) -> tuple[str, int]:
    """What a client is told of a request that failed, and the status. An error that nobody expected is logged."""
    if isinstance(error, RequestError):
        return str(error), error.status
    if isinstance(error, Busy):
        return str(error), 503
    if isinstance(error, CastaliaError):  # of a checkpoint, a tokenizer, a template
        return str(error), 400
    if (message := out_of_memory(error)) is not None:
        return message, 503
    log.error("a request failed", exc_info=error)
    return f"the server failed: {type(error).__name__}", 500


def answered(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint, whose errors become answers."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except HTTPException:
            raise
        except Exception as error:
            return refusal_of(error)

    return answer


async def http_error(request: Request, error: Exception) -> Response:
    """Starlette's own refusals, such as of a path that is not there, in OpenAI's form."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    answer = refused(message, error.status_code)
    answer.headers.update(error.headers or {})
    return answer


async def body_of(request: Request, limits: Limits) -> bytes:
    """The body of JSON. Raises RequestError if it is too large, comes too slowly, or is declared as anything else."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which a page from elsewhere cannot send without asking first
        raise RequestError("send JSON, with the header Content-Type: application/json", status=415)
    length = request.headers.get("content-length", "")
    too_large = RequestError(f"the body is larger than {limits.body_bytes:,} bytes", status=413)
    if length.isdecimal() and int(length) > limits.body_bytes:
        raise too_large
    parts, size = [], 0
    try:
        with anyio.fail_after(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > limits.body_bytes:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise RequestError(f"the body did not arrive within {BODY_SECONDS} seconds", status=408) from None
    return b"".join(parts)


async def json_within(request: Request, limits: Limits, work: Callable[[], Awaitable[Any]]) -> Response:
    """The result of some work, a value or the text of its JSON, unless the client goes or the time is over."""
    results: list[Any] = []

    async def keep() -> None:
        results.append(await work())

    await while_connected(request.receive, limits.seconds, keep)
    text = results[0] if isinstance(results[0], str) else to_json(results[0])
    return Response(text, media_type="application/json", headers={"Cache-Control": "no-store"})


async def while_connected(receive: Receive, seconds: float, work: Callable[[], Awaitable[None]]) -> None:
    """Do the work unless the client goes or the time is over, which cancels it.

    Raises Gone and RequestError then, else what the work raises.
    """
    failure: list[Exception] = []

    async def watch() -> None:
        message: Message = {"type": ""}
        while message["type"] != "http.disconnect":
            message = await receive()
        failure.append(Gone())
        group.cancel_scope.cancel()

    with anyio.move_on_after(seconds) as clock:
        async with anyio.create_task_group() as group:
            group.start_soon(watch)
            try:
                await work()
            except Exception as error:  # as it is, not as a group of one
                failure.append(error)
            group.cancel_scope.cancel()
    if clock.cancelled_caught:
        raise RequestError(f"the answer took more than {seconds:g} seconds", status=408)
    if failure:
        raise failure[0]
