"""Convert a checkpoint of any format to files of another. The result is complete or absent.

The files are written into a workplace beside the destination (see `castalia.files`), each under a temporary name,
synced and renamed. A journal in the workplace lists the complete files and what they were made from, so that the same
command continues after an interruption. At the end the folder is renamed to the destination.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from importlib import import_module
from pathlib import Path
from typing import IO

import torch

from castalia.bars import Tally
from castalia.checkpoint.file_plan import Plan, WriteOptions
from castalia.checkpoint.file_writing import check_space, completed, note_done, open_journal, overflowed, write_files
from castalia.checkpoint.formats import TARGETS
from castalia.checkpoint.opener import base_of, detect, find_steps
from castalia.checkpoint.rules import STATE_ROLES
from castalia.checkpoint.tensors import Checkpoint
from castalia.config.float8_matrices import activation_type
from castalia.errors import CheckpointError
from castalia.files import (
    MARK,
    UNFINISHED,
    behind_links,
    beside,
    clean,
    put_in_place,
    remove,
    sync,
    write_text,
)
from castalia.storage.derived import Narrowed, WithLora
from castalia.storage.lazy import name_of

LATEST = "latest"
COMPLETE = ""  # in the journal, in place of a file's name: only the folder is still to be renamed


def plan_files(to: str, checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    """The files that a checkpoint becomes in the format `to`, a key of `TARGETS`. Nothing is read or written yet.

    Raises CheckpointError for a model or an optimizer state that the format cannot hold.
    """
    row, states = TARGETS[to], (checkpoint.optimizer or {}).values()
    if not row.any_optimizer and any(state.keys() != {*STATE_ROLES, "step"} for state in states):
        raise CheckpointError(
            f"{checkpoint.path} holds the state of another optimizer than AdamW, for which this format has no "
            "place; convert the weights alone with --no-optimizer"
        )
    if row.on_base:
        checkpoint = replace(checkpoint, facts=replace(checkpoint.facts, base=base_of(checkpoint)))
    return import_module(f"{row.package}.write").plan(checkpoint, options)


def prepare(checkpoint: Checkpoint, dtype: torch.dtype | None = None, optimizer: bool = True) -> Checkpoint:
    """The checkpoint with the content that is to be written.

    `dtype`: of the weights, which are cast from their fp32 masters where these belong to them; None: as they are.
    Without `optimizer` there is no optimizer state; weights are enough to run the model and to fine-tune it.
    """
    model, state = dict(checkpoint.model), checkpoint.optimizer
    if dtype is not None:
        # Weights that were changed after the masters count; their masters are of other weights.
        masters = {} if checkpoint.facts.masters_apart else state or {}
        sources = {name: masters[name]["master"] if name in masters else ref for name, ref in model.items()}
        model = {n: r if r.dtype == dtype else Narrowed(r, name_of(dtype), n) for n, r in sources.items()}
    else:
        model = {n: Narrowed(r, r.source.dtype_name, n) if isinstance(r, WithLora) else r for n, r in model.items()}
    return replace(checkpoint, model=model, optimizer=state if optimizer else None)


def own_precision(checkpoint: Checkpoint, to: str, optimizer: bool) -> tuple[torch.dtype | None, str]:
    """The dtype of the weights where the user asks for none, and a note about it; None: as they are.

    A run's own checkpoints have fp32 masters only. Programs of other formats continue in the precision of the files, so
    the weights are written in the precision in which the run computes.
    """
    compute = activation_type(checkpoint.config.precision.compute) if checkpoint.config else None
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(str(compute))
    dtypes = {ref.dtype for ref in checkpoint.model.values()}
    if TARGETS[to].any_dtype or checkpoint.format != "native" or dtype is None or dtypes != {torch.float32}:
        return None, ""
    kept = "with their fp32 masters beside them" if optimizer and checkpoint.optimizer else "without masters"
    return dtype, f"weights become {compute}, in which the run computes, {kept}; --dtype fp32 leaves them as they are"


def identity(checkpoint: Checkpoint, options: WriteOptions, plan: Plan) -> str:
    """A digest of a conversion: names, sizes and times of the source's files, the options and the planned files."""
    root = Path(checkpoint.path)
    paths = (path for path in (root, *root.rglob("*")) if path.is_file())
    stats = sorted((str(path.relative_to(root)), path.stat()) for path in paths)
    source = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    # The dtypes stand for --dtype, the files for the layout.
    kinds = [(name, ref.dtype_name) for name, ref in checkpoint.model.items()]
    files = [(output.name, output.num_bytes) for output in plan.outputs]
    content = [str(root.resolve()), source, kinds, repr(options), files]
    return blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def check_destination(source: Path, target: Path, force: bool, file: bool = False) -> None:
    """Raises CheckpointError if the destination exists (unless `force`), or if writing it would destroy other files.

    `file`: it is to be a file, not a folder.
    """
    source, resolved = source.resolve(), target.resolve()
    if file:
        _check_file(target, force)
    elif target.is_file():
        raise CheckpointError(f"{target} is a file, not a folder; name a folder that is not there yet")
    if resolved == source or resolved in source.parents or source in resolved.parents:
        raise CheckpointError(f"{target}: a checkpoint cannot be converted into its own folder, nor around it")
    if target.exists() and not (force or is_unfinished(target)):
        raise CheckpointError(_exists(target, file))
    if (
        not file
        and target.exists()
        and any(target.iterdir())
        and detect(target) is None
        and not (target / LATEST).is_file()
    ):
        raise CheckpointError(
            f"{target} holds {', '.join(sorted(path.name for path in target.iterdir())[:4])}, not a checkpoint; "
            "--force replaces only checkpoints: name another folder, or move this one away"
        )


def _exists(target: Path, file: bool) -> str:
    return f"{target} exists already; name another {'file' if file else 'folder'}, or replace it with --force"


def _check_file(target: Path, force: bool) -> None:
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder; name a file that is not there yet, such as {target / 'model'}")
    if force and target.exists() and target.stat().st_size and detect(target) is None:
        raise CheckpointError(f"{target} is not a checkpoint; --force replaces only checkpoints: name another file")


def write(
    plan: Plan,
    target: Path,
    mark: str,
    advance: Tally,
    *,
    inside: str = "",
    force: bool = False,
    allow_inf: bool = False,
) -> int:
    """Write all files that are not complete yet, and rename the folder. Returns how many were complete already.

    `mark`: the conversion's `identity`; files of another conversion are not used. `inside`: the name of a step's folder
    in `target`, to which `latest` then points. `force`: replace `target`. Of a plan of one file, `target` is this file,
    whatever the plan calls it. Raises CheckpointError for files that cannot be written, and for values that are too
    large for their new dtype, unless `allow_inf`.
    """
    target = behind_links(target)
    try:
        with open_journal(target) as journal:
            clean(target.parent, target.name)
            return _write(plan, target, mark, advance, journal, inside, force, allow_inf)
    except OSError as error:
        raise CheckpointError(
            f"{target} could not be written: {error.strerror} ({error.filename or beside(target, UNFINISHED)}); "
            "what stood there is as it was"
        ) from error


def _write(
    plan: Plan, target: Path, mark: str, advance: Tally, journal: IO[str], inside: str, force: bool, allow_inf: bool
) -> int:
    place = beside(target, UNFINISHED)
    result, done = place / target.name, completed(journal, place, mark)
    if plan.file:
        plan = replace(plan, outputs=(replace(plan.outputs[0], name=target.name),))
    if COMPLETE in done and not result.exists():  # it was killed after the folder was renamed
        remove(place)
        return len(plan.outputs)
    if target.exists() and not force:
        remove(place)
        raise CheckpointError(_exists(target, plan.file))
    missing = [output for output in plan.outputs if output.name not in done]
    check_space(place, sum(output.num_bytes for output in missing))
    folder = place if plan.file else result / inside
    folder.mkdir(parents=True, exist_ok=True)
    # Files that are complete already count as progress.
    advance(sum(output.num_bytes for output in plan.outputs) - sum(output.num_bytes for output in missing))
    entries = {**done, **write_files(missing, folder, journal, advance, allow_inf)}
    plan.finish(folder, {name: entry["result"] for name, entry in entries.items()})
    if inside:
        write_text(result / LATEST, inside)
    for path in [*result.rglob("*"), result] if result.is_dir() else [result]:
        sync(path)
    note_done(journal, {"name": COMPLETE, "result": None})
    sync(place / MARK)  # otherwise a power cut could leave the folder renamed and the journal without this entry
    old = put_in_place(result, target)
    if old:
        remove(old)
    remove(place)
    return len(plan.outputs) - len(missing)


def is_unfinished(target: Path) -> bool:
    """Whether a conversion to this folder was interrupted, even after the folder was renamed.

    If it was while its workplace was being removed, only the rest of that was left, which goes now.
    """
    target = behind_links(target)
    place = beside(target, UNFINISHED)
    if place.is_dir() and not any(place.iterdir()):
        if not target.exists():
            return True
        place.rmdir()
    return (place / MARK).is_file()


def name_latest(folder: Path) -> None:
    """Make `latest` name the newest step in a folder of steps."""
    write_text(folder / LATEST, list(find_steps(folder).values())[-1].name)


def infinite_values(plan: Plan) -> dict[str, int]:
    """How many values became infinite in their new dtype, by tensor, of the tensors that this process has written."""
    tensors = (ref for output in plan.outputs for ref in output.tensors)
    return {cast.name: sum(cast.infinite.values()) for cast in overflowed(tensors)}


def steps_of(folder: Path, wanted: Sequence[int] | None, steps: Mapping[int, Path]) -> dict[int, Path]:
    """The step folders to convert: the `wanted` ones, or all. Raises CheckpointError for steps that do not exist."""
    if not steps:
        raise CheckpointError(f"{folder} holds no folders of steps; --all-steps needs a run, or a folder of steps")
    if wanted is None:
        return dict(steps)
    if missing := [step for step in wanted if step not in steps]:
        raise CheckpointError(
            f"{folder} has no checkpoint of step {', '.join(map(str, missing))}; there are {', '.join(map(str, steps))}"
        )
    return {step: steps[step] for step in wanted}
