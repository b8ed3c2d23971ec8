"""The folder that DeepSpeed writes, for NeoX and Megatron-DeepSpeed alike: its files, its ranks, what is missing.

    layer_LL-model_TT-model_states.pt                one pipeline position on one tensor rank (pipeline layout)
    mp_rank_XX_model_states.pt                       counters; all weights of a tensor rank (sequential layout)
    [bf16_]zero_pp_rank_R_mp_rank_XX_optim_states.pt optimizer state of data-parallel rank R
    zero_pp_rank_R_mp_rank_XX_model_states.pt        ZeRO 3 instead of mp_rank_XX
    zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt           DeepSpeed's universal checkpoints

XX = pipeline stage * T + tensor rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from castalia.checkpoint.rules import STATE_ROLES
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
from castalia.storage.derived import Cast
from castalia.storage.extent import FileTensor
from castalia.storage.lazy import TensorRef
from castalia.storage.torch_file import open_pt
from castalia.storage.unpickle import Inert

LAYER = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
STATE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
RANK_STATE = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
SHARD = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
BUFFERS = r"(inv_freq|slopes|_extra_state|masked_bias|attention\.bias)$"  # derived, never read


@dataclass
class ScannedFolder:
    """A step's folder: its files, checked for gaps, and its opened model states."""

    path: Path
    layers: dict[int, list[Path]] = field(default_factory=dict)  # position -> a file for each tensor rank
    states: list[dict] = field(default_factory=list)  # opened mp_rank files by number; ZeRO 3: that of rank 0 only
    shards: list[list[Path]] = field(default_factory=list)  # [mp rank][data-parallel rank]
    tp: int = 1
    pp: int = 1
    stage3: bool = False
    listed: frozenset[str] = frozenset()  # names of parameters in the stored `param_shapes`

    @property
    def dp(self) -> int | None:
        """The number of data-parallel ranks; None where nothing says."""
        return len(self.shards[0]) if self.shards else self.first.get("dp_world_size")

    @property
    def first(self) -> Mapping[str, Any]:
        """The content of the first model state; empty if there is none."""
        return self.states[0] if self.states else {}

    @property
    def args(self) -> Mapping[str, Any]:
        """The training program's arguments as it stored them."""
        stored = self.first.get("args") or {}
        return stored.fields if isinstance(stored, Inert) else stored

    @property
    def version(self) -> str | None:
        """DeepSpeed's version; the first releases did not store it."""
        return self.first.get("ds_version")

    @property
    def zero_stage(self) -> int | None:
        """ZeRO's stage; None where nothing says."""
        config = self.first.get("ds_config")
        stage = config.get("zero_optimization", {}).get("stage") if isinstance(config, dict) else None
        return stage if stage is not None else (1 if self.shards else None)

    @property
    def step(self) -> int:
        """The training step, from the model state or the folder's name."""
        names = ("iteration", "total_iters", "global_steps")
        return next((int(self.first[name]) for name in names if name in self.first), _step_of(self.path.name))


def names_of(path: Path) -> list[str]:
    """The names in a folder; none if it is not a folder."""
    return [entry.name for entry in path.iterdir()] if path.is_dir() else []


def is_megatron(path: Path) -> bool:
    """Whether a folder has the layer files of Megatron-DeepSpeed.

    Its embedding is layer 1 and its first block layer 3, where NeoX has 0 and 2. If files are missing, so that only
    layer 3 is certain, the names of the tensors in it decide.
    """
    files = {int(match[1]): name for name in names_of(path) if (match := LAYER.fullmatch(name))}
    if not {1, 3} & files.keys() or {0, 2} & files.keys():
        return False
    return 1 in files or any(str(name).startswith("self_attention.") for name in _opened(path / files[3], dict))


def scan(path: Path) -> ScannedFolder:
    """Sort a folder's files by rank and open its model states; no tensor is read.

    Raises CheckpointError for files that are missing, as far as the others imply them, and for files of several steps
    or runs in one folder.
    """
    names = names_of(path)
    layers = _grid(path, _matches(LAYER, names), "layer", "tensor rank")
    states = {int(match[1]): path / name for name in names if (match := STATE.fullmatch(name))}
    # File names have the data-parallel rank first.
    by_rank = [(mp_rank, rank, name) for rank, mp_rank, name in _matches(SHARD, names)]
    shards = _grid(path, by_rank, "mp_rank", "data-parallel rank")
    folder = ScannedFolder(path)
    if not states and not layers:  # ZeRO 3 has a model state for each data-parallel rank; the first is enough
        rank_states = sorted((int(m[1]), path / name) for name in names if (m := RANK_STATE.fullmatch(name)))
        states = {0: rank_states[0][1]} if rank_states else {}
        folder.stage3 = bool(rank_states)
    folder.states = [_opened(states[rank], dict) for rank in sorted(states)]
    # If model states have no weights, layer files must have been there.
    pipeline = bool(layers) or not any(isinstance(state.get("module"), dict) for state in folder.states)
    # The number of ranks is the largest that any file or counter mentions, so that missing files are noticed.
    mp_ranks = max([folder.first.get("mp_world_size") or 0, *(rank + 1 for rank in (*states, *shards))])
    tensor_ranks = [rank for files in layers.values() for rank in files] if pipeline else list(range(mp_ranks))
    folder.tp = max([1, _stored_tp(folder) or 0, *(rank + 1 for rank in tensor_ranks)])
    folder.pp = max(1, -(-mp_ranks // folder.tp))
    mp_ranks = folder.pp * folder.tp
    _check_ranks(folder, mp_ranks)
    _require_files(folder, layers, states, shards, mp_ranks, pipeline)
    folder.layers = {position: [files[rank] for rank in range(folder.tp)] for position, files in layers.items()}
    folder.shards = [[shards[rank][dp_rank] for dp_rank in sorted(shards[rank])] for rank in sorted(shards)]
    return folder


def _stored_tp(folder: ScannedFolder) -> int | None:
    return folder.args.get("model_parallel_size") or folder.args.get("tensor_model_parallel_size")


def _require_files(
    folder: ScannedFolder,
    layers: Mapping[int, Mapping[int, Path]],
    states: Mapping[int, Path],
    shards: Mapping[int, Mapping[int, Path]],
    mp_ranks: int,
    pipeline: bool,
) -> None:
    """Raises CheckpointError that names the missing files of every kind that the folder should have.

    Layers and optimizer shards that no file mentions are not required: a folder may have weights only.
    """
    shapes = [state["param_shapes"] for state in folder.states if state.get("param_shapes")]
    if not shapes:  # the first releases have them in the optimizer files
        files = [files[min(files)] for files in shards.values() if files]
        shapes = [state["param_shapes"] for file in files if (state := _opened(file, dict)).get("param_shapes")]
    folder.listed = frozenset(
        name for stored in shapes for group in ([stored] if isinstance(stored, Mapping) else stored) for name in group
    )
    there = [path.name for files in (*layers.values(), *shards.values()) for path in files.values()]
    there += [path.name for path in states.values()]
    needed = {f"mp_rank_{rank:02d}_model_states.pt" for rank in range(mp_ranks)} if states or shards else set()
    if folder.stage3:
        needed = {next(iter(states.values())).name}
    if pipeline:
        positions = {*layers, *_positions(folder.listed)} - {TIED}
        needed |= {layer_file(position, rank) for position in positions for rank in range(folder.tp)}
    weights_alone = not set(needed) - set(there)
    # data-parallel ranks
    width = max([folder.first.get("dp_world_size") or 0, *(rank + 1 for files in shards.values() for rank in files)])
    if shards:
        prefix = "bf16_" if any(name.startswith("bf16_") for name in there) else ""
        needed |= {
            f"{prefix}zero_pp_rank_{rank}_mp_rank_{mp_rank:02d}_optim_states.pt"
            for mp_rank in range(mp_ranks)
            for rank in range(width)
        }
    refuse_missing(folder.path, needed, there, weights_alone)


def layer_file(position: int, rank: int) -> str:
    """The name of the file of one pipeline position on one tensor rank."""
    return f"layer_{position:02d}-model_{rank:02d}-model_states.pt"


TIED = -1  # stands for the position of a parameter that several stages hold


def _positions(names: Iterable[str]) -> set[int]:
    plain = (name.removeprefix("module.").removeprefix("sequential.") for name in names)
    return {int(match[1]) if (match := re.match(r"(\d+)\.", name)) else TIED for name in plain}


def refuse_missing(path: Path, needed: Collection[str], there: Collection[str], weights_alone: bool = False) -> None:
    """Raises CheckpointError that names the needed files that are missing, and lists those that are there.

    `weights_alone`: whether the weights are complete, so that the user may do without the optimizer state.
    """
    missing = sorted(set(needed) - set(there))
    if not missing:
        return
    more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
    way = "; to use the weights alone, move the *_optim_states.pt files out of the folder" if weights_alone else ""
    raise CheckpointError(
        f"{path} lacks {len(missing)} of {len(set(needed) | set(there))} files: {', '.join(missing[:8])}{more}. "
        f"There are {_summary(there)}. Copy the missing files, nothing is loaded in part; if two runs share the "
        f"folder, give each its own{way}"
    )


def _summary(names: Collection[str]) -> str:
    """The numbers of the files of each kind, for an error."""
    kinds = {
        "layer files (layer-tensor rank)": [f"{m[1]}-{m[2]}" for m in map(LAYER.fullmatch, names) if m],
        "mp_rank files": [m[1] for m in map(STATE.fullmatch, names) if m],
        "optimizer files (mp_rank-data rank)": [f"{m[2]}-{m[1]}" for m in map(SHARD.fullmatch, names) if m],
    }
    return (
        "; ".join(f"{kind} {_shortened(sorted(numbers))}" for kind, numbers in kinds.items() if numbers)
        or "none of them"
    )


def _shortened(numbers: Sequence[str]) -> str:
    return ", ".join(numbers if len(numbers) <= 24 else [*numbers[:20], "...", *numbers[-3:]])


def weights(folder: ScannedFolder) -> dict[str, list[TensorRef]]:
    """Every weight by the name `position.name`: a list of one tensor for each tensor rank. No tensor is read.

    Raises CheckpointError for missing weights and for shapes that differ between tensor ranks.
    """
    ranks: list[dict[str, TensorRef]] = [{} for _ in range(folder.tp)]
    for position, files in sorted(folder.layers.items()):
        for held, file in zip(ranks, files, strict=True):
            held |= {f"{position}.{name}": ref for name, ref in _tensors(_opened(file, dict)).items()}
    if not folder.layers:
        for held, state in zip(ranks, folder.states, strict=True):
            if not isinstance(state.get("module"), dict):
                raise CheckpointError(
                    f"{folder.path}: mp_rank_* holds no weights, and all layer_*-model_*-model_states.pt files, which "
                    "should, are missing: copy them"
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


def stage3_weights(folder: ScannedFolder, state: RankState) -> dict[str, list[TensorRef]]:
    """The weights of ZeRO 3, which stores none: the masters rounded to the dtype of their empty placeholders."""
    stored = {global_name(name, 0): ref for name, ref in _tensors(folder.first["module"]).items()}
    dtypes = {name: ref.dtype_name for name, ref in stored.items()}
    return {name: [Cast(ref, dtypes.get(name, ref.dtype_name))] for name, ref in state.master.items()}


def global_name(name: str, embedding: int) -> str:
    """A parameter's name `position.name`, from its name in a module or an optimizer.

    `embedding`: the position of the embedding, which tied parameters belong to.
    """
    name = name.removeprefix("module.").removeprefix("sequential.")
    return re.sub(r"^tied_modules\.embed\.", f"{embedding}.", name)


def optimizer_ranks(
    folder: ScannedFolder, held: Mapping[str, Sequence[TensorRef]], embedding: int, tied: bool
) -> list[RankState] | None:
    """The optimizer state of each tensor rank, all stages together, by `position.name`; None if none is stored.

    `held`: the weights of `weights`. `embedding`: see `global_name`. `tied`: whether the head is the embedding.
    """
    if not folder.shards and not any(state.get("optimizer") for state in folder.states):
        return None
    ranks = []
    for rank in range(folder.tp):
        states = [folder.states[stage * folder.tp + rank] for stage in range(folder.pp)]
        mine = {name: refs[rank] for name, refs in held.items() if not re.search(BUFFERS, name)}
        where = [f"{folder.path}: mp_rank_{stage * folder.tp + rank:02d}" for stage in range(folder.pp)]
        if folder.shards:
            files = [folder.shards[stage * folder.tp + rank] for stage in range(folder.pp)]
            parts = [_sharded(*stage) for stage in zip(files, states, where, strict=True)]
        else:
            parts = _unsharded(states, mine, embedding if tied else None, where)
        ranks.append(_merged(parts, embedding))
    return ranks


def loss_scale(folder: ScannedFolder) -> dict[str, float] | None:
    """The counters of the fp16 loss scaler, by DeepSpeed's names; None without a scaler."""
    fields: Mapping[str, Any] = _first_optimizer(folder)
    if folder.shards:
        stored = fields.get("loss_scaler")
        fields = stored.fields if isinstance(stored, Inert) else {}
    names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
    counters = {name: float(fields[name]) for name in names if isinstance(fields.get(name), (int, float))}
    return counters if "cur_scale" in counters else None


def optimizer_settings(folder: ScannedFolder) -> dict[str, Any]:
    """The optimizer's `betas`, `eps`, `weight_decay` and `clip_grad`, as far as its files have them."""
    fields = _first_optimizer(folder)
    inner = fields.get("base_optimizer_state") or fields.get("optimizer_state_dict") or fields
    groups = inner.get("param_groups") if isinstance(inner, dict) else None
    first = groups[0] if groups and isinstance(groups[0], dict) else {}
    settings = {name: first[name] for name in ("betas", "eps", "weight_decay") if name in first}
    return settings | ({"clip_grad": fields["clip_grad"]} if "clip_grad" in fields else {})


def _first_optimizer(folder: ScannedFolder) -> Mapping[str, Any]:
    """The optimizer state of the first rank; empty if there is none."""
    if folder.shards:
        return _opened(folder.shards[0][0], dict)["optimizer_state_dict"]
    return folder.first.get("optimizer") or {}


def round_robin(folder: ScannedFolder) -> bool:
    """Whether DeepSpeed permuted the parameters in the optimizer; the files do not say how."""
    config = folder.first.get("ds_config")
    return isinstance(config, dict) and bool(config.get("zero_optimization", {}).get("round_robin_gradients"))


def universal_state(
    folder: ScannedFolder, held: Mapping[str, Sequence[TensorRef]], embedding: int
) -> list[RankState] | None:
    """The optimizer state of a universal checkpoint of one tensor rank; None if the folder has no such state.

    Raises CheckpointError for universal checkpoints of several tensor ranks.
    """
    root = folder.path / "zero"
    if not root.is_dir():
        return None
    if folder.tp > 1:
        raise CheckpointError(
            f"{root}: universal checkpoints of several tensor ranks cannot be read; give the one it was made from"
        )
    result = RankState()
    for entry in sorted(entry for entry in root.iterdir() if entry.is_dir()):
        name = global_name(entry.name, embedding)
        for role in STATE_ROLES:
            file = "fp32" if role == "master" else role
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
    """The optimizer states inside the model files, which do not say which entry belongs to which parameter."""
    layers: dict[int, dict[str, tuple[int, ...]]] = {}  # position -> name -> shape
    for name, ref in mine.items():
        layers.setdefault(int(name.split(".")[0]), {})[name] = tuple(ref.shape)
    # With tied embeddings the last stage has a copy of the embedding, which its optimizer counts too.
    copy = layers.get(embedding, {}) if embedding is not None else {}
    optimizers = [state["optimizer"] for state in states]
    flat = "fp32_groups_flat" in optimizers[0]
    # Flat vectors show how many elements a stage has, other states how many parameters.
    measure: Callable[[tuple[int, ...]], int] = prod if flat else lambda shape: 1
    sizes = [_group_sizes(optimizer, flat) for optimizer in optimizers]
    stages = split_stages(layers, copy, [sum(groups) for groups in sizes], measure, where[0])
    result = []
    for optimizer, shapes, group_sizes, place in zip(optimizers, stages, sizes, where, strict=True):
        groups = parameter_groups(shapes, group_sizes, measure, place)
        result.append(fp16_state(optimizer, groups, place) if flat else plain_state(optimizer, mine, groups, place))
    return result


def _group_sizes(optimizer: Mapping, flat: bool) -> list[int]:
    """The size of each parameter group: elements of its flat vector, or parameters."""
    if flat:
        return [vector.shape[0] for vector in optimizer["fp32_groups_flat"]]
    return [len(group["params"]) for group in optimizer["param_groups"]]


def _merged(parts: Sequence[RankState], embedding: int) -> RankState:
    """The states of all stages together. Of tied parameters, which two stages have, the first stage's counts."""
    result = RankState()
    for stage in reversed(parts):  # so that the first stage's copy overwrites the last one's
        for role in (*STATE_ROLES, "step"):
            getattr(result, role).update({global_name(n, embedding): v for n, v in getattr(stage, role).items()})
    return result


def _matches(pattern: re.Pattern, names: Sequence[str]) -> list[tuple[int, int, str]]:
    return [(int(match[1]), int(match[2]), name) for name in names if (match := pattern.fullmatch(name))]


def _grid(path: Path, cells: Sequence[tuple[int, int, str]], row: str, column: str) -> dict[int, dict[int, Path]]:
    """Files by row and column. Raises CheckpointError for two files in one place."""
    grid: dict[int, dict[int, Path]] = {}
    for y, x, name in sorted(cells):
        if x in grid.setdefault(y, {}):
            raise CheckpointError(f"{path}: {name} and {grid[y][x].name} are both {row} {y}, {column} {x}: keep one")
        grid[y][x] = path / name
    return grid


def _check_ranks(folder: ScannedFolder, mp_ranks: int) -> None:
    """Raises CheckpointError for files of more ranks than the run had, and for files of several steps."""
    for present, had, kind in (
        (mp_ranks, folder.first.get("mp_world_size"), "model"),
        (folder.tp, _stored_tp(folder), "tensor"),
    ):
        if had and present > had:
            raise CheckpointError(
                f"{folder.path}: there are files of {present} {kind} ranks, but the run had {had}: two runs share the "
                "folder; give each its own"
            )
    if folder.states:
        steps = {state.get("iteration", state.get("global_steps")) for state in folder.states}
        if len(steps) > 1:
            raise CheckpointError(
                f"{folder.path}: mp_rank_* files of different steps are mixed: {sorted(steps, key=str)}"
            )
    world = folder.first.get("dp_world_size")
    if world is not None and any(rank >= world for rank, _, _ in _matches(SHARD, names_of(folder.path))):
        raise CheckpointError(
            f"{folder.path}: there are optimizer files of more data-parallel ranks than the {world} that the run had: "
            "two runs share the folder. To use the weights alone, move the *_optim_states.pt files out of it"
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
