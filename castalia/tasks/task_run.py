"""Run tasks of lm-eval, and return its results with what is known about the checkpoint."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sqlite3
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import lru_cache
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.api.task
import lm_eval.evaluator
import lm_eval.tasks
import torch
import torch.distributed as dist
from lm_eval.utils import make_table

from castalia.checkpoint.restore import architecture, load_tokenizer_for, require_finite
from castalia.checkpoint.tensors import Checkpoint
from castalia.errors import DataError
from castalia.evaluate.stream_measure import Watch, unwatched
from castalia.loading import build_model, load_split, split_config
from castalia.parallel.rank_grid import layout
from castalia.parallel.rendezvous import world_size
from castalia.plan.stream_plan import StreamedSizes, StreamPlan, answers_work, plan_stream
from castalia.streaming.open_streamed import budget_for, cache_share, streamed_model
from castalia.tasks.harness import DEFAULT_LENGTH, TaskModel
from castalia.tasks.task_options import TaskOptions

WRITTEN_AT_ONCE = 16  # texts, or passes of scores, if they have room
DEMO = Path(__file__).with_name("demo")
TASK_NAME = re.compile(r"^(?:task|group): *['\"]?([\w.@/-]+)", re.MULTILINE)
CACHE = "HF_DATASETS_CACHE"

if lm_eval.__version__.startswith("0.5.0.dev"):
    # It reads `unsafe_code` of a task's file and asks each task for UNSAFE_CODE, but nothing sets the one by the other.
    lm_eval.api.task.Task.UNSAFE_CODE = property(lambda task: bool(getattr(task.config, "unsafe_code", False)))


def open_task_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    tokenizer: str | None = None,
    tp: int = 1,
    pp: int = 1,
    watch: Watch = unwatched,
    memory: int | None = None,
) -> TaskModel:
    """The checkpoint's model as lm-eval asks it, on all ranks together: split over them, or whole on each.

    Blocks are read from disk if `memory` is given, or if the model does not fit: the processes of a split model may.
    """
    words = load_tokenizer_for(checkpoint, tokenizer)
    streamed = streamed_answerer(checkpoint, dtype, device, tp, pp, memory)
    if streamed:
        return TaskModel(streamed, words, batch_size=streamed.calls_at_once, watch=watch)
    network: Any
    if tp * pp > 1:
        network = load_split(checkpoint, tp, pp, dtype, device)
    else:
        network = build_model(checkpoint, device, dtype)
        require_finite(dict(network.named_parameters()), checkpoint.path)
    shared = world_size() > 1 and tp * pp == 1
    return TaskModel(network, words, shared=shared, watch=watch)


def streamed_answerer(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, tp: int, pp: int, memory: int | None
) -> Any:
    """The model with one block at a time in memory, if `memory` is given or it does not fit; else None."""
    model, world = architecture(checkpoint), world_size()
    grid = layout(split_config(checkpoint, tp, pp, world).parallel, world)
    if memory is None and grid.dp > 1:  # each process has the whole model
        return None
    work = answers_work(model, model.max_positions or DEFAULT_LENGTH, WRITTEN_AT_ONCE, dtype.itemsize)
    budget = budget_for(model, work, dtype.itemsize, memory, device, grid)
    if budget is None:
        return None
    own = replace(work, cache_each=int(work.cache_each * cache_share(model, grid)))

    def planner(sizes: StreamedSizes, budget: int) -> StreamPlan:
        """As many passes, or texts, at a time as have room."""
        return plan_stream(sizes, own, budget)

    return streamed_model(checkpoint, dtype, device, budget, planner, grid=grid)


def run_tasks(model: TaskModel, options: TaskOptions, cache: Path | None = None) -> dict[str, Any]:
    """The results, in lm-eval's own schema. Without them in all but the first process of a machine.

    Answers that were computed are kept in `cache` while it runs, and taken from there. Raises DataError for tasks that
    do not exist, whose data are not here, or that need what the model does not have.
    """
    manager = refuse_unknown(options.tasks)
    kept = cache and _same_for_all(cache)
    names = [_name_of(task) for task in options.tasks]
    with _quiet(), _told():
        results = lm_eval.simple_evaluate(
            model,
            tasks=names,
            num_fewshot=options.shots,
            limit=options.limit,
            use_cache=None if kept is None else str(kept),
            apply_chat_template=options.chat,
            fewshot_as_multiturn=options.chat,
            log_samples=options.samples,
            task_manager=manager,
            confirm_run_unsafe_code=options.unsafe_code,
            bootstrap_iters=options.draws,
        )
    return dict(results or {})  # lm-eval returns them in the first process of a machine only


def _same_for_all(cache: Path) -> Path | None:
    """This process's own file of kept answers, with those of the first one, so that all compute the same requests.

    None on all where the processes do not see the same folder: nothing is kept then.
    """
    if world_size() == 1:
        return cache.with_name(f"{cache.name}-0")
    own = cache.with_name(f"{cache.name}-{dist.get_rank()}")
    dist.barrier()  # the folder is there
    first = sorted(cache.parent.glob(f"{cache.name}-0_rank*.db"))
    if dist.get_rank() > 0:
        for old in cache.parent.glob(f"{own.name}_rank*.db*"):
            old.unlink()
        # lm-eval ends the name with the process's number on its machine, older versions with 0.
        for file, end in product(first, {0, int(os.environ.get("LOCAL_RANK", "0"))}):
            with closing(sqlite3.connect(file)) as known, closing(sqlite3.connect(f"{own}_rank{end}.db")) as new:
                known.backup(new)
    seen: list[Any] = [None] * world_size()
    dist.all_gather_object(seen, (cache.parent.is_dir(), len(first)))
    return own if len(set(seen)) == 1 and seen[0][0] else None


def refuse_unknown(tasks: Sequence[str]) -> Any:
    """The task manager of lm-eval that knows these tasks. Raises DataError for one that it does not know."""
    names = [_name_of(task) for task in tasks]
    folders = sorted({str(Path(task).parent) for task in tasks if _is_file(task)})
    own = all(_is_file(task) or task.startswith("castalia_demo") for task in tasks)
    manager = _manager((str(DEMO), *folders), not own)
    unknown = [name for name in names if not _known(manager, name)]
    if unknown:
        raise DataError(
            f"lm-eval {lm_eval.__version__} has no task {', '.join(unknown)}; names are listed by `lm-eval ls tasks`, "
            "and a task of your own is given as the path of its YAML file"
        )
    return manager


@lru_cache(maxsize=8)
def _manager(folders: tuple[str, ...], defaults: bool) -> Any:
    """`defaults`: with lm-eval's own tasks, which take seconds to list."""
    return lm_eval.tasks.TaskManager(include_path=list(folders), include_defaults=defaults)


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _name_of(task: str) -> str:
    if not _is_file(task):
        return task
    try:
        match = TASK_NAME.search(Path(task).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the task {task}: {error}") from error
    if not match:
        raise DataError(f"{task}: a task's file has a line `task: NAME`, and this one has none")
    return match[1]


def _known(manager: Any, name: str) -> bool:
    """Whether lm-eval has a task, group or tag of this name; names with `*`, `@` and `::` are left to it."""
    return bool(re.search("[*@:]", name)) or name in manager.all_tasks


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that lm-eval and its libraries print for their developers."""
    before, ask_git = logging.root.manager.disable, lm_eval.evaluator.get_git_commit_hash
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    lm_eval.evaluator.get_git_commit_hash = lambda: None  # git complains on stderr outside of a repository
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere:
            warnings.simplefilter("ignore")
            with redirect_stdout(nowhere), redirect_stderr(nowhere):
                yield
    finally:
        logging.disable(before)
        lm_eval.evaluator.get_git_commit_hash = ask_git


@contextmanager
def _told() -> Iterator[None]:
    """Errors of lm-eval and of datasets that the user can mend, as one DataError."""
    try:
        yield
    except (datasets.exceptions.DatasetsError, ConnectionError, FileNotFoundError) as error:
        raise DataError(_missing_data(str(error))) from error
    except ValueError as error:
        if "multimodal" in str(error):
            named = re.findall(r"'([^']+)'", str(error).partition("]")[0])
            raise DataError(f"{', '.join(named)} shows pictures or sounds, and this model reads text alone") from error
        if "unsafe" not in str(error):
            raise
        raise DataError(f"{error}; here that is --unsafe-code: the model's answers are executed") from error


def _missing_data(problem: str) -> str:
    named = re.search(r"'([\w.-]+/[\w.-]+|[\w.-]+)'", problem)
    name = named[1] if named else "NAME"
    return (
        f"a task's data set is not here: {problem.splitlines()[0].rstrip('.')}. It was looked for in "
        f"{datasets.config.HF_DATASETS_CACHE} ({CACHE}). On a machine with a network, "
        f"python -c 'import datasets; datasets.load_dataset(\"{name}\")' fills that folder; copy it here, "
        "and set HF_DATASETS_OFFLINE=1"
    )


def provenance(checkpoint: Checkpoint, model: TaskModel, precision: str) -> dict[str, Any]:
    """Which weights and tokenizer gave the results, by digest, and which programs."""
    config = checkpoint.config
    return {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.progress.step,
        "weights": weights_digest(checkpoint),
        "tokenizer": tokenizer_digest(model),
        "precision": precision,
        "max_length": model.max_length,
        "model": None
        if config is None or config.model is None
        else config.model.model_dump(mode="json", exclude_defaults=True),
        "versions": {name: metadata.version(name) for name in ("castalia", "torch", "lm_eval", "datasets")},
    }


def weights_digest(checkpoint: Checkpoint) -> str:
    """A digest of the names and stored values of all tensors, whatever files and ranks hold them."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(checkpoint.model):
        values = checkpoint.model[name].read().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)} ".encode())
        digest.update(values.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_digest(model: TaskModel) -> str:
    """A digest of the tokenizer's files or, without any, of its kind and size."""
    digest = hashlib.blake2b(f"{model.words.kind} {model.words.vocab_size}".encode(), digest_size=16)
    for name, content in sorted(model.words.folder.files.items()):
        digest.update(name.encode() + content)
    return digest.hexdigest()


def table(results: dict[str, Any]) -> str:
    """The results as lm-eval's table, groups below tasks."""
    parts = [make_table(results)]
    if results.get("groups"):
        parts.append(make_table(results, "groups"))
    return "\n".join(parts)


def metrics_of(results: dict[str, Any]) -> dict[str, float]:
    """The values by `task/metric`, without standard errors; a filter other than none is named: `task/metric/filter`."""
    values = {}
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            name, _, kept = key.partition(",")
            if isinstance(value, (int, float)) and not name.endswith("_stderr") and name != "sample_len":
                values[f"{task}/{name}" + (f"/{kept}" if kept not in ("", "none") else "")] = float(value)
    return values
