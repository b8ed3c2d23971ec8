"""Report what is inside a checkpoint, from headers and a sample of its values, without torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any, get_args

from castalia.checkpoint.adapters import adapters_of
from castalia.checkpoint.rules import MOMENTS
from castalia.checkpoint.sampled_values import Sums, sample
from castalia.checkpoint.tensors import Checkpoint, state_tensors
from castalia.config.schema import InitMethod
from castalia.config.tensor_row import Kind
from castalia.config.tensor_table import row_of, tp_dim
from castalia.examine.facts import architecture
from castalia.model.init_std import mup_scale, standard_deviation
from castalia.plan.count import count, neox_count, non_embedding
from castalia.storage.extent import verify, verifying
from castalia.storage.lazy import ByteRun, TensorRef, same_bits
from castalia.units import short_number

SPANS = 64  # stretches of rows that are sampled of each kind of tensor
FITS = 0.03  # largest relative difference of a standard deviation from that of an init method


def report(checkpoint: Checkpoint, vocabulary: tuple[int | None, str] = (None, ""), *, full: bool = False) -> dict:
    """Everything about a checkpoint, as values of JSON.

    `vocabulary`: the size of the tokenizer in tokens and its source. Values are sampled; `full` reads every tensor
    instead, verifies checksums and lists each tensor.
    """
    facts, differences = architecture(checkpoint)
    total = sum(prod(ref.shape) for ref in checkpoint.model.values())
    stored = stored_bytes(checkpoint)
    sums = read_sums(checkpoint) if full else sample_sums(checkpoint.model)
    result = {
        "path": checkpoint.path,
        "format": checkpoint.format,
        "step": checkpoint.progress.step,
        "progress": _progress(checkpoint),
        "files": _files(checkpoint),
        "architecture": {name: asdict(fact) for name, fact in facts.items()},
        "disagreements": differences,
        "parameters": _parameters(checkpoint, total),
        "bytes": stored,
        "meaning": meaning(checkpoint, total, stored, {name: fact.value for name, fact in facts.items()}),
        "precision": _precision(checkpoint),
        "optimizer": _optimizer(checkpoint),
        "vocabulary": _vocabulary(checkpoint, vocabulary),
        "statistics": [_statistics(checkpoint, kind, names, sums) for kind, names in by_kind(checkpoint.model).items()],
        "sampled_values": sum(seen.count for seen in sums.values()),
        "anomalies": list(anomalies(checkpoint, sums, full)),
        "notes": [*checkpoint.notes, *checkpoint.state_notes],
    }
    if full:
        result["tensors"] = [_tensor(name, ref, sums[name]) for name, ref in checkpoint.model.items()]
    return result


def by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    """Names of canonical tensors by kind, in the order of `Kind`; tensors of no kind are left out."""
    members: dict[str, list[str]] = {kind: [] for kind in get_args(Kind)}
    for name in names:
        if kind := row_of(name).kind:
            members[kind].append(name)
    return {kind: of_kind for kind, of_kind in members.items() if of_kind}


def sample_sums(tensors: Mapping[str, TensorRef]) -> dict[str, Sums]:
    """Statistics of a sample of every tensor, or of `SPANS` evenly chosen ones where a kind has more tensors."""
    result: dict[str, Sums] = {}
    for names in by_kind(tensors).values():
        chosen = names if len(names) <= SPANS else [names[len(names) * i // SPANS] for i in range(SPANS)]
        result |= {name: sample(tensors[name], max(1, SPANS // len(chosen))) for name in chosen}
    return result


def read_sums(checkpoint: Checkpoint) -> dict[str, Sums]:
    """Statistics of all weights, which are read a piece at a time. The optimizer state is verified, too.

    Raises CheckpointError for damaged files.
    """
    with verifying(checkpoint.model.values()):
        sums = {name: whole(ref) for name, ref in checkpoint.model.items()}
    for state in (checkpoint.optimizer or {}).values():
        verify(state_tensors(state).values())
    return sums


def whole(ref: TensorRef) -> Sums:
    """Statistics of all values of a tensor."""
    result = Sums()
    for piece in ref.pieces():
        result.add(piece.float().flatten().numpy(), prod(ref.shape[1:]))
    return result


def stored_bytes(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes on disk: weights, masters, moments, the rest and the total. Copies on other ranks are included.

    Masters that are the weights themselves count as weights.
    """
    groups: dict[str, list[TensorRef]] = {"weights": list(checkpoint.model.values()), "masters": [], "moments": []}
    for state in (checkpoint.optimizer or {}).values():
        for kind, ref in state_tensors(state).items():
            groups["masters" if kind == "master" else "moments"].append(ref)
    seen: set[ByteRun] = set()
    result = {}
    for kind, refs in groups.items():
        runs = {run for ref in refs for run in ref.runs()} - seen
        seen |= runs
        result[kind] = sum(run.num_bytes for run in runs)
    total = sum(size for _, size in _listed_files(Path(checkpoint.path)))
    return result | {"rest": max(0, total - sum(result.values())), "total": total}


def meaning(checkpoint: Checkpoint, total: int, stored: Mapping[str, int], facts: Mapping[str, Any]) -> str:
    """One sentence about what the files hold and what can be done with them."""
    used = sum(stored[kind] for kind in ("weights", "masters", "moments"))
    shape = f" of a {facts.get('num_layers')} x {facts.get('hidden_size')} model"
    dtypes = " and ".join(sorted({ref.dtype_name for ref in checkpoint.model.values()}))
    size = f"{short_number(total)} parameters x {used / max(total, 1):.3g} bytes"
    if checkpoint.optimizer is None:
        text = f"{size}: the weights alone{shape}, in {dtypes}; they run and can be trained on, not resumed"
    else:
        trained = set(filter(checkpoint.config.finetune.trains, checkpoint.model)) if checkpoint.config else set()
        complete = (
            "a complete" if checkpoint.optimizer.keys() >= (trained or checkpoint.model.keys()) else "an incomplete"
        )
        text = f"{size}: {complete} {dtypes} + optimizer checkpoint{shape}"
        if _is_adam(checkpoint):
            text = text.replace("+ optimizer", "+ Adam")
    if lora := adapters_of(checkpoint):
        text += f", with adapters of rank {lora.rank}, which everything but training sees merged"
    if other := checkpoint.facts.other_model:
        text += (
            f"; nothing of the {other.num_layers} x {other.hidden_size} model of {checkpoint.facts.other_source}, "
            f"{short_number(non_embedding(other))} parameters without embeddings, is in it"
        )
    return text


def anomalies(checkpoint: Checkpoint, sums: Mapping[str, Sums], full: bool) -> Iterator[str]:
    """A line for each thing that a healthy checkpoint does not have."""
    started = checkpoint.progress.step > 0
    values = "values" if full else "sampled values"
    for name, seen in sums.items():
        matrix = row_of(name).is_drawn
        if seen.not_finite:
            yield f"{name}: {seen.not_finite:,} of {seen.count:,} {values} are NaN or infinite"
        if seen.all_zero and row_of(name).used and (started or matrix or name.endswith("norm.weight")):
            yield f"{name}: all {seen.count:,} {values} are zero"
        elif matrix and seen.zero_rows:
            yield f"{name}: {seen.zero_rows:,} of {seen.rows:,} {'rows' if full else 'sampled rows'} are zero"
    yield from _without_gradient(checkpoint)
    if full:
        yield from _inexact(checkpoint)


def _without_gradient(checkpoint: Checkpoint) -> Iterator[str]:
    """Tensors whose sampled second moments are all zero, so that they never had a gradient."""
    states = {name: state for name, state in (checkpoint.optimizer or {}).items() if "exp_avg_sq" in state}
    if not any(state.get("step") for state in states.values()):
        return
    seen = sample_sums({name: state["exp_avg_sq"] for name, state in states.items()})
    for kind, names in by_kind(seen).items():
        idle = [name for name in names if seen[name].all_zero and row_of(name).used]
        if idle and len(idle) == len(names):
            why = "attention had no part in training" if kind.startswith("attention") else "they were never trained"
            yield f"{kind}: second moments are zero in all {len(idle)} tensors: no gradient ever came, {why}"
        elif idle:
            yield f"{idle[0]}: second moments are zero, no gradient ever came" + _more(len(idle) - 1)


def _more(others: int) -> str:
    return f"; {others} more like it" if others else ""


def _inexact(checkpoint: Checkpoint) -> Iterator[str]:
    """Weights that are not their masters rounded, and copies on tensor ranks that drifted apart."""
    from castalia.checkpoint.compare import pairs  # imports torch
    from castalia.checkpoint.rules import drift

    for name, state in (checkpoint.optimizer or {}).items():
        weight, master = checkpoint.model.get(name), state.get("master")
        if weight is None or master is None or master is weight or name.endswith(".bias"):
            continue
        fits = tuple(master.shape) == tuple(weight.shape)
        if not fits or not all(same_bits(w, m.to(w.dtype)) for w, m in pairs(weight, master)):
            yield f"{name}: the stored weights are not the fp32 masters rounded"
    for name, distance in drift(checkpoint.model).items():
        yield f"{name}: its copies on the tensor ranks differ by up to {distance:.3g}; their mean is taken"


def _statistics(checkpoint: Checkpoint, kind: str, names: list[str], sums: Mapping[str, Sums]) -> dict[str, Any]:
    """Statistics of one kind of tensor, and the init methods whose standard deviation they have."""
    together = Sums()
    for name in names:
        if name in sums:
            together.merge(sums[name])
    result: dict[str, Any] = {
        "kind": kind, "tensors": len(names), "mean": together.mean, "std": together.std,
        "low": together.low if together.finite else None, "high": together.high if together.finite else None,
        "not_finite": together.not_finite, "values": together.count,
    }  # fmt: skip
    model = checkpoint.config.model if checkpoint.config else None
    row = row_of(names[0])
    if model is None or row.init not in ("random", "residual") or len(checkpoint.model[names[0]].shape) != 2:
        return result | {"methods": {}, "fits": [], "start": None}
    shape = _drawn_shape(checkpoint, names[0])
    # The standard deviation that each init method would have given this matrix.
    methods = {
        name: standard_deviation(model, name, shape) * mup_scale(model, name, names[0]) for name in get_args(InitMethod)
    }
    fits = [name for name, expected in methods.items() if abs(together.std / expected - 1) < FITS]
    start = None
    if _knows_method(checkpoint):
        start = model.output_init_method if row.init == "residual" else model.init_method
    return result | {"methods": methods, "fits": fits, "start": start}


def _drawn_shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """The shape of the matrix that was drawn: NeoX draws each tensor rank's part by itself."""
    shape = list(checkpoint.model[name].shape)
    dim = tp_dim(name)
    if dim is not None:
        shape[dim] //= checkpoint.facts.tp or 1
    return tuple(shape)


def _knows_method(checkpoint: Checkpoint) -> bool:
    """Whether the config, or the defaults of its format, say how the weights were initialized."""
    return checkpoint.format == "native" or bool(checkpoint.config and checkpoint.config.origins)


def _parameters(checkpoint: Checkpoint, total: int) -> dict[str, int | None]:
    model = checkpoint.config.model if checkpoint.config else None
    outside = sum(
        prod(r.shape) for n, r in checkpoint.model.items() if row_of(n).kind in ("embedding", "positions", "head")
    )
    as_neox_counts = None
    if model is not None and model.vocab_size is not None and count(model).total == total:
        as_neox_counts = neox_count(model, checkpoint.facts.tp or 1, checkpoint.facts.pp or 1)
    return {"total": total, "non_embedding": total - outside, "as_neox_counts": as_neox_counts}


def _precision(checkpoint: Checkpoint) -> dict[str, str]:
    dtypes: dict[str, set[str]] = {"weights": {ref.dtype_name for ref in checkpoint.model.values()}}
    for state in (checkpoint.optimizer or {}).values():
        for kind, ref in state_tensors(state).items():
            dtypes.setdefault(kind, set()).add(ref.dtype_name)
    return {kind: ", ".join(sorted(names)) for kind, names in dtypes.items()}


def _optimizer(checkpoint: Checkpoint) -> dict[str, Any] | None:
    if checkpoint.optimizer is None:
        return None
    steps = sorted({state["step"] for state in checkpoint.optimizer.values()})
    return {
        "name": "adam" if _is_adam(checkpoint) else checkpoint.config.optimizer.name if checkpoint.config else None,
        "steps": steps,
        "tensors": len(checkpoint.optimizer),
        "of": len(checkpoint.model),
        "loss_scale": checkpoint.progress.loss_scale,
    }


def _is_adam(checkpoint: Checkpoint) -> bool:
    return all(state.keys() >= set(MOMENTS) for state in (checkpoint.optimizer or {}).values())


def _progress(checkpoint: Checkpoint) -> dict[str, Any]:
    progress = checkpoint.progress
    schedule = progress.schedule and {
        name: value for name, value in progress.schedule.items() if isinstance(value, (int, float, str))
    }
    return {"step": progress.step, "skipped": progress.skipped, "tokens": progress.tokens, "stored_schedule": schedule}


def _files(checkpoint: Checkpoint) -> dict[str, Any]:
    """The number of files, and how the format cut the model over them."""
    names = ("era", "version", "tp", "pp", "dp", "zero", "pipeline_files", "optimizer_files", "model_type", "versions")
    known = {name: value for name in names if (value := getattr(checkpoint.facts, name)) is not None}
    return {"count": len(_listed_files(Path(checkpoint.path))), **known}


def _listed_files(folder: Path) -> list[tuple[str, int]]:
    """(path, bytes) of all files below a folder, except hidden ones; of a checkpoint that is a file, this file."""
    if folder.is_file():
        return [(str(folder), os.stat(folder).st_size)]
    files = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [os.path.join(place, name) for name in names if not name.startswith(".")]
        files += [(path, os.stat(path).st_size) for path in paths if os.path.isfile(path)]
    return files


def _vocabulary(checkpoint: Checkpoint, known: tuple[int | None, str]) -> dict[str, Any]:
    embedding = checkpoint.model.get("embed.weight")
    tokenizer = checkpoint.config.tokenizer if checkpoint.config else None
    return {
        "rows": embedding.shape[0] if embedding is not None and embedding.shape else None,
        "logical": known[0],
        "source": known[1],
        "tokenizer": {"kind": tokenizer.kind, "path": tokenizer.path} if tokenizer else None,
    }


def _tensor(name: str, ref: TensorRef, seen: Sums) -> dict[str, Any]:
    return {
        "name": name, "shape": list(ref.shape), "dtype": ref.dtype_name, "mean": seen.mean, "std": seen.std,
        "low": seen.low if seen.finite else None, "high": seen.high if seen.finite else None,
        "not_finite": seen.not_finite, "zero_rows": seen.zero_rows,
    }  # fmt: skip
