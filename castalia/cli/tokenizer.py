"""`castalia tokenizer`: make a vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from castalia.strict_json import to_json

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()  # without it, typer would take the only command for `tokenizer` itself
def tokenizer() -> None:
    """Train a tokenizer."""


@app.command()
def train(
    inputs: Annotated[list[str], typer.Argument(help="text files, jsonl and the other inputs of `data prepare`")],
    output: Annotated[Path, typer.Option(help="the tokenizer.json to write")],
    vocab_size: Annotated[int, typer.Option(help="most entries, <|endoftext|> (id 0) and 256 bytes included")] = 4096,
    jsonl_keys: Annotated[
        str, typer.Option(help="field of the JSON records that holds the text; text|body: the one that a record has")
    ] = "text",
    as_json: Annotated[bool, typer.Option("--json", help="one object: the file and its number of entries")] = False,
) -> None:
    """Train a byte-level BPE tokenizer on text. The same input gives the same file.

    \b
    Examples:
      castalia tokenizer train texts.jsonl --output tokenizer.json --vocab-size 512
      castalia tokenizer train notes/ --output notes.json --vocab-size 512
    """
    from castalia.data.sources import MissingField, documents, find_files
    from castalia.data.tokenizer import engine_text, train_bpe
    from castalia.files import write_text

    try:
        bpe = train_bpe(documents(find_files(inputs), jsonl_keys), vocab_size)
    except MissingField as error:
        raise MissingField(f"{error}, or name its field with --jsonl-keys") from None
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, engine_text(bpe.engine))
    if as_json:
        print(to_json({"output": str(output), "entries": bpe.vocab_size}))
    else:
        print(f"{output}: {bpe.vocab_size:,} entries")
