"""`castalia serve`: OpenAI's interface to checkpoints, and a page to watch, try and compare them."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    paths: Annotated[
        list[str], typer.Argument(metavar="CKPT|RUN|FOLDER...", help="checkpoints of any format, runs, folders of both")
    ],
    host: Annotated[
        str, typer.Option(help="the address to listen at; one that other machines reach needs --api-key")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="CASTALIA_API_KEY", help="what clients must send; better in $CASTALIA_API_KEY"),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="4GB",
            help="for weights, keys and values of all checkpoints; default: 80% of what is free",
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="a folder of PEFT's, served by this name; may be repeated"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    max_requests: Annotated[int, typer.Option(min=1, help="requests that run at a time; more are refused")] = 256,
    max_seconds: Annotated[float, typer.Option(min=1, help="seconds that a request may take")] = 600,
    max_body: Annotated[str, typer.Option(metavar="8MB", help="largest body of a request")] = "8MB",
) -> None:
    """Serve checkpoints at one address: OpenAI's interface, and a page to watch, try and compare them.

    \b
    Examples:
      castalia serve runs/first
      castalia serve runs --port 8080 --memory 2GB

    Models are asked for by name: of a run first@1000 or first@latest, of a folder its name. /v1/models lists them. A
    checkpoint is loaded when somebody asks for it, and the one that has gone unused the longest makes room.
    """
    from castalia.cli.render import say
    from castalia.errors import ConfigError
    from castalia.serve.app import build_app
    from castalia.serve.catalogue import Catalogue
    from castalia.serve.connections import server_of
    from castalia.serve.library import Library
    from castalia.serve.limits import LOOPBACK, Limits
    from castalia.serve.listening import listen
    from castalia.units import parse_size

    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {device}: choose auto, cpu or cuda")
    local = host in LOOPBACK
    if not local and not api_key:
        raise ConfigError(
            f"--host {host} may be reached by others: give --api-key, or set $CASTALIA_API_KEY, which clients then send"
        )
    limits = Limits(
        body_bytes=parse_size(max_body, "--max-body"),
        seconds=max_seconds,
        requests=max_requests,
        api_key=api_key,
        hosts=frozenset(LOOPBACK) if local else frozenset(),
    )
    catalogue = Catalogue(paths, dict(_named(each) for each in adapter or []))
    library = Library(parse_size(memory, "--memory") if memory else None, device)
    models = catalogue.models()
    listener, address = listen(host, port)
    say(f"{len(models)} checkpoints at {address}: the page there, OpenAI's interface at {address}/v1; Ctrl-C ends it")
    server_of(build_app(catalogue, library, limits), host, port, limits).run([listener])


def _named(word: str) -> tuple[str, str]:
    from castalia.errors import ConfigError

    name, _, path = word.partition("=")
    if not name or not path:
        raise ConfigError(f"--adapter {word}: write NAME=PATH")
    return name, path
