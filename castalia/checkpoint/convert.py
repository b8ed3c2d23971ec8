"""From a checkpoint of any format to files of another: planned, written file by file, and complete or absent.

The files are written into `DST.partial`, each under a temporary name, synced and renamed; a journal there says which
are complete and what they were made from. The same command goes on from there. At the end the folder gets its name.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from hashlib import blake2b
from importlib import import_module
from pathlib import Path
from threading import Event
from typing import IO, Any

import torch

from castalia.checkpoint.formats import detect, find_steps
from castalia.checkpoint.tensors import Checkpoint
from castalia.checkpoint.writing import Output, Plan, WriteOptions
from castalia.errors import CheckpointError
from castalia.files import behind_links, clean, put_in_place, remove, sync, write_text
from castalia.plan.words import gib
from castalia.storage.extent import verifying
from castalia.storage.safetensors import Advance
from castalia.storage.tensor import Adapted, Narrowed, TensorRef, everything, name_of

JOURNAL = ".castalia-conversion.jsonl"
LATEST = "latest"
FLUSH_BYTES = 128 << 20
MAX_WRITERS = 4  # threads, each with a piece of a file in memory


@dataclass(frozen=True)
class Target:
    """A format to convert to: the module with its `plan`, and how its folders of single steps are called."""

    module: str
    step_folder: str
    nested: bool = False  # whether one checkpoint too is a folder with `latest` and a step's folder

    def plan(self, checkpoint: Checkpoint, options: WriteOptions) -> Plan:
        """Raises CheckpointError for an optimizer state that the format cannot hold."""
        states = (checkpoint.optimizer or {}).values()
        strange = {kind for state in states for kind in state} - {"master", "exp_avg", "exp_avg_sq", "step"}
        partial = any("exp_avg_sq" not in state for state in states)
        if self.module != TARGETS["native"].module and (strange or partial):
            raise CheckpointError(
                f"{checkpoint.path} holds the state of another optimizer than AdamW, for which this format has no "
                "place; convert the weights alone with --no-optimizer"
            )
        return import_module(self.module).plan(checkpoint, options)


TARGETS = {
    "native": Target("castalia.checkpoint.formats.native_write", "step_{step:06d}"),
    "peft": Target("castalia.checkpoint.formats.peft_write", "step{step}"),
    "hf": Target("castalia.checkpoint.formats.huggingface_write", "step{step}"),
    "neox": Target("castalia.checkpoint.formats.neox_write", "global_step{step}", nested=True),
    "megatron-deepspeed": Target("castalia.checkpoint.formats.megatron_write", "global_step{step}", nested=True),
}


def prepare(checkpoint: Checkpoint, dtype: torch.dtype | None = None, optimizer: bool = True) -> Checkpoint:
    """The checkpoint as it is to be written: weights cast (from the masters that belong to them).

    Without `optimizer` there is no state; what is left then is enough to run the model and to train it on.
    """
    model, state = dict(checkpoint.model), checkpoint.optimizer
    if dtype is not None:
        masters = {} if checkpoint.details.get("masters_apart") else state or {}
        sources = {name: masters[name]["master"] if name in masters else ref for name, ref in model.items()}
        model = {n: r if r.dtype == dtype else Narrowed(r, name_of(dtype), n) for n, r in sources.items()}
    else:
        model = {n: Narrowed(r, r.source.dtype_name, n) if isinstance(r, Adapted) else r for n, r in model.items()}
    return replace(checkpoint, model=model, optimizer=state if optimizer else None)


def own_precision(checkpoint: Checkpoint, to: str, optimizer: bool) -> tuple[torch.dtype | None, str]:
    """The dtype of the weights where none is asked for, and what to say about it; None: as they are.

    A run's own checkpoints hold its fp32 masters alone. The programs of other formats go on in the precision that the
    files have, which is then the run's.
    """
    compute = checkpoint.config.precision.compute if checkpoint.config else None
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(str(compute))
    held = {ref.dtype for ref in checkpoint.model.values()}
    if to in ("native", "peft") or checkpoint.format != "native" or dtype is None or held != {torch.float32}:
        return None, ""
    kept = "with their fp32 masters beside them" if optimizer and checkpoint.optimizer else "without masters"
    return dtype, f"weights become {compute}, in which the run computes, {kept}; --dtype fp32 leaves them as they are"


def identity(checkpoint: Checkpoint, options: WriteOptions, plan: Plan) -> str:
    """A fingerprint of what is written from what: names, sizes and times of the source's files, options and plan."""
    root = Path(checkpoint.path)
    found = sorted((str(path.relative_to(root)), path.stat()) for path in root.rglob("*") if path.is_file())
    source = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]
    kinds = [(name, ref.dtype_name) for name, ref in checkpoint.model.items()]
    files = [(output.name, output.num_bytes) for output in plan.outputs]
    content = [str(root.resolve()), source, kinds, repr(options), files]
    return blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def check_destination(source: Path, target: Path, force: bool) -> None:
    """Raises CheckpointError if something is in the way, or lies so that it would be destroyed."""
    source, resolved = source.resolve(), target.resolve()
    if target.is_file():
        raise CheckpointError(f"{target} is a file, not a folder; name a folder that is not there yet")
    (resolved / JOURNAL).unlink(missing_ok=True)  # of a conversion that was killed once the folder had its name
    if resolved == source or resolved in source.parents or source in resolved.parents:
        raise CheckpointError(f"{target}: a checkpoint cannot be converted into its own folder, nor around it")
    if target.exists() and not force:
        raise CheckpointError(f"{target} exists already; name another folder, or replace it with --force")
    if target.exists() and any(target.iterdir()) and detect(target) is None and not (target / LATEST).is_file():
        raise CheckpointError(
            f"{target} holds {', '.join(sorted(path.name for path in target.iterdir())[:4])}, which is no checkpoint; "
            "--force replaces checkpoints alone: name another folder, or move this one away"
        )


def write(
    plan: Plan,
    target: Path,
    mark: str,
    advance: Advance,
    *,
    inside: str = "",
    force: bool = False,
    allow_inf: bool = False,
) -> int:
    """Write all files that are not there yet and give the folder its name. Returns how many were there already.

    `inside`: name of a step's folder in `target`, to which `latest` then points. `mark`: see `identity`. Raises
    CheckpointError for values that are too large for their new dtype, unless `allow_inf`.
    """
    target = behind_links(target)
    partial = target.with_name(target.name + ".partial")
    clean(target.parent, target.name)
    with _open_journal(partial) as journal:
        done = _completed(journal, partial, mark)
        _check_space(partial, sum(output.num_bytes for output in plan.outputs if output.name not in done))
        folder = partial / inside
        folder.mkdir(parents=True, exist_ok=True)
        advance(sum(output.num_bytes for output in plan.outputs if output.name in done))
        missing = [output for output in plan.outputs if output.name not in done]
        entries = {**done, **_write_files(missing, folder, journal, advance, allow_inf)}
        results = {name: entry["result"] for name, entry in entries.items()}
        plan.finish(folder, results)
        if inside:
            (partial / LATEST).write_text(inside)
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        _take_place(partial, target, force)
    return len(done)


def name_latest(folder: Path) -> None:
    """Let `latest` name the newest step of a series."""
    write_text(folder / LATEST, list(find_steps(folder).values())[-1].name)


def infinite_values(plan: Plan) -> dict[str, int]:
    """Tensors, of those written in this process, with values that became infinite in their new dtype: how many."""
    every = (ref for output in plan.outputs for ref in output.tensors)
    return {each.name: sum(each.infinite.values()) for each in _narrowed(every)}


def _narrowed(tensors: Iterable[TensorRef]) -> list[Narrowed]:
    """Those that have lost values to infinity."""
    return [each for each in everything(tensors) if isinstance(each, Narrowed) and each.infinite]


def _refuse_infinite(output: Output) -> None:
    if found := _narrowed(output.tensors):
        count = sum(sum(each.infinite.values()) for each in found)
        raise CheckpointError(
            f"{output.name}: {count} values, in {', '.join(each.name for each in found[:3])}"
            f"{' and others' if len(found) > 3 else ''}, are too large for {found[0].dtype_name} and would become "
            "infinite. Choose bf16 or fp32 (--dtype), or let `castalia convert` write them so with --allow-inf"
        )


def _write_files(
    outputs: Sequence[Output], folder: Path, journal: IO[str], advance: Advance, allow_inf: bool
) -> dict[str, dict]:
    """Several at a time. Returns the journal's entry for each. When one fails, or on Ctrl-C, all stop at once."""
    stopped = Event()

    def write_file(output: Output, disk: ThreadPoolExecutor) -> Future[dict[str, Any]]:
        final = folder / output.name
        part = final.with_name(final.name + ".part")
        final.parent.mkdir(parents=True, exist_ok=True)
        waiting: list[Future[None]] = []
        unflushed = 0

        def more(count: int) -> None:
            """What is written goes to disk while the rest is read."""
            nonlocal unflushed
            if stopped.is_set():
                raise CancelledError
            unflushed += count
            if unflushed >= FLUSH_BYTES:
                unflushed = 0
                waiting.append(disk.submit(sync, part))
            advance(count)

        def complete(entry: dict[str, Any]) -> dict[str, Any]:
            for each in waiting:
                each.result()  # an error is told once only, so not by the last sync again
            sync(part)
            os.replace(part, final)
            journal.write(json.dumps(entry) + "\n")
            journal.flush()
            return entry

        with verifying(output.tensors):
            result = output.write(part, more)
        if not allow_inf:
            _refuse_infinite(output)
        return disk.submit(complete, {"name": output.name, "result": result})

    with ThreadPoolExecutor(1) as disk, ThreadPoolExecutor(min(MAX_WRITERS, os.cpu_count() or 1)) as writers:
        futures = [writers.submit(write_file, output, disk) for output in outputs]
        try:
            entries = [future.result().result() for future in as_completed(futures)]
        except BaseException:
            stopped.set()
            writers.shutdown(cancel_futures=True)
            raise
    return {entry["name"]: entry for entry in entries}


def _open_journal(partial: Path) -> IO[str]:
    """The journal of an unfinished conversion, locked; a new one if there is none."""
    if partial.exists() and not (partial / JOURNAL).is_file():
        raise CheckpointError(f"{partial} is in the way, and it is no unfinished conversion; move it away")
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write {partial}: {error.strerror}") from error
    journal = open(partial / JOURNAL, "a+")  # noqa: SIM115 - the caller closes it
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        journal.close()
        raise CheckpointError(f"{partial} is being written by another conversion; wait for it, or stop it") from None
    return journal


def _completed(journal: IO[str], partial: Path, mark: str) -> dict[str, dict]:
    """The files that an earlier run of the same conversion finished. Leftovers of another one are removed."""
    journal.seek(0)
    entries = []
    for line in journal.read().splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:  # cut off when the program died
            break
    if entries[:1] != [{"mark": mark}]:
        entries = [{"mark": mark}]
        for path in partial.iterdir():
            if path.name != JOURNAL:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    journal.truncate(0)
    journal.writelines(json.dumps(entry) + "\n" for entry in entries)
    journal.flush()
    return {entry["name"]: entry for entry in entries[1:]}


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{folder}: {gib(needed)} are to be written, {gib(free)} are free; nothing is written. "
            "Make room, or leave out the optimizer state with --no-optimizer"
        )


def _take_place(partial: Path, target: Path, force: bool) -> None:
    if target.exists() and not force:
        raise CheckpointError(f"{target} has come into being meanwhile; the result is in {partial}")
    old = put_in_place(partial, target)
    (target / JOURNAL).unlink()  # until here it told that the folder is ours
    if old:
        remove(old)


def steps_of(folder: Path, wanted: Sequence[int] | None, found: Mapping[int, Path]) -> dict[int, Path]:
    """The steps of a run that a series is made of. Raises CheckpointError for a wanted one that is not there."""
    if not found:
        raise CheckpointError(f"{folder} holds no folders of steps; --all-steps needs a run, or a folder of steps")
    if wanted is None:
        return dict(found)
    if missing := [step for step in wanted if step not in found]:
        raise CheckpointError(
            f"{folder} has no checkpoint of step {', '.join(map(str, missing))}; there are {', '.join(map(str, found))}"
        )
    return {step: found[step] for step in wanted}
