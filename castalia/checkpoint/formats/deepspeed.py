"""The folder that DeepSpeed writes, which NeoX and Megatron-DeepSpeed share: which files, which ranks, what is missing.

    layer_LL-model_TT-model_states.pt                one pipeline position on one tensor rank (pipeline layout)
    mp_rank_XX_model_states.pt                       counters; all weights of a tensor rank (sequential layout)
    [bf16_]zero_pp_rank_R_mp_rank_XX_optim_states.pt optimizer state of data-parallel rank R
    zero_pp_rank_R_mp_rank_XX_model_states.pt        ZeRO 3 instead of mp_rank_XX
    zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt           DeepSpeed's universal checkpoints

XX = pipeline stage * T + tensor rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from castalia.checkpoint.container import FileTensor, open_pt
from castalia.checkpoint.lazy import Cast
from castalia.checkpoint.tensors import TensorRef
from castalia.checkpoint.unpickle import Inert
from castalia.checkpoint.zero import (
    RankState,
    fp16_state,
    number,
    parameter_groups,
    plain_state,
    split_stages,
    zero_state,
)
from castalia.errors import CheckpointError

LAYER = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
STATE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
RANK_STATE = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
SHARD = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
BUFFERS = r"(inv_freq|slopes|_extra_state|masked_bias|attention\.bias)$"  # recomputed, never read


@dataclass
class Folder:
    """A folder's files, checked for gaps, and the opened model states."""

    path: Path
    layers: dict[int, list[Path]] = field(default_factory=dict)  # position -> a file for each tensor rank
    states: list[dict] = field(default_factory=list)  # opened mp_rank files; ZeRO 3: that of rank 0
    shards: list[list[Path]] = field(default_factory=list)  # [mp rank][data-parallel rank]
    num_files: int = 0
    tp: int = 1
    pp: int = 1
    stage3: bool = False

    @property
    def dp(self) -> int | None:
        return len(self.shards[0]) if self.shards else self.first.get("dp_world_size")

    @property
    def first(self) -> Mapping[str, Any]:
        """What the first model state holds, empty without one."""
        return self.states[0] if self.states else {}

    @property
    def args(self) -> Mapping[str, Any]:
        """The training program's arguments as it stored them."""
        stored = self.first.get("args") or {}
        return stored.fields if isinstance(stored, Inert) else stored

    @property
    def version(self) -> str | None:
        return self.first.get("ds_version")

    @property
    def zero_stage(self) -> int | None:
        config = self.first.get("ds_config")
        stage = config.get("zero_optimization", {}).get("stage") if isinstance(config, dict) else None
        return stage if stage is not None else (1 if self.shards else None)

    @property
    def step(self) -> int:
        names = ("iteration", "total_iters", "global_steps")
        return next((int(self.first[name]) for name in names if name in self.first), _step_of(self.path.name))


def names_of(path: Path) -> list[str]:
    return [entry.name for entry in path.iterdir()] if path.is_dir() else []


def scan(path: Path) -> Folder:
    """Look at the file names and open the model states. Raises CheckpointError for gaps and for mixed steps."""
    names = names_of(path)
    layers = _grid(path, _matches(LAYER, names), "layer", "tensor rank")
    states = {int(match[1]): path / name for name in names if (match := STATE.fullmatch(name))}
    folder = Folder(path, num_files=sum(name.endswith(".pt") for name in names))
    folder.layers = layers
    if not states and not layers:
        rank_states = sorted((int(m[1]), path / name) for name in names if (m := RANK_STATE.fullmatch(name)))
        states = {0: rank_states[0][1]} if rank_states else {}
        folder.stage3 = bool(rank_states)
    _expect_range(path, sorted(states), "mp_rank_XX_model_states.pt")
    folder.states = [_opened(states[rank], dict) for rank in sorted(states)]
    folder.tp = max((len(files) for files in layers.values()), default=len(states))
    folder.pp = max(1, len(states) // folder.tp) if layers else 1
    by_rank = [(mp_rank, rank, name) for rank, mp_rank, name in _matches(SHARD, names)]
    shards = _grid(path, by_rank, "mp_rank", "data-parallel rank")
    folder.shards = [shards[rank] for rank in sorted(shards)]
    _check_ranks(folder)
    return folder


def weights(folder: Folder) -> dict[str, list[TensorRef]]:
    """Every tensor by the name `position.name`, on each tensor rank. Opens the layer files, reads no tensor."""
    ranks: list[dict[str, TensorRef]] = [{} for _ in range(folder.tp)]
    for position, files in sorted(folder.layers.items()):
        for held, file in zip(ranks, files, strict=True):
            held |= {f"{position}.{name}": ref for name, ref in _tensors(_opened(file, dict)).items()}
    if not folder.layers:
        for held, state in zip(ranks, folder.states, strict=True):
            if not isinstance(state.get("module"), dict):
                raise CheckpointError(
                    f"{folder.path}: mp_rank_* holds no weights, and the layer_* files that should are missing"
                )
            held |= {global_name(name, 0): ref for name, ref in _tensors(state["module"]).items()}
    for rank, held in enumerate(ranks):
        for name in ranks[0].keys() | held.keys():
            shapes = [tuple(r[name].shape) if name in r else None for r in (ranks[0], held)]
            if shapes[0] != shapes[1]:
                raise CheckpointError(
                    f"{folder.path}: {name} has shape {shapes[0]} on tensor rank 0, {shapes[1]} on rank {rank}: "
                    "the files belong to different runs"
                )
    return {name: [held[name] for held in ranks] for name in ranks[0]}


def stage3_weights(folder: Folder, state: RankState) -> dict[str, list[TensorRef]]:
    """ZeRO 3 stores no whole weight: they are the masters, rounded to the dtype of the empty tensors in their place."""
    stored = {global_name(name, 0): ref for name, ref in _tensors(folder.first["module"]).items()}
    dtypes = {name: ref.dtype_name for name, ref in stored.items()}
    return {name: [Cast(ref, dtypes.get(name, ref.dtype_name))] for name, ref in state.master.items()}


def global_name(name: str, embedding: int) -> str:
    """A parameter's name `position.name`, from the name it has in a module or an optimizer."""
    name = name.removeprefix("module.").removeprefix("sequential.")
    return re.sub(r"^tied_modules\.embed\.", f"{embedding}.", name)


def optimizer_ranks(
    folder: Folder, held: Mapping[str, Sequence[TensorRef]], embedding: int, tied: bool
) -> list[RankState] | None:
    """The optimizer state of each tensor rank, all stages together, by global names. None where none is stored."""
    if not folder.shards and not any(state.get("optimizer") for state in folder.states):
        return None
    ranks = []
    for rank in range(folder.tp):
        states = [folder.states[stage * folder.tp + rank] for stage in range(folder.pp)]
        mine = {name: refs[rank] for name, refs in held.items() if not re.search(BUFFERS, name)}
        where = [f"{folder.path}: mp_rank_{stage * folder.tp + rank:02d}" for stage in range(folder.pp)]
        if folder.shards:
            files = [folder.shards[stage * folder.tp + rank] for stage in range(folder.pp)]
            parts = [_sharded(*each) for each in zip(files, states, where, strict=True)]
        else:
            parts = _unsharded(states, mine, embedding if tied else None, where)
        ranks.append(_merged(parts, embedding))
    return ranks


def loss_scale(folder: Folder) -> dict[str, float] | None:
    """The counters of fp16's loss scaler, under DeepSpeed's names."""
    fields: Mapping[str, Any] = folder.first.get("optimizer") or {}
    if folder.shards:
        stored = _opened(folder.shards[0][0], dict)["optimizer_state_dict"].get("loss_scaler")
        fields = stored.fields if isinstance(stored, Inert) else {}
    names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
    found = {name: float(fields[name]) for name in names if isinstance(fields.get(name), (int, float))}
    return found if "cur_scale" in found else None


def round_robin(folder: Folder) -> bool:
    """Whether DeepSpeed permuted the optimizer's order, which nothing in the files undoes."""
    config = folder.first.get("ds_config")
    return isinstance(config, dict) and bool(config.get("zero_optimization", {}).get("round_robin_gradients"))


def universal_state(folder: Folder, held: Mapping[str, Sequence[TensorRef]], embedding: int) -> list[RankState] | None:
    """The optimizer state of DeepSpeed's universal checkpoints, which a single rank holds. None if there is none."""
    root = folder.path / "zero"
    if not root.is_dir():
        return None
    if folder.tp > 1:
        raise CheckpointError(f"{root}: universal checkpoints of several tensor ranks cannot be read; use the original")
    result = RankState()
    for entry in sorted(entry for entry in root.iterdir() if entry.is_dir()):
        name = global_name(entry.name, embedding)
        for role, file in (("master", "fp32"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
            ref = _opened(entry / f"{file}.pt", dict)["param"]
            if name in held and ref.shape != held[name][0].shape:
                raise CheckpointError(f"{entry}: {file} has shape {ref.shape}, the weight {held[name][0].shape}")
            getattr(result, role)[name] = ref
        steps = [place / "step.pt" for place in (entry, root) if (place / "step.pt").is_file()]
        result.step[name] = number(open_pt(steps[0])) if steps else None
    return [result]


def _sharded(files: Sequence[Path], state: Mapping, where: str) -> RankState:
    return zero_state([_opened(file, dict) for file in files], state.get("param_shapes"), where)


def _unsharded(
    states: Sequence[Mapping], mine: Mapping[str, TensorRef], embedding: int | None, where: Sequence[str]
) -> list[RankState]:
    """The stages' states inside the model files, which do not say what belongs to which parameter."""
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, ref in mine.items():
        layers.setdefault(int(name.split(".")[0]), {})[name] = tuple(ref.shape)
    copy = layers.get(embedding, {}) if embedding is not None else {}
    optimizers = [state["optimizer"] for state in states]
    flat = "fp32_groups_flat" in optimizers[0]
    measure: Callable[[tuple[int, ...]], int] = prod if flat else lambda shape: 1
    sizes = [_group_sizes(optimizer, flat) for optimizer in optimizers]
    stages = split_stages(layers, copy, [sum(each) for each in sizes], measure, where[0])
    result = []
    for optimizer, shapes, each, place in zip(optimizers, stages, sizes, where, strict=True):
        groups = parameter_groups(shapes, each, measure, place)
        result.append(fp16_state(optimizer, groups, place) if flat else plain_state(optimizer, mine, groups, place))
    return result


def _group_sizes(optimizer: Mapping, flat: bool) -> list[int]:
    """Of each group: the elements of its flat vector, or the number of its parameters."""
    if flat:
        return [vector.shape[0] for vector in optimizer["fp32_groups_flat"]]
    return [len(group["params"]) for group in optimizer["param_groups"]]


def _merged(parts: Sequence[RankState], embedding: int) -> RankState:
    """The stages' states together. Of tied parameters that several stages hold, the first stage's is the true one."""
    result = RankState()
    for stage in reversed(parts):
        for role in ("master", "exp_avg", "exp_avg_sq", "step"):
            getattr(result, role).update({global_name(n, embedding): v for n, v in getattr(stage, role).items()})
    return result


def _matches(pattern: re.Pattern, names: Sequence[str]) -> list[tuple[int, int, str]]:
    return [(int(match[1]), int(match[2]), name) for name in names if (match := pattern.fullmatch(name))]


def _grid(path: Path, cells: Sequence[tuple[int, int, str]], row: str, column: str) -> dict[int, list[Path]]:
    """Files by row and column. Raises CheckpointError where the grid has holes."""
    found: dict[int, dict[int, Path]] = {}
    for y, x, name in cells:
        if x in found.setdefault(y, {}):
            raise CheckpointError(f"{path}: {name} and {found[y][x].name} are both {row} {y}, {column} {x}: keep one")
        found[y][x] = path / name
    width = max((max(files) + 1 for files in found.values()), default=0)
    for y, files in sorted(found.items()):
        if missing := sorted(set(range(width)) - set(files)):
            raise CheckpointError(
                f"{path}: {row} {y} has no file of {column} {missing[0]}, where other files show {width} ranks. "
                "Copy the missing files; if two runs share the folder, give each its own"
            )
    return {y: [files[x] for x in range(width)] for y, files in found.items()}


def _expect_range(path: Path, ranks: Sequence[int], pattern: str) -> None:
    missing = sorted(set(range(max(ranks, default=-1) + 1)) - set(ranks))
    if missing:
        raise CheckpointError(f"{path}: {pattern} is missing for XX = {missing[0]:02d}; there are {list(ranks)}")


def _check_ranks(folder: Folder) -> None:
    count, found = folder.first.get("mp_world_size"), len(folder.states)
    if folder.states and folder.layers and (found % folder.tp or (count or found) != found):
        raise CheckpointError(
            f"{folder.path}: {found} mp_rank_* files and layer files of {folder.tp} tensor ranks, but the run had "
            f"{count} model ranks: files are missing, or two runs share the folder"
        )
    tp = folder.args.get("model_parallel_size") or folder.args.get("tensor_model_parallel_size")
    if tp is not None and tp != folder.tp:
        raise CheckpointError(
            f"{folder.path}: the files are of {folder.tp} tensor ranks, but the run had {tp}: "
            "the other ranks' files are missing"
        )
    if folder.shards and len(folder.shards) != max(found, 1):
        raise CheckpointError(
            f"{folder.path}: optimizer files of {len(folder.shards)} model ranks, but {found} mp_rank_* files. "
            "To use the weights alone, move the optimizer files out of the folder"
        )
    if folder.states:
        steps = {state.get("iteration", state.get("global_steps")) for state in folder.states}
        if len(steps) > 1:
            raise CheckpointError(
                f"{folder.path}: mp_rank_* files of different steps are mixed: {sorted(steps, key=str)}"
            )
    world = folder.first.get("dp_world_size")
    if folder.shards and world is not None and world != len(folder.shards[0]):
        raise CheckpointError(
            f"{folder.path}: optimizer files of {len(folder.shards[0])} data-parallel ranks, but the run had {world}: "
            "a shard is missing. To use the weights alone, move the optimizer files out of the folder"
        )


def _opened(path: Path, kind: type) -> Any:
    value = open_pt(path)
    if not isinstance(value, kind):
        raise CheckpointError(f"{path} holds a {type(value).__name__} where a checkpoint has a {kind.__name__}")
    return value


def _tensors(items: Mapping) -> dict[str, TensorRef]:
    return {name: ref for name, ref in items.items() if isinstance(ref, FileTensor)}


def _step_of(name: str) -> int:
    match = re.search(r"(\d+)$", name)
    return int(match[1]) if match else 0
