"""What the page asks for below `/api/`. Names are looked up in the catalogue; no path from a client is opened."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from castalia.examine.residuals import logit_lens, pieces_of
from castalia.model.transformer import Transformer
from castalia.serve import page_data
from castalia.serve.limits import Limits, body_of, json_within
from castalia.serve.request_fields import RequestError, RequestFields, check_text, read_fields
from castalia.streaming.streamed_model import StreamedTransformer
from castalia.strict_json import to_json

if TYPE_CHECKING:
    from pathlib import Path

    from castalia.serve.catalogue import Catalogue, ModelEntry
    from castalia.serve.loaded_models import Library

LENS_TOKENS = 256  # of a text, whose lens has a value for each layer and token


class TextFields(RequestFields):
    """A text for a model."""

    model: str
    text: Annotated[str, Field(min_length=1, max_length=100_000)]


def page_routes(catalogue: Catalogue, library: Library, limits: Limits, threads: ThreadPoolExecutor) -> list[Route]:
    """The routes of the page; their paths begin behind `/api`. Files are read in `threads`."""

    async def json_of(function: Callable[[], Any]) -> str:
        """The JSON of the result of a function that may read files."""
        return await asyncio.wrap_future(threads.submit(lambda: to_json(function(), default=str)))

    async def told(request: Request, function: Callable[[], Any]) -> Response:
        """The result of a function that may read files, as JSON."""
        return await json_within(request, limits, lambda: json_of(function))

    def entry_of(name: str) -> ModelEntry:
        """Raises RequestError for an unknown name."""
        entry = catalogue.find(name)
        if entry is None:
            raise RequestError(f"there is no checkpoint {name[:200]!r}", "model", 404)
        return entry

    def run_of(name: str) -> Path:
        """Raises RequestError for an unknown name."""
        folder = catalogue.runs().get(name)
        if folder is None:
            raise RequestError(f"there is no run {name[:200]!r}", "name", 404)
        return folder

    async def models(request: Request) -> Response:
        """The names of all checkpoints."""
        return await told(
            request,
            lambda: [{"name": entry.name, "source": entry.source, "step": entry.step} for entry in catalogue.models()],
        )

    async def runs(request: Request) -> Response:
        """Where each run stands."""
        return await told(request, lambda: page_data.run_list(catalogue.runs()))

    async def run(request: Request) -> Response:
        """A run's events, checkpoints and settings."""
        name = _word(request, "name")
        return await told(request, lambda: page_data.run_facts(name, run_of(name)))

    async def metrics(request: Request) -> Response:
        """The records of a run behind a step."""
        name, after = _word(request, "name"), _number(request, "after", 0)
        return await told(request, lambda: page_data.metrics_since(run_of(name), after))

    async def batch(request: Request) -> Response:
        """The sequences of a step."""
        name, step = _word(request, "name"), _number(request, "step")
        return await told(request, lambda: page_data.batch_of(run_of(name), step))

    async def inspect(request: Request) -> Response:
        """What is inside a checkpoint."""
        name = _word(request, "model")
        return await told(request, lambda: page_data.inspected(entry_of(name)))

    async def plan(request: Request) -> Response:
        """What the config of a checkpoint needs."""
        name = _word(request, "model")
        return await told(request, lambda: page_data.planned(entry_of(name)))

    async def diff(request: Request) -> Response:
        """What two checkpoints have in common."""
        a, b = _word(request, "a"), _word(request, "b")
        return await told(request, lambda: page_data.compared(entry_of(a), entry_of(b)))

    async def pieces(request: Request) -> Response:
        """The tokens of a text: their ids, and what each reads."""
        fields = await _text(request, limits)
        entry = entry_of(fields.model)

        async def work() -> Any:
            async with library.lease(entry) as loaded:
                words = loaded.tokenizer

                def read() -> dict[str, Any]:
                    ids = words.encode(fields.text)
                    return {"ids": ids, "texts": pieces_of(words, ids)}

                return await json_of(read)

        return await json_within(request, limits, work)

    async def lens(request: Request) -> Response:
        """What each layer predicts after each token of a text."""
        fields = await _text(request, limits)
        entry = entry_of(fields.model)

        async def work() -> Any:
            async with library.lease(entry) as loaded:
                model, words = loaded.model, loaded.tokenizer
                ids = await asyncio.wrap_future(threads.submit(words.encode, fields.text))
                if len(ids) > LENS_TOKENS:
                    raise RequestError(f"the text has {len(ids)} tokens; the lens shows {LENS_TOKENS} at most", "text")
                if not isinstance(model, Transformer):
                    raise RequestError(f"{entry.name} is split over processes, and the lens needs it whole", "model")
                if isinstance(model, StreamedTransformer):
                    raise RequestError(
                        f"{entry.name} is larger than the memory here, and the lens needs it whole", "model"
                    )
                found = await library.compute(lambda: logit_lens(model, words, fields.text))
                return await json_of(found.as_json)

        return await json_within(request, limits, work)

    return [
        Route("/models", models),
        Route("/runs", runs),
        Route("/run", run),
        Route("/metrics", metrics),
        Route("/batch", batch),
        Route("/inspect", inspect),
        Route("/plan", plan),
        Route("/diff", diff),
        Route("/pieces", pieces, methods=["POST"]),
        Route("/lens", lens, methods=["POST"]),
    ]


async def _text(request: Request, limits: Limits) -> TextFields:
    fields = read_fields(await body_of(request, limits), TextFields)
    check_text(fields.text, "text")
    return fields


def _word(request: Request, name: str) -> str:
    value = request.query_params.get(name)
    if not value:
        raise RequestError(f"{name!r} is missing", name)
    return value


def _number(request: Request, name: str, default: int | None = None) -> int:
    text = request.query_params.get(name, "" if default is None else str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 16):
        raise RequestError(f"{name!r} is not a whole number", name)
    return int(text)
