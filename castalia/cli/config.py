"""`castalia config`: what a config means, whether it is sound, and the same in our own terms."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic_core import to_jsonable_python

from castalia.cli.render import say
from castalia.config.fields import changed, values
from castalia.config.key_help import explanation, facts_about
from castalia.config.key_reference import markdown
from castalia.config.load import load_config, suggest
from castalia.config.notes import folded
from castalia.config.schema import RunConfig
from castalia.config.yaml_files import to_yaml
from castalia.errors import ConfigError
from castalia.files import write_text
from castalia.strict_json import to_json
from castalia.units import plural
from castalia.wrapping import aligned

app = typer.Typer(no_args_is_help=True, help="Show, check or convert configs.")
Words = Annotated[list[str], typer.Argument(metavar="CONFIG... [KEY=VALUE...]", show_default=False)]


def read(words: list[str]) -> RunConfig:
    """Files and presets, then `key=value` overrides, as the command line mixes them."""
    files = [word for word in words if "=" not in word]
    return load_config(files, [word for word in words if "=" in word])


@app.command()
def show(
    words: Words, as_json: Annotated[bool, typer.Option("--json", help="One object with all values.")] = False
) -> None:
    """Print every setting in effect and where its value comes from; `*` marks values that are not the default.

    \b
    Examples:
      castalia config show run.yml
      castalia config show pythia-160m optimizer.lr=1e-4
    """
    config = read(words)
    rows = [(path, to_jsonable_python(value), config.origins.get(path, "default")) for path, value in values(config)]
    if as_json:
        table = {path: {"value": value, "origin": origin} for path, value, origin in rows}
        print(to_json({"values": table, "notes": config.notes}, indent=1))
        return
    marked = changed(config)
    rows.sort(key=lambda row: row[0] not in marked)  # what differs from the defaults comes first
    cells = [(f"{'*' if path in marked else ' '} {path}", _text(value), origin) for path, value, origin in rows]
    print("\n".join(aligned(cells, indent=0)))
    print_notes(config)


@app.command()
def check(
    words: Words, as_json: Annotated[bool, typer.Option("--json", help="one object with all that was found")] = False
) -> None:
    """Check a config, and all that `castalia train` checks before it starts: data, tokenizer, folder, layout.

    \b
    Examples:
      castalia config check run.yml
      castalia config check pythia-160m train.steps=1000 parallel.gpus=8

    Exit code 2 with a line for each error, else 0. What is not given yet, and what is missing or in the way on this
    machine, is listed but is no error, because the run may start elsewhere.
    """
    from castalia.cli.train import read_config
    from castalia.plan.run_plan import layout_of, warnings
    from castalia.train.run_facts import collect_run_facts
    from castalia.train.start_checks import find_obstacles, refuse

    config = read_config(words)
    found = find_obstacles(config, config.parallel.gpus or 1)
    refuse(each for each in found if each.kind == "error")
    warned = warnings(config, collect_run_facts(config), layout_of(config, None)[0])
    if as_json:
        obstacles = [each._asdict() for each in found]
        print(to_json({"accepted": words, "notes": config.notes, "warnings": warned, "obstacles": obstacles}, indent=1))
        return
    for line in (*(f"note: {note}" for note in config.notes), *(f"warning: {text}" for text in warned), *found):
        say(str(line), sys.stderr)
    number, kinds = len(config.notes) + len(warned), Counter(each.kind for each in found)
    noted = f" ({plural(number, 'note')})" if number else ""
    lacks = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    say(f"accepted: {' '.join(words)}{noted}" + (f"; it would not train here yet: {lacks}" if lacks else ""))


@app.command()
def convert(
    words: Words, output: Annotated[Path | None, typer.Option(help="File to write; without it, the terminal.")] = None
) -> None:
    """Rewrite a config, GPT-NeoX's or ours, as a short file of ours: only what differs from the defaults.

    \b
    Examples:
      castalia config convert run.yml
      castalia config convert 125M.yml local_setup.yml --output clean.yml
    """
    config = read(words)
    lines = [f"# {note}" for note in config.notes]
    text = "\n".join([*lines, to_yaml(changes(config))])
    if output is None:
        print(text, end="")
        return
    if output.exists():
        raise ConfigError(f"{output}: exists already; name another file or remove it")
    write_text(output, text)
    print(f"wrote {output}")


@app.command()
def explain(
    key: Annotated[str | None, typer.Argument(help="one of ours, or of GPT-NeoX's")] = None,
    everything: Annotated[bool, typer.Option("--all", help="the reference of all keys, as Markdown")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one object: our keys, and GPT-NeoX's")] = False,
) -> None:
    """Explain a setting: one of ours (`optimizer.lr`) or one of GPT-NeoX's (`gradient_clipping`).

    \b
    Examples:
      castalia config explain optimizer.lr
      castalia config explain gradient_clipping
    """
    if everything:
        print(to_json(facts_about(), indent=1) + "\n" if as_json else markdown(), end="")
        return
    if key is None:
        raise ConfigError("name a key, or ask for all with --all")
    lines = list(explanation(key))
    if not lines:
        raise ConfigError(f"unknown key {key}{suggest(key)}")
    if as_json:
        print(to_json(facts_about(key), indent=1))
        return
    for line in lines:
        say(line)


def changes(config: RunConfig) -> dict[str, Any]:
    """The values that differ from the defaults, nested: loading them gives an equal config."""
    nested: dict[str, Any] = {}
    for path, value in changed(config).items():
        *sections, name = path.split(".")
        level = nested
        for section in sections:
            level = level.setdefault(section, {})
        level[name] = to_jsonable_python(value)
    return nested


def print_notes(config: RunConfig) -> None:
    """Print the config's notes on standard error, in short."""
    for note in folded(config.notes):
        say(f"note: {note}", sys.stderr)


def _text(value: Any) -> str:
    text = json.dumps(value)
    return value if isinstance(value, str) and value.strip() else text
