"""`castalia eval --tasks`: tasks of lm-eval on a checkpoint of any format."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from castalia.strict_json import to_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from castalia.checkpoint.tensors import Checkpoint
    from castalia.tasks.harness import TaskModel
    from castalia.tasks.task_run import TaskOptions


def needs_lm_eval() -> None:
    """Raise DataError without lm-eval."""
    from castalia.errors import DataError

    try:
        import_module("lm_eval")
    except ImportError as error:
        raise DataError(f"tasks need lm-eval: pip install 'castalia[eval]' ({error})") from None


def evaluate_tasks(
    path: str,
    overrides: Sequence[str],
    options: dict[str, Any],
    *,
    tokenizer: str | None = None,
    step: int | None = None,
    tp: int = 1,
    pp: int = 1,
    nproc: int | None = None,
    output: Path | None = None,
    as_json: bool = False,
) -> None:
    """Run tasks and print their table; write the results to `output`. `options` are the fields of TaskOptions."""
    from castalia.cli.opening import open_and_tell
    from castalia.cli.ranks import start_processes
    from castalia.files import write_text
    from castalia.parallel.process_group import is_main, process_group
    from castalia.train.hardware import choose_device

    needs_lm_eval()
    from castalia.tasks.task_run import TaskOptions, names_of, run_tasks, table

    world = start_processes(tp, pp, nproc)
    asked = TaskOptions(**options | {"tasks": names_of(options["tasks"])})
    with process_group(choose_device("auto").type):
        checkpoint = open_and_tell(path, step=step)
        model, facts = open_task_model(checkpoint, list(overrides), tokenizer, tp, pp, world)
        with _kept_answers(output, facts, asked, world) as cache:
            results = run_tasks(model, asked, cache)
    if not is_main():
        return
    text = to_json(results | {"castalia": facts}, default=str, indent=2, ensure_ascii=False)
    if output:
        write_text(output, text + "\n")
    print(text if as_json else table(results))


def open_task_model(
    checkpoint: Checkpoint, overrides: list[str], tokenizer: str | None, tp: int = 1, pp: int = 1, world: int = 1
) -> tuple[TaskModel, dict[str, Any]]:
    """The checkpoint's model as lm-eval asks it, and which weights, tokenizer and versions it consists of.

    On CPUs in fp32 unless `precision.compute` is among the overrides: scores are then those of the stored weights.
    """
    from castalia.checkpoint.restore import load_tokenizer_for, require_finite
    from castalia.cli.evaluate import overlaid
    from castalia.cli.ranks import load_split
    from castalia.cli.render import watched
    from castalia.loading import build_model
    from castalia.parallel.process_group import is_main
    from castalia.tasks.harness import TaskModel
    from castalia.tasks.task_run import provenance
    from castalia.train.hardware import DTYPES, choose_device, choose_dtype

    checkpoint, config = overlaid(checkpoint, overrides)
    device = choose_device(config.train.device)
    chosen = any(word.startswith("precision.compute=") for word in overrides)
    dtype = choose_dtype(config.precision.compute if chosen or device.type != "cpu" else "fp32", device)
    words = load_tokenizer_for(checkpoint, tokenizer)
    if world > 1 and tp * pp > 1:
        network: Any = load_split(checkpoint, tp, pp, dtype, device)
    else:
        network = build_model(checkpoint, device, dtype)
        require_finite(dict(network.named_parameters()), checkpoint.path)

    screen = sys.stderr  # lm-eval's lines and bars are kept from it

    def bar(items: Any, size: Any, total: int) -> Iterator[Any]:
        return watched(items, size, total, shown=is_main(), screen=screen)

    model = TaskModel(network, words, shared=world > 1 and tp * pp == 1, watch=bar)
    precision = next(name for name, number in DTYPES.items() if number == dtype)
    return model, provenance(checkpoint, model, precision)


@contextmanager
def _kept_answers(
    output: Path | None, facts: dict[str, Any], options: TaskOptions, world: int
) -> Iterator[Path | None]:
    """Where answers are kept until the results are there, so that the same command again goes on.

    Beside the output, by the digests of weights and tokenizer; nowhere without an output or with several processes.
    """
    from castalia.files import UNFINISHED, remove, workplace

    if output is None or world > 1:
        yield None
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    place = workplace(output, UNFINISHED)
    mode = "chat" if options.chat else "plain"
    yield place / f"{facts['weights']}-{facts['tokenizer']}-{facts['precision']}-{mode}"
    remove(place)
