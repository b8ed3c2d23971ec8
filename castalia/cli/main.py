"""The `castalia` command. Each verb lives in a file of its own that is imported only when it runs or is asked for help."""

from __future__ import annotations

import sys
from importlib import import_module

import click
import typer
from typer.core import TyperGroup

# verb -> (module, one line of help). The module defines `app`, a typer.Typer, or `command`, a plain function.
VERBS = {
    "train": ("castalia.cli.train", "Train, fine-tune or resume a run."),
    "eval": ("castalia.cli.evaluate", "Loss, perplexity and bits per byte of a checkpoint."),
    "generate": ("castalia.cli.generate", "Write text with a checkpoint."),
    "data": ("castalia.cli.data", "Prepare corpora, look into them, show what a step trains on."),
    "tokenizer": ("castalia.cli.tokenizer", "Train a tokenizer."),
    "config": ("castalia.cli.config", "Show, check or convert configs."),
    "plan": ("castalia.cli.plan", "Parameters, memory, time and disk of a config, before it runs."),
    "inspect": ("castalia.cli.inspect", "What is inside a checkpoint of any format."),
    "plot": ("castalia.cli.plot", "Curves of one or more runs."),
}


class LazyGroup(TyperGroup):
    """Lists all verbs, imports only the one that is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        if ctx.resilient_parsing or not _is_chosen(name):
            return click.Command(name, help=VERBS[name][1])
        module = import_module(VERBS[name][0])
        if hasattr(module, "app"):
            return typer.main.get_command(module.app)
        single = typer.Typer(add_completion=False)
        single.command(name, help=module.command.__doc__)(module.command)
        return typer.main.get_command(single)


def _is_chosen(name: str) -> bool:
    return name == next((word for word in sys.argv[1:] if not word.startswith("-")), None)


app = typer.Typer(cls=LazyGroup, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def castalia() -> None:
    """Train, inspect, convert, evaluate and run GPT-style language models on plain PyTorch."""


def main() -> None:
    from castalia.errors import CastaliaError

    try:
        app()
    except CastaliaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
