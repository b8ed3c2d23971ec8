"""`castalia eval`: loss, perplexity and bits per byte of a checkpoint of any format."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from castalia.strict_json import to_json

if TYPE_CHECKING:
    import torch

    from castalia.checkpoint.tensors import Checkpoint
    from castalia.config.batch import BatchPlan
    from castalia.config.schema import ModelConfig, RunConfig
    from castalia.data.tokenizer import Tokenizer
    from castalia.evaluate.token_stream import Stream
    from castalia.parallel.executor import Executor


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
    tp: Annotated[int, typer.Option(min=1, help="split heads, MLP and vocabulary over so many processes")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="split the blocks over so many processes")] = 1,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="start so many, which share the data; default: tp * pp")
    ] = None,
    log_probs: Annotated[
        str | None,
        typer.Option(metavar="OUT", help="instead: write each token's log-probability to OUT.bin and OUT.idx"),
    ] = None,
    by_source: Annotated[
        bool, typer.Option("--by-source", help="each file or corpus by itself as well; takes twice as long")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of a table")] = False,
) -> None:
    """Compute loss, perplexity and bits per byte of a checkpoint.

    \b
    Examples:
      castalia eval runs/first
      castalia eval runs/first --data texts.txt --stride 8

    Every token of the data is predicted once, except the first. For a run that trains on labels, only labelled tokens
    count. A smaller stride gives each prediction more context.
    """
    if log_probs:
        write_log_probs(path, overrides or [], data, step, log_probs)
        return
    from castalia.cli.opening import open_and_tell
    from castalia.cli.ranks import start_processes
    from castalia.parallel.process_group import process_group
    from castalia.parallel.rendezvous import is_main
    from castalia.train.hardware import choose_device

    start_processes(tp, pp, nproc)
    with process_group(choose_device("auto").type):
        checkpoint = open_and_tell(path, step=step)
        result = evaluate_checkpoint(
            checkpoint,
            overrides or [],
            data=data,
            tokenizer_path=tokenizer,
            stride=stride,
            tp=tp,
            pp=pp,
            by_source=by_source,
        )
    if not is_main():
        return
    if as_json:
        print(to_json(result))
        return
    sources = result.pop("sources", {})
    for name, value in result.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else value
        print(f"{name.replace('_', ' '):<14}{shown}")
    if by_source and not sources:
        print("by source     not known: the corpus does not tell its files, or has one")
    for name, part in sources.items():
        bits = f"  bits per byte {part['bits_per_byte']:.4f}" if "bits_per_byte" in part else ""
        print(f"  loss {part['loss']:.4f}{bits}  {part['tokens']:,} tokens of {name}")


def write_log_probs(path: str, overrides: list[str], data: str | None, step: int | None, output: str) -> None:
    """Preference tuning takes what this writes for the `references` of a source."""
    from castalia.checkpoint.restore import require_finite
    from castalia.cli.opening import open_and_tell
    from castalia.errors import DataError
    from castalia.evaluate.log_probs import write_log_probabilities
    from castalia.loading import build_model
    from castalia.train.hardware import choose_device, choose_dtype

    if data is None:
        raise DataError("--log-probs needs --data, the prefix of the corpus")
    checkpoint, config = overlaid(open_and_tell(path, step=step), overrides)
    device = choose_device(config.train.device)
    model = build_model(checkpoint, device, choose_dtype(config.precision.compute, device))
    require_finite(dict(model.named_parameters()), checkpoint.path)
    length, rows = config.data.seq_length, config.train.micro_batch_size or 8
    number = write_log_probabilities(model, data, output, min(length, model.cfg.max_positions or length), rows)
    print(f"{output}: log-probabilities of {number:,} documents by {checkpoint.path}")


# Settings that an evaluation reads, by the beginnings of their names.
ACT = ("model.", "data.", "train.device", "train.micro_batch_size", "precision.compute")


def overlaid(checkpoint: Checkpoint, overrides: list[str]) -> tuple[Checkpoint, RunConfig]:
    """The checkpoint and its config under the files and values that the command gives.

    Raises CheckpointError where they describe another model, ConfigError for a value that evaluation does not read.
    """
    from castalia.cli.config import print_notes
    from castalia.cli.train import split_words
    from castalia.config.load import load_config
    from castalia.config.schema import RunConfig
    from castalia.errors import ConfigError
    from castalia.train.resolve import architecture

    config = checkpoint.config or RunConfig()
    if not overrides:
        return checkpoint, config
    files, words = split_words(overrides)
    config = load_config([config, *files], words)
    print_notes(config)
    for path, origin in config.origins.items():
        if origin.startswith("command line") and not path.startswith(ACT):
            raise ConfigError(
                f"{origin}: {path} has no effect on an evaluation; what has are data.*, train.device, "
                "train.micro_batch_size, precision.compute and the options of `castalia eval --help`"
            )
    config = config.model_copy(update={"model": architecture(config, checkpoint)})
    return replace(checkpoint, config=config), config


def evaluate_checkpoint(
    checkpoint: Checkpoint,
    overrides: list[str],
    *,
    data: str | None,
    tokenizer_path: str | None,
    stride: int | None,
    tp: int = 1,
    pp: int = 1,
    by_source: bool = False,
) -> dict[str, Any]:
    """What the command prints, by name."""
    import numpy as np

    from castalia.checkpoint.restore import architecture
    from castalia.cli.render import watched
    from castalia.errors import ConfigError
    from castalia.evaluate.perplexity import bits_per_byte, evaluate, windows
    from castalia.evaluate.token_stream import read_stream, validation_stream
    from castalia.parallel.rendezvous import is_main
    from castalia.train.hardware import DTYPES, choose_device, choose_dtype, keep_freed_memory

    checkpoint, config = overlaid(checkpoint, overrides)
    tokenizer = find_tokenizer(checkpoint, tokenizer_path)
    stream = read_stream(data, tokenizer) if data else validation_stream(config.data, tokenizer)
    keep_freed_memory()
    device = choose_device(config.train.device)
    dtype, model = choose_dtype(config.precision.compute, device), architecture(checkpoint)
    check_vocabulary(stream, model.padded_vocab_size)
    length = min(config.data.seq_length, model.max_positions or config.data.seq_length)
    if stride is not None and not 0 < stride <= length:
        raise ConfigError(f"--stride {stride} must lie between 1 and the window's {length} tokens (data.seq_length)")
    rows = config.train.micro_batch_size or 8
    spells_all = stream.labels is None  # else some of the text's bytes are not predicted
    if config.data.mask_after_eod and tokenizer and tokenizer.eod_id is not None:
        stream = stream.masked_after(tokenizer.eod_id)
    executor, plan = load_executor(checkpoint, length, rows, dtype, device, tp, pp)

    def judged(stream: Stream) -> dict[str, Any]:
        sizes = stream.sizes if config.data.mask_documents else None
        # As in training on unpacked documents, no window goes over the end of one.
        ends = np.cumsum(stream.sizes).tolist() if config.data.packing == "unpacked" and not data else ()
        batches = windows(stream.tokens, length, stride or length, plan.batch_size, sizes, stream.labels, ends)
        bar = watched(batches, lambda batch: int(batch.loss_mask.sum()), stream.num_counted, shown=is_main())
        scores: dict[str, Any] = evaluate(executor, bar)
        if stream.num_bytes and spells_all:
            scores["bits_per_byte"] = bits_per_byte(scores["loss"], int(scores["tokens"]), stream.num_bytes)
        return scores

    scores = judged(stream)
    if by_source:
        scores["sources"] = {name: judged(part) for name, part in stream.by_source(tokenizer).items()}
    precision = next(name for name, number in DTYPES.items() if number == dtype)
    where = {"checkpoint": checkpoint.path, "step": checkpoint.progress.step, "data": stream.name}
    return {**where, "precision": precision, "uniform_loss": uniform_loss(model, tokenizer), **scores}


def uniform_loss(model: ModelConfig, tokenizer: Tokenizer | None) -> float:
    """Of a model that gives all ids the same chance; the rows that only fill the vocabulary up are none."""
    known = model.vocab_size or model.padded_vocab_size  # of other formats with the filling
    return math.log(min(known, tokenizer.vocab_size) if tokenizer else known)


def load_executor(
    checkpoint: Checkpoint, length: int, rows: int, dtype: torch.dtype, device: torch.device, tp: int, pp: int
) -> tuple[Executor, BatchPlan]:
    """The model on this process or its part of it, for batches of windows of `length`; `rows` in a forward pass.

    Its parameters are in the compute dtype, to which the blocks would round them each time.
    """
    from castalia.checkpoint.restore import require_finite
    from castalia.cli.ranks import split_config
    from castalia.config.batch import BatchPlan
    from castalia.loading import build_model
    from castalia.parallel.executor import Executor
    from castalia.parallel.rendezvous import world_size
    from castalia.train.setup import load_parameters, make_executor, rank_shard

    world = world_size()
    if world == 1:
        model = build_model(checkpoint, device, dtype)
        require_finite(dict(model.named_parameters()), checkpoint.path)
        return Executor(model, rows), BatchPlan(rows, rows, 1)
    config = split_config(checkpoint, tp, pp, world, length)
    plan = BatchPlan(rows * world // tp, rows, pp)  # as many micro-batches as there are stages
    executor = make_executor(config, dtype, device, plan, frozen=True)
    load_parameters(executor, config.model, checkpoint)
    shard = rank_shard(executor)
    require_finite({name: shard(each).tensor for name, each in executor.parameters.items()}, checkpoint.path)
    return executor, plan


def find_tokenizer(checkpoint: Checkpoint, path: str | None) -> Tokenizer | None:
    """The one that is asked for, else the checkpoint's; None where it names none."""
    from castalia.checkpoint.restore import load_tokenizer_for

    named = checkpoint.config.tokenizer if checkpoint.config else None
    return load_tokenizer_for(checkpoint, path) if path or (named and (named.path or named.kind)) else None


def check_vocabulary(stream: Stream, rows: int) -> None:
    """Raise DataError if a token id has no row in the model."""
    from castalia.errors import DataError

    largest = int(stream.tokens.max())
    if largest >= rows:
        raise DataError(
            f"{stream.name}: token id {largest} lies beyond the model's vocabulary of {rows}; "
            "it was prepared with another tokenizer"
        )
