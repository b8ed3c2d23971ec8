"""Plan DeepSpeed's files: the layers of each stage, parameter groups, flat vectors and optimizer states.

The counterpart of `folder.py` and of `checkpoint/zero.py`, which draws the flat vectors. Nothing is read here; values
of files are made of lazy tensors (see `castalia.storage.pt_writer`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import inf, prod
from typing import Any, Literal

import torch

from castalia.checkpoint.file_plan import OutputFile, TargetLayout, pt_output
from castalia.checkpoint.rules import MOMENTS, Role, Rule
from castalia.checkpoint.tensors import Checkpoint, Progress, state_tensors
from castalia.checkpoint.zero import MAX_ALIGNMENT, NO_DECAY
from castalia.errors import CheckpointError
from castalia.storage.derived import Wrapper, flat, join, part
from castalia.storage.lazy import Box, TensorRef, Zeros, as_slices, same_bits
from castalia.storage.pt_writer import Instance, Named, Size

# How DeepSpeed keeps an optimizer state: fp32 without ZeRO, fp16 without ZeRO, ZeRO 1, the bf16 optimizer, and ZeRO 1
# of the first release.
Kind = Literal["plain", "flat", "zero", "bf16", "old"]
Tensors = Mapping[Role, Mapping[str, Sequence[TensorRef]]]  # by `position.name`, one for each tensor rank
VERSION = "0.16.5"  # of DeepSpeed, whose files we write
OLD_BUCKET = 500_000_000  # elements that old ZeRO-1 communicates at once, by default
PROBE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Group:
    """A parameter group of the optimizer on one stage and tensor rank, its parameters in the optimizer's order."""

    tensors: Mapping[Role, Mapping[str, TensorRef]]  # by the names that the files have
    step: int
    settings: Mapping[str, Any]  # of `param_groups`

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters' shapes by name, in order."""
        return {name: tuple(ref.shape) for name, ref in self.tensors["master"].items()}

    @property
    def num_elements(self) -> int:
        """Elements of all parameters together."""
        return sum(map(prod, self.shapes.values()))

    def vector(self, role: Role, length: int) -> TensorRef:
        """The group's flat vector [length]: all tensors of one role one after another, then zeros."""
        rest = length - self.num_elements
        return join([flat(ref) for ref in self.tensors[role].values()] + ([Zeros((rest,))] if rest else []))


def kind_of(dtype: torch.dtype, zero: int, era: str) -> Kind:
    """How DeepSpeed keeps the optimizer state for this dtype of the weights and ZeRO stage.

    Raises CheckpointError for combinations that the first release does not have.
    """
    if era == "v1" and (dtype == torch.bfloat16 or (zero and dtype != torch.float16)):
        raise CheckpointError(
            f"the first release has no {str(dtype).removeprefix('torch.')} files{' with ZeRO' if zero else ''}; "
            "use --era head, or --dtype fp16"
        )
    if dtype == torch.bfloat16:
        return "bf16"
    if zero:
        return "old" if era == "v1" else "zero"
    return "flat" if dtype == torch.float16 else "plain"


def optimizer_file(kind: Kind, rank: int, model_rank: int) -> str:
    """The name of a data-parallel rank's optimizer file. `model_rank`: stage * T + tensor rank."""
    prefix = "bf16_" if kind == "bf16" else ""
    return f"{prefix}zero_pp_rank_{rank}_mp_rank_{model_rank:02d}_optim_states.pt"


def divide(names: Iterable[str], num_groups: int) -> list[list[str]]:
    """The names of each parameter group: one group of all, or the rest in one or two halves, then norms and biases."""
    names = list(names)
    if num_groups == 1:
        return [names]
    undecayed = [name for name in names if NO_DECAY.search(name)]
    rest = [name for name in names if name not in set(undecayed)]
    middle = len(rest) // 2
    return [rest, undecayed] if num_groups == 2 else [rest[:middle], rest[middle:], undecayed]


def common_step(steps: Mapping[str, int], where: str) -> int:
    """The Adam step of a parameter group. Raises CheckpointError if it differs between tensors."""
    distinct = set(steps.values())
    if len(distinct) != 1:
        raise CheckpointError(
            f"{where}: the Adam steps of the tensors differ ({sorted(distinct)}), where DeepSpeed has one; "
            "convert the weights alone with --no-optimizer"
        )
    return distinct.pop()


def param_shapes(groups: Sequence[Group]) -> list[Named]:
    """`param_shapes` of a model file: a mapping for each parameter group."""
    return [Named({name: Size(shape) for name, shape in group.shapes.items()}) for group in groups]


def plain_optimizer(groups: Sequence[Group]) -> dict[str, Any]:
    """`optimizer` for fp32 without ZeRO: parameters are numbered through all groups; weights are their own masters."""
    state: dict[int, dict] = {}
    numbers: list[list[int]] = []
    for group in groups:
        numbers.append(list(range(len(state), len(state) + len(group.shapes))))
        for name in group.shapes:
            moments = {role: group.tensors[role][name] for role in MOMENTS}
            state[len(state)] = {"step": group.step, **moments}
    return {"state": state, "param_groups": _param_groups(groups, numbers)}


def flat_optimizer(groups: Sequence[Group], scaler: Mapping[str, Any], clip: float) -> dict[str, Any]:
    """`optimizer` for fp16 without ZeRO: one flat vector for each group."""
    dynamic = "scale_factor" in scaler
    counters = ("cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window")
    state: dict[int, dict[str, Any]] = {
        index: {"step": group.step, **{role: group.vector(role, group.num_elements) for role in MOMENTS}}
        for index, group in enumerate(groups)
    }
    return {
        "dynamic_loss_scale": dynamic,
        **{name: scaler[name] for name in counters if name in scaler},
        "optimizer_state_dict": {"state": state, "param_groups": _param_groups(groups)},
        "fp32_groups_flat": [group.vector("master", group.num_elements) for group in groups],
        "clip_grad": clip,
    }


def sharded_optimizer(
    kind: Kind, groups: Sequence[Group], rank: int, ranks: int, scaler: Mapping[str, Any], clip: float
) -> dict[str, Any]:
    """`optimizer_state_dict` of ZeRO 1 and of the bf16 optimizer, of data-parallel rank `rank` of `ranks`."""
    state: dict[int, dict[str, Any]] = {}
    masters, paddings = [], []
    for index, group in enumerate(groups):
        share = share_of(group, ranks)
        # elements of this rank's share that lie beyond the group's parameters
        padding = min(share, max(0, (rank + 1) * share - group.num_elements))
        vectors = {r: part(group.vector(r, share * ranks), rank * share, (rank + 1) * share) for r in group.tensors}
        state[index] = {"step": group.step, **{role: vectors[role] for role in MOMENTS}}
        # The bf16 optimizer keeps the padding of masters, ZeRO 1 cuts it off.
        masters.append(vectors["master"] if kind == "bf16" else part(vectors["master"], 0, share - padding))
        paddings.append(padding)
    result: dict[str, Any] = {
        "clip_grad": clip,
        "base_optimizer_state": {"state": state, "param_groups": _param_groups(groups)},
        "single_partition_of_fp32_groups": masters,
        "group_paddings": paddings,
        "partition_count": [ranks] * len(groups),
        "ds_version": VERSION,
        "param_slice_mappings": [_slices(group, rank, share_of(group, ranks)) for group in groups],
    }
    if kind == "bf16":
        return result
    dynamic = "scale_factor" in scaler
    name = "DynamicLossScaler" if dynamic else "LossScaler"
    return result | {
        "loss_scaler": Instance(f"deepspeed.runtime.fp16.loss_scaler.{name}", fields=scaler),
        "dynamic_loss_scale": dynamic,
        "overflow": False,
        "zero_stage": Instance("deepspeed.runtime.zero.config.ZeroStageEnum", (1,)),
    }


def old_optimizer(groups: Sequence[Group], rank: int, ranks: int, scaler: Mapping[str, Any]) -> dict[str, Any]:
    """`optimizer_state_dict` of ZeRO 1 of the first release: groups in intervals, each interval cut over the ranks."""
    pieces: list[dict[Role, list[TensorRef]]] = []
    for group in groups:
        total = group.num_elements
        size = min(-(-total // ranks), OLD_BUCKET // ranks)  # elements of an interval on each rank
        starts = [min(at + rank * size, total) for at in range(0, total, size * ranks)]
        spans = [(start, min(start + size, total)) for start in starts]
        vectors = {role: group.vector(role, total) for role in group.tensors}
        pieces.append({role: [part(vector, *span) for span in spans] for role, vector in vectors.items()})
    return {
        "loss_scaler": Instance("deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler", fields=scaler),
        "dynamic_loss_scale": True,
        "overflow": False,
        "base_optimizer_state": [
            [{role: vectors[role][i] for role in MOMENTS} for i in range(len(vectors["master"]))] for vectors in pieces
        ],
        "zero_stage": 1,
        "partition_count": ranks,
        "num_comm_intervals_per_group": [len(vectors["master"]) for vectors in pieces],
        "local_sub_partitions_of_fp32_groups": [vectors["master"] for vectors in pieces],
    }


def share_of(group: Group, ranks: int) -> int:
    """Elements of a group's flat vector on each rank; the last rank's share ends in padding."""
    return -(-group.num_elements // (MAX_ALIGNMENT * ranks)) * MAX_ALIGNMENT


def _slices(group: Group, rank: int, share: int) -> Named:
    """Where parameters lie in a rank's share, of those that have an element in it."""
    result, start, low = Named(), 0, rank * share
    for name, shape in group.shapes.items():
        stop = start + prod(shape)
        first, last = max(start, low), min(stop, low + share)
        if first < last:
            fields = {"numel": last - first, "start": first - low}
            result[name] = Instance("deepspeed.utils.tensor_fragment.fragment_address", fields=fields)
        start = stop
    return result


def _param_groups(groups: Sequence[Group], numbers: Sequence[list[int]] | None = None) -> list[dict[str, Any]]:
    numbers = numbers or [[index] for index in range(len(groups))]
    return [{**group.settings, "params": params} for group, params in zip(groups, numbers, strict=True)]


def cut_stages(weights: Sequence[int], stages: int, era: str) -> list[range]:
    """The pipeline positions of each stage, as DeepSpeed divides layers of these `weights`.

    The first release divides otherwise. Raises CheckpointError if a stage would have no layer. Source:
    `deepspeed/runtime/utils.py`, `partition_balanced`.
    """
    if len(weights) < stages:
        raise CheckpointError(f"{len(weights)} layers cannot be cut into {stages} pipeline stages")
    cuts = _cut_old(weights, stages) if era == "v1" else _cut_even(weights, stages)
    ranges = [range(start, stop) for start, stop in pairwise(cuts)]
    if not all(ranges):
        raise CheckpointError(f"DeepSpeed would leave one of pp={stages} stages without layers; use fewer stages")
    return ranges


def _cut_even(weights: Sequence[int], stages: int) -> list[int]:
    """The cuts with the least difference between the heaviest and the lightest stage; of equal ones the latest.

    Dynamic programming over stages: the best way to cover the first `stop` layers.
    """
    sums = [0, *accumulate(weights)]
    best = [{0: (0, 0.0, inf)}]  # by number of stages: layers covered -> last cut, heaviest stage, lightest stage
    for stage in range(1, stages + 1):
        reached: dict[int, tuple[int, float, float]] = {}
        for stop in range(stage, len(weights) + 1):
            cost = inf
            for cut, (_, heaviest, lightest) in best[-1].items():
                if cut >= stop:
                    break
                most = max(heaviest, sums[stop] - sums[cut])
                least = min(lightest, sums[stop] - sums[cut])
                if most - least <= cost:
                    cost, reached[stop] = most - least, (cut, most, least)
        best.append(reached)
    cuts = [len(weights)]
    for reached in reversed(best[1:]):
        cuts.append(reached[cuts[-1]][0])
    return cuts[::-1]


def _cut_old(weights: Sequence[int], stages: int) -> list[int]:
    """The cuts whose heaviest stage is lightest. Its weight is found by bisection; early stages are filled up to it."""
    sums = list(accumulate(weights))
    low, high = sums[-1] / stages, float(sums[-1])
    while high > low + PROBE_TOLERANCE:
        middle = low + (high - low) / 2
        if _filled(sums, stages, middle)[1]:
            high = middle
        else:
            low = middle + PROBE_TOLERANCE
    return _filled(sums, stages, high)[0]


def _filled(sums: Sequence[int], stages: int, limit: float) -> tuple[list[int], bool]:
    """Cuts into stages of less than `limit` each, and whether they cover all layers. `sums`: cumulated weights."""
    cuts, target = [0], limit
    for _ in range(1, stages):
        cuts.append(bisect_left(sums, target))
        if cuts[-1] == len(sums):
            rest = sums[-1] - sums[cuts[-2]]  # as DeepSpeed computes it: without the stage's first layer
            return cuts + [len(sums)] * (stages + 1 - len(cuts)), rest < limit
        target = sums[cuts[-1] - 1] + limit if cuts[-1] else limit
    return [*cuts, len(sums)], target >= sums[-1]


@dataclass(frozen=True)
class ReplicaChecked(Wrapper):
    """An fp32 weight that must equal its master, because the files have one place for both."""

    name: str
    source: TensorRef
    master: TensorRef

    @property
    def sources(self) -> tuple[TensorRef, ...]:  # type: ignore[override]
        """The weight and its master, both of which are read."""
        return self.source, self.master

    def _take(self, box: Box) -> torch.Tensor:
        """The weight. Raises CheckpointError if the master differs."""
        slices = as_slices(box)
        value = self.source.read(slices)
        if not same_bits(value, self.master.read(slices)):
            raise CheckpointError(
                f"{self.name} is not equal to its fp32 master, for which fp32 files without ZeRO have no place; "
                "write them with zero=1, or the masters alone with --dtype fp32"
            )
        return value


def weights_of(checkpoint: Checkpoint, kind: Kind | None) -> dict[str, TensorRef]:
    """The weights to be written. Where they are their own masters in the files, reading them checks that they are."""
    state = checkpoint.optimizer
    if kind != "plain" or state is None:
        return dict(checkpoint.model)
    different = {name for name, ref in checkpoint.model.items() if ref != state[name]["master"]}
    return {
        name: ReplicaChecked(name, ref, state[name]["master"]) if name in different else ref
        for name, ref in checkpoint.model.items()
    }


def state_of(checkpoint: Checkpoint, role: Role) -> dict[str, TensorRef]:
    """The tensors of one role, by our parameters' names."""
    return {name: state_tensors(state)[role] for name, state in (checkpoint.optimizer or {}).items()}


def adam_steps(checkpoint: Checkpoint, rules: Iterable[Rule]) -> dict[str, int]:
    """Adam's steps by the format's names. Parameters that our model does not have get the highest step."""
    steps = {name: state["step"] for name, state in (checkpoint.optimizer or {}).items()}
    last = max(steps.values(), default=0)
    return {name: steps.get(rule.ours.split()[0], last) for rule in rules for name in rule.theirs.split()}


@dataclass(frozen=True)
class DeepSpeedFolder:
    """Everything that the files of a step's folder are made of."""

    layout: TargetLayout
    kind: Kind | None  # None: no optimizer state
    tensors: Tensors
    steps: Mapping[str, int]  # Adam's, by `position.name`
    stages: Sequence[range]  # positions of each pipeline stage
    tied: str  # prefix of the tied parameters, which the first and the last stage have ("0."); empty: none are tied
    groups: Sequence[Mapping[str, Any]]  # settings of the parameter groups, the one without weight decay last
    scaler: Mapping[str, Any]
    clip: float

    @property
    def pipeline(self) -> bool:
        """Whether each layer has files of its own."""
        return self.layout.pp > 0

    def model_ranks(self) -> list[tuple[int, int, int]]:
        """(number in file names, pipeline stage, tensor rank) of every model rank."""
        tp = self.layout.tp
        return [(stage * tp + rank, stage, rank) for stage in range(len(self.stages)) for rank in range(tp)]

    def layer_files(self) -> list[OutputFile]:
        """A file for each pipeline position on each tensor rank."""
        layers: dict[int, dict[str, Sequence[TensorRef]]] = {}
        for name, refs in self.tensors["weight"].items():
            position, _, inner = name.partition(".")
            layers.setdefault(int(position), {})[inner] = refs
        return [
            pt_output(
                f"layer_{position:02d}-model_{rank:02d}-model_states.pt",
                Named({name: refs[rank] for name, refs in layer.items()}),
            )
            for position, layer in layers.items()
            for rank in range(self.layout.tp)
        ]

    def module(self, rank: int) -> Named | None:
        """The weights in a tensor rank's model file; None where they are in layer files."""
        if self.pipeline:
            return None
        return Named({f"sequential.{name}": refs[rank] for name, refs in self.tensors["weight"].items()})

    def parameters(self, stage: int) -> dict[str, str]:
        """A stage's parameters in the order of its modules: the name in optimizer files -> `position.name`."""
        if not self.pipeline:
            return {f"sequential.{name}": name for name in self.tensors["master"]}
        shared = [name for name in self.tensors["master"] if self.tied and name.startswith(self.tied)]
        held = [name for name in self.tensors["master"] if int(name.partition(".")[0]) in self.stages[stage]]
        if stage == len(self.stages) - 1:
            held = shared + [name for name in held if name not in shared]  # the copy comes first there
        # DeepSpeed names tied parameters by the module that ties them.
        names = {name: f"tied_modules.embed.{name.removeprefix(self.tied)}" for name in shared}
        return {names.get(name, name): name for name in held}

    def parameter_groups(self, stage: int, rank: int, where: str) -> list[Group]:
        """The parameter groups of a stage and tensor rank; none without an optimizer state. `where`: for errors."""
        if self.kind is None:
            return []
        parameters = self.parameters(stage)
        divided = divide(parameters, len(self.groups))
        roles = [role for role in self.tensors if role != "weight"]
        return [
            Group(
                {role: {name: self.tensors[role][parameters[name]][rank] for name in names} for role in roles},
                common_step({name: self.steps[parameters[name]] for name in names}, where),
                settings,
            )
            for names, settings in zip(divided, self.groups, strict=True)
            if names
        ]

    def optimizer(self, groups: Sequence[Group]) -> dict[str, Any] | None:
        """`optimizer` of a model file; None where the state lies in files of its own."""
        if self.kind == "plain":
            return plain_optimizer(groups)
        return flat_optimizer(groups, self.scaler, self.clip) if self.kind == "flat" else None

    def optimizer_files(self, model_rank: int, groups: Sequence[Group], beside: Mapping[str, Any]) -> list[OutputFile]:
        """The optimizer files of all data-parallel ranks. `beside`: their entries besides the state."""
        if self.kind in (None, "plain", "flat"):
            return []
        ranks = self.layout.dp
        result = []
        for rank in range(ranks):
            if self.kind == "old":
                state = old_optimizer(groups, rank, ranks, self.scaler)
            else:
                state = sharded_optimizer(self.kind, groups, rank, ranks, self.scaler, self.clip)
            result.append(
                pt_output(optimizer_file(self.kind, rank, model_rank), {"optimizer_state_dict": state, **beside})
            )
        return result


def model_state(
    job: DeepSpeedFolder,
    groups: Sequence[Group],
    rank: int,
    progress: Progress,
    seq_length: int,
    schedule: Mapping[str, Any] | None,
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """What DeepSpeed itself stores in an `mp_rank` file, in its order. `config`: its part of the training config."""
    sharded = job.kind in ("zero", "bf16")
    return {
        "module": job.module(rank),
        "buffer_names": [],
        "optimizer": job.optimizer(groups),
        "param_shapes": param_shapes(groups) if sharded else None,
        "frozen_param_shapes": None,
        "shared_params": {} if sharded else None,
        "frozen_param_fragments": None,
        "lr_scheduler": schedule,
        "data_sampler": None,
        "random_ltd": None,
        "sparse_tensor_module_names": set(),
        **counters(job, progress, seq_length),
        "ds_config": config,
        "ds_version": VERSION,
    }


def counters(job: DeepSpeedFolder, progress: Progress, seq_length: int) -> dict[str, int]:
    """DeepSpeed's counters of steps and samples, and its numbers of ranks."""
    return {
        "skipped_steps": progress.skipped,
        "global_steps": progress.step,
        "global_samples": progress.tokens // seq_length,
        "dp_world_size": job.layout.dp,
        "mp_world_size": job.layout.tp * len(job.stages),
    }
