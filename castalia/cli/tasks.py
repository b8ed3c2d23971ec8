"""`castalia eval --tasks`: tasks of lm-eval on a checkpoint of any format."""

from __future__ import annotations

import sys
from contextlib import closing, contextmanager
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from castalia.strict_json import to_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from castalia.checkpoint.tensors import Checkpoint
    from castalia.tasks.harness import TaskModel
    from castalia.tasks.task_options import TaskOptions

DATE = "DATE"  # in the name of a file of results

TasksOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME,NAME...|FILE.yaml",
        help="instead: tasks of lm-eval; castalia_demo is a group that needs no network",
    ),
]
ShotsOption = Annotated[int | None, typer.Option(min=0, help="examples before each question; default: the task's")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="questions of each task, the first ones")]
OutputOption = Annotated[
    Path | None,
    typer.Option(help="write the tasks' results to this file, as lm-eval does; answers are kept while it runs"),
]
SamplesOption = Annotated[bool, typer.Option("--samples", help="every question and answer in the output, too")]
ChatOption = Annotated[bool, typer.Option("--chat", help="ask tasks in the tokenizer's chat template")]
UnsafeOption = Annotated[bool, typer.Option("--unsafe-code", help="run tasks that execute what the model writes")]


def needs_lm_eval() -> None:
    """Raise DataError without lm-eval."""
    from castalia.errors import DataError

    try:
        import_module("lm_eval")
    except ImportError as error:
        raise DataError(f"tasks need lm-eval: pip install 'castalia[eval]' ({error})") from None


def evaluate_tasks(
    checkpoint: Checkpoint,
    options: TaskOptions,
    tokenizer: str | None = None,
    tp: int = 1,
    pp: int = 1,
    memory: int | None = None,
    output: Path | None = None,
    as_json: bool = False,
) -> None:
    """Run tasks on all ranks together and print their table; write the results to `output`.

    `DATE` in its name becomes the time at which they are written.
    """
    needs_lm_eval()
    from castalia.files import write_text
    from castalia.parallel.process_group import is_main
    from castalia.tasks.task_run import provenance, run_tasks, table

    model, precision = open_for_tasks(checkpoint, tokenizer, tp, pp, memory)
    facts = provenance(checkpoint, model, precision)
    with closing(model), _kept_answers(output, facts, options) as cache:
        results = run_tasks(model, options, cache)
    if not is_main():
        return
    text = to_json(results | {"castalia": facts}, default=str, indent=2, ensure_ascii=False)
    if output:
        now = f"{datetime.now():%m-%d-%Y-%H-%M-%S}"
        write_text(output.with_name(output.name.replace(DATE, now)), text + "\n")
    print(text if as_json else table(results))


def open_for_tasks(
    checkpoint: Checkpoint, tokenizer: str | None = None, tp: int = 1, pp: int = 1, memory: int | None = None
) -> tuple[TaskModel, str]:
    """The checkpoint's model as lm-eval asks it, with a bar over the answers, and the name of its precision.

    On CPUs in fp32 unless the command line gives `precision.compute`: scores are then those of the stored weights.
    """
    from castalia.cli.render import watched
    from castalia.cli.streaming import tell_streaming
    from castalia.config.schema import RunConfig
    from castalia.parallel.process_group import is_main
    from castalia.tasks.task_run import open_task_model
    from castalia.train.hardware import choose_device, choose_dtype, name_of

    config = checkpoint.config or RunConfig()
    device = choose_device(config.train.device)
    chosen = config.origins.get("precision.compute", "").startswith("command line")
    dtype = choose_dtype(config.precision.compute if chosen or device.type != "cpu" else "fp32", device)
    screen = sys.stderr  # lm-eval's lines and bars are kept from it

    def bar(items: Any, size: Any, total: int) -> Iterator[Any]:
        return watched(items, size, total, shown=is_main(), screen=screen)

    model = open_task_model(checkpoint, dtype, device, tokenizer, tp, pp, bar, memory)
    if stage := model.streamed:
        tell_streaming(stage, "passes or texts", "a pass, or a token of each text")
    return model, name_of(dtype)


@contextmanager
def _kept_answers(output: Path | None, facts: dict[str, Any], options: TaskOptions) -> Iterator[Path | None]:
    """Where answers are kept until the results are there, so that the same command again goes on.

    Beside the output, by the digests of weights and tokenizer and the length; nowhere without an output. lm-eval looks
    them up by the whole text of a request, so that they serve whatever version and part of a task asks the same.
    """
    from castalia.files import UNFINISHED, beside, remove, workplace
    from castalia.parallel.rendezvous import is_main

    if output is None:
        yield None
        return
    place = beside(output, UNFINISHED)
    if is_main():
        output.parent.mkdir(parents=True, exist_ok=True)
        place = workplace(output, UNFINISHED)
    mode = "chat" if options.chat else "plain"
    yield place / f"{facts['weights']}-{facts['tokenizer']}-{facts['precision']}-{facts['max_length']}-{mode}"
    if is_main():
        remove(place)
