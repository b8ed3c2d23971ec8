"""The application: all routes at one address."""

from __future__ import annotations

from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from castalia.serve.catalogue import Catalogue
from castalia.serve.limits import Guard, Limits, answered, http_error
from castalia.serve.loaded_models import Library
from castalia.serve.openai_api import api_routes
from castalia.serve.page_api import page_routes

PAGE_THREADS = 8  # that read files for the page; what goes on after its client has gone keeps one
# Scripts and styles are files of the page alone; its icon is a data URL; it asks nobody but this server.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def build_app(catalogue: Catalogue, library: Library, limits: Limits | None = None) -> Guard:
    """The server's application, for any ASGI server, which closes the library when it ends.

    `/v1/...` OpenAI's interface; `/api/...` what the page asks for; the page's files at `/`.
    """
    limits, threads = limits or Limits(), ThreadPoolExecutor(PAGE_THREADS)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        threads.shutdown(wait=False, cancel_futures=True)
        library.close()

    routes = api_routes(catalogue, library, limits)
    page = str(files("castalia.serve") / "page")
    app = Starlette(
        routes=[
            Route("/health", health),
            *map(_answering, routes),
            *(Route(route.path, _refuse_method) for route in routes if "GET" not in (route.methods or ())),
            Mount("/api", routes=[_answering(route) for route in page_routes(catalogue, library, limits, threads)]),
            Mount("/", PageFiles(directory=page, html=True)),
        ],
        exception_handlers={HTTPException: http_error},
        lifespan=lifespan,
    )
    return Guard(app, limits)


class PageFiles(StaticFiles):
    """The page's files, with the order to browsers to load, send and show nothing from elsewhere."""

    def file_response(self, *args: Any, **options: Any) -> Response:
        """See StaticFiles."""
        answer = super().file_response(*args, **options)
        answer.headers.update(PAGE_HEADERS)
        return answer


async def _refuse_method(request: Request) -> Response:
    """Without this route, the folder of the page would be asked for the path."""
    raise HTTPException(405, headers={"allow": "POST"})


def _answering(route: Route) -> Route:
    """The route, with errors as answers."""
    methods = sorted((route.methods or set()) - {"HEAD"})
    return Route(route.path, answered(route.endpoint), methods=methods)
