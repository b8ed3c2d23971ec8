"""`castalia eval`: loss, perplexity and bits per byte of a checkpoint of any format."""

from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from castalia.checkpoint.tensors import Checkpoint
    from castalia.data.loader import Batch
    from castalia.data.tokenizer import Tokenizer
    from castalia.evaluate.corpus import Stream


def command(
    path: Annotated[str, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="a run, or a checkpoint of any format")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[OVERLAY.yml...] [KEY=VALUE...]")] = None,
    data: Annotated[
        str | None, typer.Option(help="prefix of .bin and .idx, or a text file; default: the run's validation data")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer file, where the checkpoint has none")] = None,
    step: Annotated[int | None, typer.Option(help="which of several checkpoints; default: the latest")] = None,
    stride: Annotated[
        int | None, typer.Option(help="tokens from one window to the next; default: the window, without overlap")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of a table")] = False,
) -> None:
    """Loss, perplexity and bits per byte of a checkpoint.

    Every token of the data is predicted once, except the first. Smaller strides give each prediction more context.
    """
    from castalia.checkpoint.formats import open_checkpoint

    result = evaluate_checkpoint(
        open_checkpoint(path, step=step), overrides or [], data=data, tokenizer_path=tokenizer, stride=stride
    )
    if as_json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else value
        print(f"{name.replace('_', ' '):<14}{shown}")


def evaluate_checkpoint(
    checkpoint: Checkpoint, overrides: list[str], *, data: str | None, tokenizer_path: str | None, stride: int | None
) -> dict[str, Any]:
    """What the command prints, by name."""
    from castalia.checkpoint.load import build_model
    from castalia.cli.config import print_notes
    from castalia.cli.train import split_words
    from castalia.config.load import load_config
    from castalia.config.schema import RunConfig
    from castalia.errors import ConfigError
    from castalia.evaluate.corpus import read_stream, validation_stream
    from castalia.evaluate.perplexity import bits_per_byte, evaluate, windows
    from castalia.parallel.engine import Engine
    from castalia.train.hardware import DTYPES, choose_device, choose_dtype, keep_freed_memory

    config = checkpoint.config or RunConfig()
    if overrides:
        files, words = split_words(overrides)
        config = load_config([config, *files], words)
        print_notes(config)
    tokenizer = find_tokenizer(checkpoint, tokenizer_path)
    stream = read_stream(data, tokenizer) if data else validation_stream(config.data, tokenizer)
    keep_freed_memory()
    device = choose_device(config.train.device)
    model = build_model(checkpoint, device)
    model.compute_dtype = choose_dtype(config.precision.compute, device)
    check_vocabulary(stream, model.cfg.padded_vocab_size)
    length = min(config.data.seq_length, model.cfg.max_positions or config.data.seq_length)
    if stride is not None and not 0 < stride <= length:
        raise ConfigError(f"--stride {stride} must lie between 1 and the window's {length} tokens (data.seq_length)")
    rows = config.train.micro_batch_size or 8
    sizes = stream.sizes if config.data.mask_documents else None
    batches = windows(stream.tokens, length, stride or length, rows, sizes)
    found = evaluate(Engine(model, rows), shown(batches, stream))
    spelled = {}
    if stream.num_bytes:
        spelled = {"bits_per_byte": bits_per_byte(found["loss"], int(found["tokens"]), stream.num_bytes)}
    precision = next(name for name, dtype in DTYPES.items() if dtype == model.compute_dtype)
    where = {"checkpoint": checkpoint.path, "step": checkpoint.progress.step, "data": stream.name}
    return {**where, "precision": precision, "uniform_loss": math.log(model.cfg.padded_vocab_size), **found, **spelled}


def find_tokenizer(checkpoint: Checkpoint, path: str | None) -> Tokenizer | None:
    """The one that is asked for, else the checkpoint's; None where it names none."""
    from castalia.checkpoint.load import load_tokenizer_for
    from castalia.config.schema import Tokenizer as TokenizerConfig
    from castalia.data.tokenizer import load_tokenizer

    if path:
        return load_tokenizer(TokenizerConfig(path=path))
    named = checkpoint.config.tokenizer if checkpoint.config else None
    return load_tokenizer_for(checkpoint) if named and (named.path or named.kind) else None


def check_vocabulary(stream: Stream, rows: int) -> None:
    from castalia.errors import DataError

    largest = int(stream.tokens.max())
    if largest >= rows:
        raise DataError(
            f"{stream.name}: token id {largest} lies beyond the model's vocabulary of {rows}; "
            "it was prepared with another tokenizer"
        )


def shown(batches: Iterator[Batch], stream: Stream) -> Iterator[Batch]:
    """The batches, with a progress bar on a terminal."""
    if not sys.stderr.isatty():
        return batches
    from rich.console import Console
    from rich.progress import Progress

    def watched() -> Iterator[Batch]:
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("evaluating", total=len(stream.tokens) - 1)
            for batch in batches:
                yield batch
                bar.advance(task, int(batch.loss_mask.sum()))

    return watched()
