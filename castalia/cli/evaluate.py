"""`castalia eval`: loss, perplexity and bits per byte of a checkpoint of any format."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from castalia.cli.render import say
from castalia.cli.streaming import MemoryOption
from castalia.strict_json import to_json
from castalia.units import plural

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from castalia.checkpoint.tensors import Checkpoint
    from castalia.config.batch import BatchPlan
    from castalia.config.schema import ModelConfig, RunConfig
    from castalia.data.loader import Batch
    from castalia.data.tokenizer import Tokenizer
    from castalia.evaluate.token_stream import Stream
    from castalia.parallel.executor import Executor
    from castalia.plan.stream_plan import EvaluationShape
    from castalia.streaming.streamed_model import StreamedExecutor


def command(
    path: Annotated[str, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="a run, or a checkpoint of any format")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[OVERLAY.yml...] [KEY=VALUE...]")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="prefix of .bin and .idx, a text file, or a .jsonl of texts, conversations, prompts with references "
            "or preferences, known by its fields; default: the run's validation data"
        ),
    ] = None,
    on: Annotated[
        Literal["answers", "all"] | None,
        typer.Option(help="all: beside the loss on answers also that on all tokens, questions included"),
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="of conversations: Jinja file, or folder with one; default: the model's")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer file, where the checkpoint has none")] = None,
    step: Annotated[int | None, typer.Option(help="which of several checkpoints; default: the latest")] = None,
    stride: Annotated[
        int | None, typer.Option(help="tokens from one window to the next; default: the window, without overlap")
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="split heads, MLP and vocabulary over so many processes")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="split the blocks over so many processes")] = 1,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, help="number of processes, which share the data; default: tp * pp"),
    ] = None,
    memory: MemoryOption = None,
    log_probs: Annotated[
        str | None,
        typer.Option(metavar="OUT", help="instead: write each token's log-probability to OUT.bin and OUT.idx"),
    ] = None,
    by_source: Annotated[
        bool, typer.Option("--by-source", help="each file or corpus by itself as well; takes twice as long")
    ] = False,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,NAME...|FILE.yaml",
            help="instead: tasks of lm-eval; castalia_demo is a group that needs no network",
        ),
    ] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="examples before each question; default: the task's")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="questions of each task, the first ones")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="write the tasks' results to this file, as lm-eval does; answers are kept while it runs"),
    ] = None,
    samples: Annotated[bool, typer.Option("--samples", help="every question and answer in the output, too")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="ask tasks in the tokenizer's chat template")] = False,
    unsafe_code: Annotated[
        bool, typer.Option("--unsafe-code", help="run tasks that execute what the model writes")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of a table")] = False,
) -> None:
    """Compute loss, perplexity and bits per byte of a checkpoint, or its answers to tasks of lm-eval.

    \b
    Examples:
      castalia eval runs/first
      castalia eval runs/first --data texts.txt --stride 8
      castalia eval runs/first --tasks castalia_demo --limit 4
      castalia eval runs/chat --data chats.jsonl --on all

    Every token of a text is predicted once, except the first; a smaller stride gives each prediction more context. A
    run that learns answers or preferences is judged by them, as in its training. Of pairs the share in the right order
    is shown, and the mean margin: of rewards for reward models, else of log-probabilities.
    """
    if log_probs:
        if memory is not None:
            from castalia.errors import ConfigError

            raise ConfigError("--log-probs computes with the whole model in memory: leave out --memory")
        write_log_probs(path, overrides or [], data, step, log_probs)
        return
    only_tasks = {"--shots": shots, "--limit": limit, "--output": output, "--samples": samples, "--chat": chat}
    only_data = {"--data": data, "--stride": stride, "--memory": memory, "--by-source": by_source}
    refuse_idle_options(only_data if tasks else only_tasks | {"--unsafe-code": unsafe_code}, bool(tasks))
    if tasks:
        from castalia.cli.tasks import evaluate_tasks

        evaluate_tasks(
            path,
            overrides or [],
            {"tasks": tasks, "shots": shots, "limit": limit, "chat": chat, "samples": samples}
            | {"unsafe_code": unsafe_code},
            tokenizer=tokenizer,
            step=step,
            tp=tp,
            pp=pp,
            nproc=nproc,
            output=output,
            as_json=as_json,
        )
        return
    from castalia.cli.opening import open_and_tell
    from castalia.cli.ranks import start_processes
    from castalia.cli.streaming import memory_bytes
    from castalia.parallel.process_group import process_group
    from castalia.parallel.rendezvous import is_main
    from castalia.train.hardware import choose_device

    budget = memory_bytes(memory, tp, pp)
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
            memory=budget,
            on=on,
            template=chat_template,
        )
    if not is_main():
        return
    if as_json:
        print(to_json(result))
        return
    sources = result.pop("sources", {})
    for name, value in result.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else value
        say(f"{name.replace('_', ' '):<13} {shown}", hang=14)
    if by_source and not sources:
        say("by source     not known: the corpus does not tell its files, or has one")
    for name, part in sources.items():
        bits = f"  bits per byte {part['bits_per_byte']:.4f}" if "bits_per_byte" in part else ""
        say(f"  loss {part['loss']:.4f}{bits}  {part['tokens']:,} tokens of {name}")


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
    print(f"{output}: log-probabilities of {plural(number, 'document')} by {checkpoint.path}")


def refuse_idle_options(options: dict[str, Any], tasks: bool) -> None:
    """Raise ConfigError for options that were given and do not act with, or without, --tasks."""
    from castalia.errors import ConfigError

    for name, value in options.items():
        if value not in (None, False):
            raise ConfigError(
                f"{name} does not act on --tasks; leave it out" if tasks else f"{name} belongs to --tasks"
            )


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
    memory: int | None = None,
    on: str | None = None,
    template: Path | None = None,
) -> dict[str, Any]:
    """What the command prints, by name."""
    from castalia.checkpoint.restore import architecture
    from castalia.train.hardware import DTYPES, choose_device, choose_dtype

    checkpoint, config = overlaid(checkpoint, overrides)
    tokenizer = find_tokenizer(checkpoint, tokenizer_path)
    device = choose_device(config.train.device)
    dtype, model = choose_dtype(config.precision.compute, device), architecture(checkpoint)
    options = {"--stride": stride is not None, "--by-source": by_source, "--memory": memory is not None}
    given = [name for name, is_given in options.items() if is_given]

    def load(source: Checkpoint) -> Executor:
        """A model on this process or these, such as the reference model beside the one that is judged."""
        from castalia.train.hardware import keep_freed_memory

        keep_freed_memory()
        length = min(config.data.seq_length, model.max_positions or config.data.seq_length)
        return load_executor(source, length, config.train.micro_batch_size or 8, dtype, device, tp, pp)[0]

    judged = judged_by_labels(checkpoint, config, tokenizer, data, on, template, given, load)
    if judged is None:
        judged = judged_as_stream(checkpoint, config, tokenizer, data, stride, tp, pp, by_source, dtype, device, memory)
    precision = next(name for name, number in DTYPES.items() if number == dtype)
    where = {"checkpoint": checkpoint.path, "step": checkpoint.progress.step, "data": judged.pop("data")}
    guess = {} if model.reward_head else {"uniform_loss": uniform_loss(model, tokenizer)}
    return {**where, "precision": precision, **guess, **judged}


def judged_by_labels(
    checkpoint: Checkpoint,
    config: RunConfig,
    tokenizer: Tokenizer | None,
    data: str | None,
    on: str | None,
    template: Path | None,
    given: list[str],
    load: Callable[[Checkpoint], Executor],
) -> dict[str, Any] | None:
    """The figures by labels and preferences, of a run's own validation data or of a file of records.

    None where the data are a stream of text. `given`: options of the command that only a stream has a use for.
    """
    from castalia.cli.opening import tell
    from castalia.errors import ConfigError
    from castalia.evaluate.record_batches import kind_of_file
    from castalia.parallel.rendezvous import world_size
    from castalia.train.judging import has_own_figures, judge_by_own_validation, reference_checkpoint

    kind = kind_of_file(data) if data and Path(data).is_file() else "text"
    own = data is None and has_own_figures(config) and not given
    if kind == "text" and not own:
        if on or template:
            raise ConfigError(
                f"{'--on' if on else '--chat-template'} is for data with answers; here every token counts"
            )
        return None
    if given:
        raise ConfigError(f"{data} holds answers, each judged by itself: {' and '.join(given)} is for streams of text")
    config = config.with_({"train.objective": "reward"}) if checkpoint_judges(checkpoint) else config
    if world_size() > 1 and (kind in ("pair", "judged") or own and config.train.objective != "causal"):
        raise ConfigError("preferences are judged by one process: leave --tp, --pp and --nproc out")
    source, note = reference_checkpoint(config, stored=own)
    tell([note] if note else [], checkpoint.path)
    executor = load(checkpoint)
    reference = load(source) if source else None
    if own:
        figures: dict[str, Any] = judge_by_own_validation(config, executor, reference, on == "all")
        if config.train.objective == "causal" and not any(source.labels for source in config.data.valid):
            figures |= text_bits(config, tokenizer, figures)
        return {"data": ", ".join(each.path for each in config.data.valid), **figures}
    assert data is not None
    return judged_records(checkpoint, config, tokenizer, data, on, template, executor, reference)


def text_bits(config: RunConfig, tokenizer: Tokenizer | None, figures: dict[str, Any]) -> dict[str, float]:
    """Bits per byte of texts, all of whose tokens count; empty without a tokenizer."""
    from castalia.evaluate.perplexity import bits_per_byte
    from castalia.evaluate.token_stream import validation_stream

    size = validation_stream(config.data, tokenizer).num_bytes
    return {"bits_per_byte": bits_per_byte(figures["loss"], int(figures["tokens"]), size)} if size else {}


def checkpoint_judges(checkpoint: Checkpoint) -> bool:
    """Whether it is a reward model."""
    from castalia.checkpoint.restore import architecture

    return architecture(checkpoint).reward_head


def judged_records(
    checkpoint: Checkpoint,
    config: RunConfig,
    tokenizer: Tokenizer | None,
    data: str,
    on: str | None,
    template: Path | None,
    executor: Executor,
    reference: Executor | None,
) -> dict[str, Any]:
    """The figures of a file of records. Raises DataError where the model has no use for their kind."""
    from castalia.cli.opening import tell
    from castalia.errors import DataError
    from castalia.evaluate.record_batches import answers_encoder, read_records, rewards_encoder
    from castalia.train.judging import judge_answers, judge_judgements, judge_pairs, usable

    if tokenizer is None:
        raise DataError(f"{data} is text, but the checkpoint names no tokenizer; give one with --tokenizer")
    judges = checkpoint_judges(checkpoint)
    records = read_records(data, (rewards_encoder if judges else answers_encoder)(tokenizer, template))
    length = executor.models[0].cfg.max_positions or max(len(d.ids) for record in records for d in record.documents)
    kept = usable(records, length)
    if len(kept) < len(records):
        tell(
            [f"{len(records) - len(kept)} of {len(records)} records are left out: no answer within {length} tokens"],
            data,
        )
    kind, sizes = records[0].kind, (config.train.micro_batch_size or 8, length)
    if kind == "answer":
        if judges:
            raise DataError(
                f"{data} holds answers, of which a reward model tells no better one: castalia score rates them"
            )
        figures: dict[str, Any] = judge_answers(kept, executor, *sizes, on == "all")
    else:
        judge = judge_pairs if kind == "pair" else judge_judgements
        figures = judge(kept, config, executor, reference, *sizes)
    return {
        "data": data,
        "kind": {"answer": "answers", "pair": "pairs"}.get(kind, kind),
        "records": len(kept),
        **figures,
    }


def judged_as_stream(
    checkpoint: Checkpoint,
    config: RunConfig,
    tokenizer: Tokenizer | None,
    data: str | None,
    stride: int | None,
    tp: int,
    pp: int,
    by_source: bool,
    dtype: torch.dtype,
    device: torch.device,
    memory: int | None,
) -> dict[str, Any]:
    """The figures of a stream of tokens, by windows over it."""
    import numpy as np

    from castalia.checkpoint.restore import architecture
    from castalia.cli.render import watched
    from castalia.errors import ConfigError
    from castalia.evaluate.perplexity import bits_per_byte, evaluate, num_windows, windows
    from castalia.evaluate.token_stream import read_stream, require_known_ids, validation_stream
    from castalia.parallel.rendezvous import is_main
    from castalia.plan.stream_plan import EvaluationShape
    from castalia.train.hardware import keep_freed_memory

    stream = read_stream(data, tokenizer) if data else validation_stream(config.data, tokenizer)
    model = architecture(checkpoint)
    require_known_ids(stream, model.padded_vocab_size)
    length = min(config.data.seq_length, model.max_positions or config.data.seq_length)
    if stride is not None and not 0 < stride <= length:
        raise ConfigError(f"--stride {stride} must lie between 1 and the window's {length} tokens (data.seq_length)")
    rows = config.train.micro_batch_size or 8
    spells_all = stream.labels is None  # else some of the text's bytes are not predicted
    if config.data.mask_after_eod and tokenizer and tokenizer.eod_id is not None:
        stream = stream.masked_after(tokenizer.eod_id)

    def ends_of(stream: Stream) -> list[int]:
        """As in training on unpacked documents, no window goes over the end of one."""
        return np.cumsum(stream.sizes).tolist() if config.data.packing == "unpacked" and not data else []

    def num_windows_of(stream: Stream) -> int:
        return num_windows(len(stream.tokens), length, stride or length, ends_of(stream))

    number = num_windows_of(stream)
    shape = EvaluationShape(length, min(rows, number), number, config.data.mask_documents)
    fewer = config.train.micro_batch_size is None
    streamed = streamed_executor(checkpoint, shape, dtype, device, memory, fewer)
    if streamed is None:
        keep_freed_memory()
        executor, plan = load_executor(checkpoint, length, rows, dtype, device, tp, pp)
    rows = streamed.micro_batch_size if streamed else plan.batch_size

    def judged(stream: Stream) -> dict[str, Any]:
        sizes = stream.sizes if config.data.mask_documents else None
        batches = windows(stream.tokens, length, stride or length, rows, sizes, stream.labels, ends_of(stream))
        if streamed:
            scores: dict[str, Any] = evaluate_blocks(streamed, batches, num_windows_of(stream))
        else:
            bar = watched(batches, lambda batch: int(batch.loss_mask.sum()), stream.num_counted, shown=is_main())
            scores = evaluate(executor, bar)
        if stream.num_bytes and spells_all:
            scores["bits_per_byte"] = bits_per_byte(scores["loss"], int(scores["tokens"]), stream.num_bytes)
        return scores

    with closing(streamed.model.reader) if streamed else nullcontext():
        scores = judged(stream)
        if by_source:
            scores["sources"] = {name: judged(part) for name, part in stream.by_source(tokenizer).items()}
    return {"data": stream.name, **scores}


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


def streamed_executor(
    checkpoint: Checkpoint,
    shape: EvaluationShape,
    dtype: torch.dtype,
    device: torch.device,
    memory: int | None,
    fewer_rows: bool,
) -> StreamedExecutor | None:
    """The model with one block at a time in memory, if `memory` is given or it does not fit; what that means is told.

    `fewer_rows`: micro-batches may have fewer windows than the shape says.
    """
    from castalia.checkpoint.restore import architecture
    from castalia.cli.streaming import tell_streaming
    from castalia.parallel.rendezvous import world_size
    from castalia.plan.stream_plan import evaluation_work, plan_evaluation
    from castalia.streaming.open_streamed import budget_for, open_streamed, require_cpu
    from castalia.streaming.stream_units import units_of
    from castalia.streaming.streamed_model import StreamedExecutor

    if world_size() > 1 or not require_cpu(device, memory):
        return None
    model = architecture(checkpoint)
    budget = budget_for(model, evaluation_work(model, shape, dtype.itemsize), dtype.itemsize, memory)
    if budget is None:
        return None
    units = units_of(checkpoint, model, dtype)
    plan, shape = plan_evaluation(units.sizes(), model, shape, dtype.itemsize, budget, fewer_rows)
    streamed = open_streamed(checkpoint, model, units, plan)
    tell_streaming(streamed, f"micro-batches of {shape.rows} windows", "a pass")
    return StreamedExecutor(streamed, shape.rows)


def evaluate_blocks(executor: StreamedExecutor, batches: Iterator[Batch], num_windows: int) -> dict[str, float]:
    """`evaluate`, with a bar over the blocks of all passes."""
    from castalia.cli.render import progress
    from castalia.evaluate.perplexity import evaluate

    model = executor.model
    passes = -(-num_windows // (executor.micro_batch_size * model.plan.items))
    with progress(passes * model.cfg.num_layers) as model.advance:
        return evaluate(executor, batches)


def find_tokenizer(checkpoint: Checkpoint, path: str | None) -> Tokenizer | None:
    """The one that is asked for, else the checkpoint's; None where it names none."""
    from castalia.checkpoint.restore import load_tokenizer_for

    named = checkpoint.config.tokenizer if checkpoint.config else None
    return load_tokenizer_for(checkpoint, path) if path or (named and (named.path or named.kind)) else None
