"""Ways in which a series of checkpoints goes wrong, done to a series that is right."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from castalia.checkpoint import convert
from castalia.checkpoint.file_plan import WriteOptions
from castalia.checkpoint.formats import FORMATS
from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.tensors import Checkpoint
from castalia.series.members import find_series
from castalia.storage.lazy import InMemory, TensorRef

Change = Callable[[str, torch.Tensor], torch.Tensor]


def steps_of(series: Path) -> dict[int, Path]:
    return {member.step: member.path for member in find_series([series])}


def written(checkpoint: Checkpoint, target: Path, shard_bytes: int = 5 << 30) -> None:
    """Write a checkpoint in its own format, in place of whatever lies there."""
    form = FORMATS[checkpoint.format].target
    beside = target.with_name(f"new-{target.name}")
    plan = convert.plan_files(form, checkpoint, WriteOptions(shard_bytes=shard_bytes, folder=beside.resolve()))
    convert.write(plan, beside, "mark", lambda count: None)
    shutil.rmtree(target)
    beside.rename(target)


def read(refs: Mapping[str, TensorRef]) -> dict[str, InMemory]:
    return {name: InMemory(ref.read()) for name, ref in refs.items()}


def with_weights(folder: Path, weights: Mapping[str, TensorRef], *, masters: bool = True) -> None:
    """Put other weights into a step, which keeps everything else. `masters`: into its optimizer state, too."""
    checkpoint = open_checkpoint(folder)
    model = {name: weights.get(name, ref) for name, ref in read(checkpoint.model).items()}
    written(replace(checkpoint, model=model, optimizer=_state(checkpoint, model)), folder)


def _state(checkpoint: Checkpoint, model: Mapping[str, TensorRef]) -> Any:
    if checkpoint.optimizer is None:
        return None
    return {
        name: {
            kind: model[name] if kind == "master" else ref if kind == "step" else InMemory(ref.read())
            for kind, ref in state.items()
        }
        for name, state in checkpoint.optimizer.items()
    }


def with_state(folder: Path, change: Callable[[str, str, torch.Tensor], torch.Tensor]) -> None:
    """Change the moments of a step: `change(name, kind, values)`."""
    checkpoint = open_checkpoint(folder)
    model = read(checkpoint.model)
    state = _state(checkpoint, model)
    for name, entry in state.items():
        for kind, ref in entry.items():
            if kind not in ("master", "step"):
                entry[kind] = InMemory(change(name, kind, ref.read()))
    written(replace(checkpoint, model=model, optimizer=state), folder)


def changed(folder: Path, change: Change) -> None:
    """Change the weights of a step: `change(name, values)`."""
    model = open_checkpoint(folder).model
    with_weights(folder, {name: InMemory(change(name, ref.read())) for name, ref in model.items()})


def taken_from(folder: Path, other: Path, part: str = "") -> None:
    """Put the weights of another checkpoint into a step, or only those whose names hold `part`."""
    model = read(open_checkpoint(other).model)
    with_weights(folder, {name: ref for name, ref in model.items() if part in name})


def copied_whole(folder: Path, other: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


def cut_short(folder: Path) -> None:
    file = weight_file(folder)
    content = file.read_bytes()
    file.unlink()  # it may be a second name of another folder's file
    file.write_bytes(content[:-100])


def byte_flipped(folder: Path) -> None:
    file = weight_file(folder)
    content = bytearray(file.read_bytes())
    content[-len(content) // 3] ^= 0x40
    file.unlink()
    file.write_bytes(content)


def weight_file(folder: Path) -> Path:
    return min(path for path in folder.iterdir() if path.name.startswith("model") and path.suffix == ".safetensors")


def exported(run: Path, target: Path, to: str, dtype: torch.dtype, optimizer: bool, shard_bytes: int = 5 << 30) -> Path:
    """All steps of a run in another format. Without the optimizer, nothing but the weights is there."""
    for step, folder in steps_of(run).items():
        checkpoint = convert.prepare(open_checkpoint(folder), dtype, optimizer)
        place = target / f"{'global_' if to == 'neox' else ''}step{step}"
        target.mkdir(exist_ok=True)
        plan = convert.plan_files(to, checkpoint, WriteOptions(shard_bytes=shard_bytes, folder=place.resolve()))
        convert.write(plan, place, "mark", lambda count: None)
        if not optimizer:
            (place / "castalia.json").unlink(missing_ok=True)
    return target


def exchanged(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def first(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Changes the first matrix whose name holds `part`."""

    def one(name: str, values: torch.Tensor) -> torch.Tensor:
        return change(values.clone()) if part in name else values

    return one


def with_nan(values: torch.Tensor) -> torch.Tensor:
    values.view(-1)[5] = float("nan")
    return values


def with_hole(values: torch.Tensor) -> torch.Tensor:
    values.view(-1)[100:400] = 0
    return values


def with_spike(values: torch.Tensor) -> torch.Tensor:
    values.view(-1)[77] *= 2.0**40
    return values
