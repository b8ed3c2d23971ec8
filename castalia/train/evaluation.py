"""What `castalia eval` computes of a checkpoint: by a stream of text, or by answers and preferences.

options -> judge_by_labels    a file of records, or a run that learns from labels        train/judging
        -> StreamMeasure      corpora and texts: windows over one stream of tokens       evaluate/stream_measure
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from castalia.checkpoint.restore import architecture, find_tokenizer, require_finite
from castalia.checkpoint.tensors import Checkpoint
from castalia.config.batch import BatchPlan
from castalia.config.schema import ModelConfig, RunConfig
from castalia.data.indexed import open_dataset
from castalia.data.split import other_held_out
from castalia.data.tokenizer import Tokenizer
from castalia.errors import ConfigError
from castalia.evaluate.log_probs import write_log_probabilities
from castalia.evaluate.stream_measure import StreamMeasure, Watch, measure_stream, unwatched, window_length
from castalia.loading import build_model, split_config
from castalia.machine import keep_freed_memory
from castalia.parallel.executor import Executor
from castalia.parallel.rank_grid import layout
from castalia.parallel.rendezvous import world_size
from castalia.plan.stream_plan import EvaluationShape
from castalia.streaming.open_streamed import streamed_executor
from castalia.streaming.streamed_model import StreamedExecutor, StreamedTransformer
from castalia.train.hardware import choose_device, choose_dtype, name_of
from castalia.train.judging import judge_by_labels
from castalia.train.setup import load_parameters, make_executor, rank_shard

JUDGED_BATCHES = 16  # of records, that a streamed model's plan is made for


@dataclass(frozen=True)
class EvaluationOptions:
    """What is evaluated, and how. What is None is as the checkpoint's config says."""

    data: str | None = None  # a corpus, a text or a file of records; None: the run's validation data
    tokenizer: str | None = None
    stride: int | None = None  # tokens from one window to the next; None: the window
    by_source: bool = False  # each file or corpus by itself as well
    memory: int | None = None  # bytes; blocks that have no room are read from disk in each pass
    on: Literal["answers", "all"] | None = None  # all: the loss on questions, too
    template: Path | None = None  # of conversations
    tp: int = 1
    pp: int = 1

    @property
    def of_streams(self) -> list[str]:
        """The options of the command that are given and that only a stream has a use for."""
        given = {"--stride": self.stride, "--by-source": self.by_source or None}
        return [name for name, value in given.items() if value is not None]


@dataclass(frozen=True)
class EvaluationView:
    """What the caller shows meanwhile. By default nothing."""

    tell: Callable[[Sequence[str], str], None] = lambda notes, about: None
    watch: Watch = unwatched
    tell_streaming: Callable[[StreamedExecutor], None] = lambda executor: None
    blocks: Callable[[StreamedTransformer, int], AbstractContextManager[Any]] = lambda model, passes: nullcontext()


def evaluate_checkpoint(
    checkpoint: Checkpoint, options: EvaluationOptions | None = None, view: EvaluationView | None = None
) -> dict[str, Any]:
    """The figures by name, on all ranks together. Raises CastaliaError for what does not fit together."""
    options, view = options or EvaluationOptions(), view or EvaluationView()
    config, model = checkpoint.config or RunConfig(), architecture(checkpoint)
    tokenizer = find_tokenizer(checkpoint, options.tokenizer)
    device = choose_device(config.train.device)
    dtype = choose_dtype(config.precision.compute, device)
    rows, length = config.train.micro_batch_size or 8, window_length(config.data, model)

    def load(source: Checkpoint) -> tuple[Executor, int]:
        """A model on this process or these, such as the reference model beside the one that is judged."""
        keep_freed_memory()
        executor, plan = load_executor(source, length, rows, dtype, device, options.tp, options.pp)
        return executor, plan.batch_size

    judges: list[Executor] = []

    def load_judge(source: Checkpoint) -> Executor:
        """The same without the rows; from disk where it does not fit. Raises ConfigError for a second one then."""
        shape = EvaluationShape(length, rows, rows * JUDGED_BATCHES, False)
        memory = None if judges else options.memory
        if options.memory and world_size() > 1:
            raise ConfigError("--memory streams the model for answers on one process: leave it or the processes out")
        if options.memory and judges:
            raise ConfigError(
                "--memory streams one model, and this one is judged beside its reference model: leave it out"
            )
        streamed = streamed_executor(source, shape, dtype, device, memory, False) if world_size() == 1 else None
        if streamed:
            view.tell_streaming(streamed)
        judges.append(streamed or load(source)[0])
        return judges[-1]

    if options.data is None and (warning := other_held_out(checkpoint.facts.held_out, config.data)):
        view.tell([warning], checkpoint.path)
    judged = judge_by_labels(
        checkpoint,
        config,
        tokenizer,
        options.data,
        load_judge,
        view.tell,
        on=options.on,
        template=options.template,
        of_streams=options.of_streams,
    )
    if judged is None:
        measure = measure_stream(config.data, model, options.data, tokenizer, options.stride)
        shape = EvaluationShape(length, min(rows, measure.num_windows), measure.num_windows, measure.by_document)
        fewer = config.train.micro_batch_size is None
        grid = layout(split_config(checkpoint, options.tp, options.pp, world_size(), length).parallel, world_size())
        streamed = streamed_executor(checkpoint, shape, dtype, device, options.memory, fewer, grid)
        if streamed:
            view.tell_streaming(streamed)
            judged = _judge_blocks(streamed, measure, options, tokenizer, view)
        else:
            judged = _judge_stream(*load(checkpoint), measure, options, tokenizer, view.watch)
    guess = {} if model.reward_head else {"uniform_loss": uniform_loss(model, tokenizer)}
    where = {"checkpoint": checkpoint.path, "step": checkpoint.progress.step, "data": judged.pop("data")}
    return {**where, "precision": name_of(dtype), **guess, **judged}


def _judge_stream(
    executor: Executor,
    rows: int,
    measure: StreamMeasure,
    options: EvaluationOptions,
    tokenizer: Tokenizer | None,
    watch: Watch,
) -> dict[str, Any]:
    """The figures of a stream by a model in memory, `rows` windows in a batch."""
    figures = measure.figures(executor, rows, watch)
    if options.by_source:
        parts = measure.by_source(tokenizer)
        figures["sources"] = {name: part.figures(executor, rows, watch) for name, part in parts.items()}
    return {"data": measure.stream.name, **figures}


def _judge_blocks(
    executor: StreamedExecutor,
    measure: StreamMeasure,
    options: EvaluationOptions,
    tokenizer: Tokenizer | None,
    view: EvaluationView,
) -> dict[str, Any]:
    """The same by a model of which one block at a time is in memory."""
    model, rows = executor.model, executor.micro_batch_size

    def figures(part: StreamMeasure) -> dict[str, Any]:
        """With progress over the blocks of all passes."""
        with view.blocks(model, -(-part.num_windows // (rows * model.plan.items))):
            return part.figures(executor, rows)

    with closing(model.reader):
        found = figures(measure)
        if options.by_source:
            found["sources"] = {name: figures(part) for name, part in measure.by_source(tokenizer).items()}
    return {"data": measure.stream.name, **found}


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


def write_log_probs(
    checkpoint: Checkpoint,
    corpus: str,
    output: str,
    memory: int | None = None,
    tell_streaming: Callable[[StreamedExecutor], None] = lambda executor: None,
) -> int:
    """Write what preference tuning takes for the `references` of a source. Returns the number of documents."""
    config = checkpoint.config or RunConfig()
    device = choose_device(config.train.device)
    dtype, rows = choose_dtype(config.precision.compute, device), config.train.micro_batch_size or 8
    length = window_length(config.data, architecture(checkpoint))
    shape = EvaluationShape(length, rows, max(rows, len(open_dataset(corpus))), False)
    streamed = streamed_executor(checkpoint, shape, dtype, device, memory, config.train.micro_batch_size is None)
    if streamed:
        tell_streaming(streamed)
        with closing(streamed.model) as model:
            return write_log_probabilities(model, corpus, output, length, streamed.micro_batch_size)
    whole = build_model(checkpoint, device, dtype)
    require_finite(dict(whole.named_parameters()), checkpoint.path)
    return write_log_probabilities(whole, corpus, output, length, rows)
