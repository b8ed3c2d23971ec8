"""`castalia eval`: loss, perplexity and bits per byte of a checkpoint of any format; tasks of lm-eval."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from castalia.cli.render import say
from castalia.cli.streaming import MemoryOption
from castalia.cli.tasks import (
    DATE,
    ChatOption,
    LimitOption,
    OutputOption,
    SamplesOption,
    ShotsOption,
    TasksOption,
    UnsafeOption,
)
from castalia.strict_json import to_json
from castalia.units import plural

if TYPE_CHECKING:
    from castalia.checkpoint.tensors import Checkpoint
    from castalia.train.evaluation import EvaluationView

RunOrCheckpoint = Annotated[
    str, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="a run, or a checkpoint of any format")
]
Overlays = Annotated[list[str] | None, typer.Argument(metavar="[OVERLAY.yml...] [KEY=VALUE...]")]
DataOption = Annotated[
    str | None,
    typer.Option(
        help="prefix of .bin and .idx, a text file, or a .jsonl of texts, conversations, prompts with references "
        "or preferences, known by its fields; default: the run's validation data"
    ),
]
OnOption = Annotated[
    Literal["answers", "all"] | None,
    typer.Option(help="all: beside the loss on answers also that on all tokens, questions included"),
]
TemplateOption = Annotated[
    Path | None, typer.Option(help="of conversations: Jinja file, or folder with one; default: the model's")
]
TokenizerOption = Annotated[str | None, typer.Option(help="tokenizer file, where the checkpoint has none")]
StepOption = Annotated[int | None, typer.Option(help="which of several checkpoints; default: the latest")]
StrideOption = Annotated[
    int | None, typer.Option(help="tokens from one window to the next; default: the window, without overlap")
]
TpOption = Annotated[int, typer.Option(min=1, help="split heads, MLP and vocabulary over so many processes")]
PpOption = Annotated[int, typer.Option(min=1, help="split the blocks over so many processes")]
NprocOption = Annotated[
    int | None, typer.Option(min=1, help="number of processes, which share the data; default: tp * pp")
]
LogProbsOption = Annotated[
    str | None,
    typer.Option(metavar="OUT", help="instead: write each token's log-probability to OUT.bin and OUT.idx"),
]
BySourceOption = Annotated[
    bool, typer.Option("--by-source", help="each file or corpus by itself as well; takes twice as long")
]
JsonOption = Annotated[bool, typer.Option("--json", help="one JSON object instead of a table")]

# The options that act on one kind of evaluation alone; "" is the one of figures on data.
OPTIONS_OF = {
    "--tasks": {"--shots", "--limit", "--output", "--samples", "--chat", "--unsafe-code"},
    "": {"--on", "--chat-template", "--stride", "--by-source"},
}
ELSE = {"--data", "--tasks", "--log-probs"}
WITHOUT = {"--tasks": {"--data", "--log-probs"}, "--log-probs": {"--tokenizer", "--tp", "--pp", "--nproc", "--json"}}


def command(
    path: RunOrCheckpoint,
    overrides: Overlays = None,
    data: DataOption = None,
    on: OnOption = None,
    chat_template: TemplateOption = None,
    tokenizer: TokenizerOption = None,
    step: StepOption = None,
    stride: StrideOption = None,
    tp: TpOption = 1,
    pp: PpOption = 1,
    nproc: NprocOption = None,
    memory: MemoryOption = None,
    log_probs: LogProbsOption = None,
    by_source: BySourceOption = False,
    tasks: TasksOption = None,
    shots: ShotsOption = None,
    limit: LimitOption = None,
    output: OutputOption = None,
    samples: SamplesOption = False,
    chat: ChatOption = False,
    unsafe_code: UnsafeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compute loss, perplexity and bits per byte of a checkpoint, or its answers to tasks of lm-eval.

    \b
    Examples:
      castalia eval runs/first
      castalia eval runs/first --data texts.txt --stride 8
      castalia eval runs/first --tasks castalia_demo --limit 4
      castalia eval runs/chat --data chats.jsonl --on all

    Every token of a text is predicted once, except the first; a smaller stride gives each prediction more context. A
    run that learns answers or preferences is judged by them, as in its training. For pairs the result is the share in
    the right order and the mean margin: of rewards for reward models, else of log-probabilities.
    """
    given = given_options(locals())  # nothing else has a name yet
    from castalia.cli.opening import open_for_evaluation
    from castalia.cli.ranks import start_processes
    from castalia.cli.streaming import memory_bytes
    from castalia.cli.tasks import evaluate_tasks, needs_lm_eval
    from castalia.parallel.process_group import process_group
    from castalia.tasks.task_options import TaskOptions, names_of
    from castalia.train.evaluation import EvaluationOptions, evaluate_checkpoint
    from castalia.train.hardware import choose_device

    if tasks:
        needs_lm_eval()  # before anything is opened
    budget = memory_bytes(memory)
    start_processes(tp, pp, nproc)
    with process_group(choose_device("auto").type):
        checkpoint = open_for_evaluation(path, overrides or (), step)
        suite = suite_of(checkpoint, given)
        refuse_idle_options(given, bool(suite))
        if log_probs:
            tell_log_probs(checkpoint, data, log_probs, budget)
        elif tasks or suite:
            asked = TaskOptions(names_of(tasks or suite), shots, limit, chat, samples, unsafe_code)
            place = results_file(checkpoint) if suite and output is None else output
            evaluate_tasks(checkpoint, asked, tokenizer, tp, pp, budget, place, as_json)
        else:
            options = EvaluationOptions(data, tokenizer, stride, by_source, budget, on, chat_template, tp, pp)
            print_figures(evaluate_checkpoint(checkpoint, options, evaluation_view()), by_source, as_json)


def given_options(values: dict[str, Any]) -> set[str]:
    """The names of the options whose values, by parameter, are not their defaults."""
    known = signature(command).parameters
    given = {name for name, value in values.items() if value != known[name].default}
    return {"--json" if name == "as_json" else f"--{name.replace('_', '-')}" for name in given}


def suite_of(checkpoint: Checkpoint, given: set[str]) -> list[str]:
    """The tasks that the config asks in place of the losses, unless an option asks for something else."""
    config = checkpoint.config
    return (config.eval.suite if config else None) or [] if not given & (OPTIONS_OF[""] | ELSE) else []


def results_file(checkpoint: Checkpoint) -> Path:
    """Where the results of a suite go: the name that GPT-NeoX gives them, with the config's prefix, before the date."""
    assert checkpoint.config is not None
    prefix = checkpoint.config.eval.results_prefix
    return Path(f"{prefix}_eval_results_{DATE}.json" if prefix else f"eval_results_{DATE}.json")


def refuse_idle_options(given: set[str], suite: bool) -> None:
    """Raise ConfigError for options that do not act on the kind of evaluation that is asked.

    `suite`: the config asks tasks, so that their options act.
    """
    from castalia.errors import ConfigError

    kind = next((name for name in ("--tasks", "--log-probs") if name in given), "--tasks" if suite else "")
    for name in sorted(given):
        if kind != "--tasks" and name in OPTIONS_OF["--tasks"]:
            raise ConfigError(f"{name} belongs to --tasks")
        if kind and name in OPTIONS_OF[""] | WITHOUT[kind]:
            raise ConfigError(f"{name} does not act on {kind}; leave it out")


def tell_log_probs(checkpoint: Checkpoint, data: str | None, output: str, memory: int | None) -> None:
    """Preference tuning takes what this writes for the `references` of a source."""
    from castalia.errors import DataError
    from castalia.train.evaluation import write_log_probs

    if data is None:
        raise DataError("--log-probs needs --data, the prefix of the corpus")
    number = write_log_probs(checkpoint, data, output, memory, evaluation_view().tell_streaming)
    print(f"{output}: log-probabilities of {plural(number, 'document')} by {checkpoint.path}")


def evaluation_view() -> EvaluationView:
    """Notes, and bars over windows and blocks."""
    from castalia.cli.opening import tell
    from castalia.cli.render import watched
    from castalia.cli.streaming import blocks_watched, tell_streaming
    from castalia.parallel.rendezvous import is_main
    from castalia.train.evaluation import EvaluationView

    def tell_plan(executor: Any) -> None:
        """What stays in memory, and how long a pass takes."""
        tell_streaming(executor.model, f"micro-batches of {executor.micro_batch_size} windows", "a pass")

    def bar(items: Any, size: Any, total: int) -> Any:
        """Shown by one process."""
        return watched(items, size, total, shown=is_main())

    return EvaluationView(tell=tell, watch=bar, tell_streaming=tell_plan, blocks=blocks_watched)


def print_figures(result: dict[str, Any], by_source: bool, as_json: bool) -> None:
    """A line for each figure, or one JSON object, by one process."""
    from castalia.parallel.rendezvous import is_main

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
        say("by source     not told apart: what is judged is from one file, or its corpus does not say from which")
    for name, part in sources.items():
        bits = f"  bits per byte {part['bits_per_byte']:.4f}" if "bits_per_byte" in part else ""
        say(f"  loss {part['loss']:.4f}{bits}  {part['tokens']:,} tokens of {name}")
