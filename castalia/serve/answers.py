"""The texts of one request while they are written, and how they get to the client: at once, or as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from castalia.serve.engine import Drawn, Event, Failed, PromptScores, TextOptions, TextRow, TokenScore
from castalia.serve.limits import Gone, refusal_of, while_connected, words_of
from castalia.serve.loaded_models import Library, LoadedModel
from castalia.serve.replies import TextOffsets, error_body
from castalia.serve.request_fields import RequestError
from castalia.strict_json import to_json


@dataclass
class WrittenText:
    """What a text has come to, or the part of it that a piece of a stream tells."""

    prompt: list[int]
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    prompt_scores: list[TokenScore] = field(default_factory=list)
    finish_reason: str | None = None
    offsets: TextOffsets = field(default_factory=TextOffsets)

    def rest(self) -> WrittenText:
        """What comes behind the part that a piece of a stream has told."""
        return WrittenText(self.prompt, offsets=self.offsets)

    def take(self, event: Event) -> None:
        """Add what the engine tells."""
        if isinstance(event, PromptScores):
            self.prompt_scores += event.scores
        elif isinstance(event, Drawn):
            self.text += event.text
            self.finish_reason = event.finish_reason
            if event.token is not None:
                self.tokens.append(event.token)
            if event.score is not None:
                self.scores.append(event.score)


async def events_of(
    library: Library, loaded: LoadedModel, asked: Sequence[tuple[list[int], TextOptions]]
) -> AsyncIterator[tuple[int, Event]]:
    """The number of a text and what happens to it, until all are complete. To leave early cancels the others.

    Raises RequestError for a text that cannot be written.
    """
    loop, worker = asyncio.get_running_loop(), library.worker
    queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def tell(number: int, event: Event) -> None:
        worker.post(loop, queue, (number, event))

    rows = [TextRow(prompt, options, partial(tell, number)) for number, (prompt, options) in enumerate(asked)]
    library.submit(loaded, rows)
    left = len(rows)
    try:
        while left:
            number, event = await queue.get()
            if isinstance(event, Failed):
                raise RequestError(event.message, status=500)
            left -= isinstance(event, Drawn) and event.finish_reason is not None
            yield number, event
    finally:
        if left:
            for row in rows:
                row.cancelled = True
            worker.wake()


class EventStream(Response):
    """Server-sent events. Nothing is sent before the first one is there, so that an error has its status."""

    media_type = "text/event-stream"

    def __init__(self, pieces: Callable[[], AsyncIterator[Any]], seconds: float) -> None:
        """`pieces` gives JSON values. `seconds`: for all of it."""
        super().__init__()
        self.pieces, self.seconds = pieces, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the pieces until they end, the client goes, or the time is over."""
        begun = False

        async def work() -> None:
            nonlocal begun
            async with aclosing(self.pieces()) as pieces:  # type: ignore[type-var]
                async for piece in pieces:
                    if not begun:
                        begun = True
                        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                    await _data(send, to_json(piece))
            await _data(send, "[DONE]")

        try:
            await while_connected(receive, self.seconds, work)
        except Gone:
            return
        except Exception as error:
            if not begun:
                await refusal_of(error)(scope, receive, send)
                return
            message, status = words_of(error)
            await _data(send, to_json(error_body(message, status)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]


async def _data(send: Send, text: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})
    await asyncio.sleep(0)  # so that a stream with many pieces at hand lets others have their turn
