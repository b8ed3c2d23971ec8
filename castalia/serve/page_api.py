"""What the page asks for below `/api/`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

if TYPE_CHECKING:
    from castalia.serve.catalogue import Catalogue
    from castalia.serve.library import Library


def page_routes(catalogue: Catalogue, library: Library) -> list[Route]:
    """The routes of the page; their paths begin behind `/api`."""

    async def models(request: Request) -> Response:
        """The names of all checkpoints."""
        return JSONResponse(
            [{"name": entry.name, "source": entry.source, "step": entry.step} for entry in catalogue.models()]
        )

    return [Route("/models", models)]
