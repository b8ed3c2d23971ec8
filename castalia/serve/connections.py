"""Connections that do not stay open for clients who neither send nor read."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from castalia.serve.limits import Limits

HEAD_SECONDS = 20  # in which the head of a request has to arrive, counted from the connection, and an unwanted body
UNREAD_SECONDS = 60  # for which a client may leave an answer unread
KEPT_SECONDS = 20  # for which a connection waits for its next request
GROUP = 4  # connections for each request that may run


class TimedConnection(H11Protocol):
    """A connection of uvicorn's, with a time for heads of requests and one for readers."""

    late: asyncio.TimerHandle | None = None
    unread: asyncio.TimerHandle | None = None
    rest: asyncio.TimerHandle | None = None  # of a body that was not wanted, and still comes after the answer

    def connection_made(self, transport: Any) -> None:
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self.late is None and self.conn.their_state is h11.IDLE:
            self._await_head()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._head_is_there()
        if self.conn.their_state is not h11.SEND_BODY:
            self._rest_is_over()

    def on_response_complete(self) -> None:
        """Called by uvicorn."""
        super().on_response_complete()
        self._head_is_there()
        if self.conn.their_state is h11.SEND_BODY and self.rest is None:
            self.rest = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._head_is_there()
        self._rest_is_over()
        self._is_read()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """See asyncio.Protocol: the client does not read."""
        super().pause_writing()
        if self.unread is None:
            self.unread = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        super().resume_writing()
        self._is_read()

    def _await_head(self) -> None:
        self.late = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _head_is_there(self) -> None:
        if self.late is not None:
            self.late.cancel()
            self.late = None

    def _rest_is_over(self) -> None:
        if self.rest is not None:
            self.rest.cancel()
            self.rest = None

    def _is_read(self) -> None:
        if self.unread is not None:
            self.unread.cancel()
            self.unread = None


def server_of(app: Any, host: str, port: int, limits: Limits) -> uvicorn.Server:
    """uvicorn's server, which on SIGTERM lets running requests finish."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            http=TimedConnection,
            ws="none",
            log_level="critical",  # what fails, this room logs itself
            server_header=False,
            timeout_keep_alive=KEPT_SECONDS,
            timeout_graceful_shutdown=int(limits.seconds) + 1,
            limit_concurrency=GROUP * limits.requests,
            h11_max_incomplete_event_size=32 << 10,
        )
    )
