"""`castalia serve`: OpenAI's interface to checkpoints, and a page to watch, try and compare them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from castalia.serve.followers import Ranks


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
            help="of each process, for weights, keys and values of all checkpoints; default: 80% of what is free",
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="a folder of PEFT's, served by this name; may be repeated"),
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="split heads, MLP and vocabulary over so many processes")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="split the blocks over so many processes")] = 1,
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
    from castalia.cli.ranks import start_processes
    from castalia.cli.render import say
    from castalia.errors import ConfigError
    from castalia.parallel.process_group import process_group
    from castalia.parallel.rendezvous import is_main
    from castalia.serve.app import build_app
    from castalia.serve.catalogue import Catalogue
    from castalia.serve.connections import server_of
    from castalia.serve.limits import LOOPBACK, Limits
    from castalia.serve.listening import listen
    from castalia.serve.loaded_models import Library
    from castalia.train.hardware import choose_device
    from castalia.units import parse_size

    if device not in ("auto", "cpu", "cuda", "mps"):
        raise ConfigError(f"--device {device}: choose auto, cpu, cuda or mps")
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
    budget, adapters = parse_size(memory, "--memory") if memory else None, dict(_named(each) for each in adapter or [])
    world = start_processes(tp, pp, None)
    with process_group(choose_device(device).type):
        ranks = _ranks(tp, pp, device) if world > 1 else None
        if ranks and not is_main():
            ranks.follow()
            return
        catalogue = Catalogue(paths, adapters)
        library = Library(budget, device, ranks)
        models = catalogue.models()
        listener, address = listen(host, port)
        say(f"{len(models)} checkpoints at {address}: the page there, OpenAI's interface at {address}/v1; Ctrl-C ends")
        server_of(build_app(catalogue, library, limits), host, port, limits).run([listener])


def _ranks(tp: int, pp: int, device: str) -> Ranks:
    # Here because meshes take a second to import.
    from castalia.serve.followers import Ranks
    from castalia.train.hardware import choose_device

    return Ranks(tp, pp, choose_device(device))


def _named(word: str) -> tuple[str, str]:
    from castalia.errors import ConfigError

    name, _, path = word.partition("=")
    if not name or not path:
        raise ConfigError(f"--adapter {word}: write NAME=PATH")
    return name, path
