"""The application: all routes at one address."""

from __future__ import annotations

from importlib.resources import files

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from castalia.serve.catalogue import Catalogue
from castalia.serve.library import Library
from castalia.serve.page_api import page_routes


def build_app(catalogue: Catalogue, library: Library) -> Starlette:
    """The server's application, for any ASGI server.

    `/v1/...` OpenAI's interface; `/api/...` what the page asks for; the page's files at `/`.
    """

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    page = str(files("castalia.serve") / "page")
    return Starlette(
        routes=[
            Route("/health", health),
            Mount("/api", routes=page_routes(catalogue, library)),
            Mount("/", StaticFiles(directory=page, html=True)),
        ]
    )
