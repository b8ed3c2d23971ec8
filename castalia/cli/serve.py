"""`castalia serve`: OpenAI's interface to checkpoints, and a page to watch, try and compare them."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    paths: Annotated[
        list[str], typer.Argument(metavar="CKPT|RUN|FOLDER...", help="checkpoints of any format, runs, folders of both")
    ],
    host: Annotated[str, typer.Option(help="the address to listen at; others than this machine's need --api-key")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 8000,
) -> None:
    """Serve checkpoints at one address: OpenAI's interface, and a page to watch, try and compare them.

    \b
    Examples:
      castalia serve runs/first
      castalia serve runs exported --port 8080

    Models are asked for by name: of a run first@1000 or first@latest, of a folder its name. /v1/models lists them.
    """
    import uvicorn

    from castalia.serve.app import build_app
    from castalia.serve.catalogue import Catalogue
    from castalia.serve.library import Library

    uvicorn.run(build_app(Catalogue(paths), Library()), host=host, port=port, log_level="warning")
