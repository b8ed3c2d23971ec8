"""DeepSpeed's optimizer states, taken apart into one lazy tensor for each parameter.

DeepSpeed keeps fp32 masters and Adam's moments as flat vectors: all parameters of a parameter group one after another,
padded and cut over the data-parallel ranks. With parameters w [2, 3] and b [3] on two ranks (`.` is padding):

    group     w00 w01 w02 w10 w11 w12 b0 b1 b2 .
    rank 0    w00 w01 w02 w10 w11                   rank 1    w12 b0 b1 b2 .

Nothing is read here: w becomes five values of rank 0's vector joined to one of rank 1's, seen as [2, 3]. A `RankState`
is the state of one pipeline stage on one tensor rank, by the names that the parameters have in its files. Source:
`deepspeed/runtime/zero/stage_1_and_2.py`, `stage3.py` and `deepspeed/runtime/bf16_optimizer.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from castalia.checkpoint.rules import MOMENTS
from castalia.errors import CheckpointError
from castalia.storage.derived import Shaped, float32, join, part
from castalia.storage.lazy import TensorRef, Zeros

Shapes = Mapping[str, tuple[int, ...]]  # name -> shape, in the order of the flat vectors
Measure = Callable[[tuple[int, ...]], int]  # the size of a parameter of this shape: its elements, or 1
NO_DECAY = re.compile(
    r"\.bias$|norm\.|^\d+\.weight$|\.(A_log|D)$|\.ln[12]\."
)  # "5.weight", without a module, is Megatron's final norm
MAX_ALIGNMENT = 2  # vectors are padded to a multiple of this times the number of data-parallel ranks


@dataclass
class RankState:
    """The optimizer state of one stage and tensor rank: fp32 tensors and Adam's steps by parameter name."""

    master: dict[str, TensorRef] = field(default_factory=dict)
    exp_avg: dict[str, TensorRef] = field(default_factory=dict)
    exp_avg_sq: dict[str, TensorRef] = field(default_factory=dict)
    step: dict[str, int | None] = field(default_factory=dict)  # None: the files do not say


def plain_state(
    optimizer: Mapping, weights: Mapping[str, TensorRef], groups: Sequence[Shapes], where: str
) -> RankState:
    """The state of a torch optimizer without ZeRO, in which fp32 weights are their own masters.

    The optimizer's `state` numbers the parameters of all groups consecutively. Only the last parameter of a group has
    the true step, the others have 0. A parameter that never had a gradient has no entry; its moments are zero.
    """
    state, result, index = optimizer["state"], RankState(), 0  # index: of the group's first parameter
    for group in groups:
        entries = [state.get(index + offset) for offset in range(len(group))]
        index += len(group)
        # Only one entry has the true step, see above; the others have 0.
        step = max((number(entry["step"]) for entry in entries if entry), default=0)
        for (name, shape), entry in zip(group.items(), entries, strict=True):
            result.master[name] = float32(weights[name])
            result.step[name] = step
            for role in MOMENTS:
                moment = entry[role] if entry else Zeros(shape)
                if moment.shape != shape:
                    raise CheckpointError(
                        f"{where}: the optimizer's states from number {index - len(group)} on do not fit the weights: "
                        f"{name} has shape {shape}, its {role} {moment.shape}"
                    )
                getattr(result, role)[name] = float32(moment)
    return result


def fp16_state(optimizer: Mapping, groups: Sequence[Shapes], where: str) -> RankState:
    """The state of DeepSpeed's fp16 optimizer without ZeRO: one flat vector for each group, unpadded.

    The stored step is one more than the number of updates, because DeepSpeed counts an initialisation step with zero
    gradients. DeepSpeed continues with this counter, so it is kept.
    """
    inner, result = optimizer["optimizer_state_dict"], RankState()
    for index, group in enumerate(groups):
        entry = inner["state"][index]
        vectors = {"master": optimizer["fp32_groups_flat"][index]} | {role: entry[role] for role in MOMENTS}
        step = max(number(entry.get("step", 0)), number(inner["param_groups"][index].get("step", 0)))
        for role, vector in vectors.items():
            getattr(result, role).update(cut([vector], group, where))
        result.step |= dict.fromkeys(group, step)
    return result


def zero_state(files: Sequence[Mapping], shapes: Shapes | Sequence[Shapes] | None, where: str) -> RankState:
    """The state in the opened ZeRO files of all data-parallel ranks, in the order of the ranks.

    `shapes`: the model file's `param_shapes`, one mapping for each parameter group. Old optimizer files have a single
    mapping of their own instead, in the order of the model. `where` names the files in errors. Raises CheckpointError
    for a missing rank's file and for vectors that do not fit the parameters.
    """
    states = [file["optimizer_state_dict"] for file in files]  # by data-parallel rank
    first = states[0]
    shapes = shapes or files[0].get("param_shapes")  # the first releases have them in the optimizer files
    if not shapes:
        raise CheckpointError(f"{where}: neither the model file nor the optimizer files have the parameters' shapes")
    if isinstance(shapes, Mapping):
        # A single mapping in the order of the model: the groups follow from names, their number from the vectors.
        vectors = first.get("local_sub_partitions_of_fp32_groups") or first["single_partition_of_fp32_groups"]
        groups = parameter_groups(shapes, [0] * len(vectors), prod, where)
    else:
        groups = list(shapes)
    expected = _partitions(first.get("partition_count"))
    if expected is not None and expected != len(files):
        raise CheckpointError(
            f"{where}: {len(files)} optimizer files, but they were cut into {expected} parts: a data-parallel rank's "
            "file is missing. To use the weights alone, move the other optimizer files out of the folder"
        )
    if "fp32_flat_groups" in first:
        return _stage3(states, groups, where)
    if "local_sub_partitions_of_fp32_groups" in first:
        return _old_stage1(states, groups, where)
    return _stage12(states, groups, where)


def _stage12(states: Sequence[Mapping], groups: Sequence[Shapes], where: str) -> RankState:
    """ZeRO 1 and 2, and the bf16 optimizer: rank r has part r of every group's vector."""
    result = RankState()
    for index, group in enumerate(groups):
        adam = [_group_state(state["base_optimizer_state"], index) for state in states]
        steps = {number(entry["step"]) for entry in adam if "step" in entry}
        if not steps and "base_optimizer_state_step" in states[0]:
            steps = {number(state["base_optimizer_state_step"]) for state in states}
        if len(steps) > 1:
            raise CheckpointError(f"{where}: the ranks' Adam steps differ ({sorted(steps)}): files of several steps")
        # ZeRO's masters come without padding, its moments and the bf16 optimizer's masters with it; `cut` takes both.
        masters = [state["single_partition_of_fp32_groups"][index] for state in states]
        result.master |= cut(masters, group, where)
        for role in MOMENTS:
            getattr(result, role).update(cut([entry[role] for entry in adam], group, where))
        result.step |= dict.fromkeys(group, steps.pop() if steps else None)
    return result


def _group_state(base: Any, index: int) -> Mapping:
    """A group's entry of `base_optimizer_state`, a torch state dict or a list (elastic checkpoints, old ZeRO 2)."""
    if isinstance(base, Mapping):
        return base["state"][index]
    return base[index]


def _old_stage1(states: Sequence[Mapping], groups: Sequence[Shapes], where: str) -> RankState:
    """ZeRO 1 before 2023: a group is cut into intervals, each interval over the ranks. Steps are rarely stored."""
    result, first_index = RankState(), 0
    for index, group in enumerate(groups):
        pieces = [state["local_sub_partitions_of_fp32_groups"][index] for state in states]  # [rank][interval]
        # the vector's order: interval 0 of all ranks, interval 1 of all ranks, ...
        order = [(rank, interval) for interval in range(len(pieces[0])) for rank in range(len(states))]
        masters = [pieces[rank][interval] for rank, interval in order]
        result.master |= cut(masters, group, where)
        steps = set()
        for role in MOMENTS:
            moments = []
            for (rank, interval), master in zip(order, masters, strict=True):
                # Elastic checkpoints have lists [group][interval]; torch's numbers the intervals of all groups.
                base = states[rank]["base_optimizer_state"]
                elastic = not isinstance(base, Mapping)
                entry = base[index][interval] if elastic else base["state"][first_index + interval]
                steps |= {number(entry["step"])} if "step" in entry else set()
                moments.append(part(entry[role], 0, master.shape[0]))  # torch's form keeps padding that masters lack
            getattr(result, role).update(cut(moments, group, where))
        result.step |= dict.fromkeys(group, max(steps) if steps else None)
        first_index += len(pieces[0])
    return result


def _stage3(states: Sequence[Mapping], groups: Sequence[Shapes], where: str) -> RankState:
    """ZeRO 3: every parameter is cut over the ranks. A rank's vector has its share of each, split into sub-groups."""
    result = RankState()
    shapes = {name: shape for group in groups for name, shape in group.items()}
    adam = [
        [state["optimizer_state_dict"]["state"][i] for i in range(len(state["fp32_flat_groups"]))] for state in states
    ]
    # One vector for each rank: its sub-groups one after another, in the order of the parameters.
    vectors = {"master": [join(state["fp32_flat_groups"]) for state in states]}
    vectors |= {role: [join([entry[role] for entry in entries]) for entries in adam] for role in MOMENTS}
    for role, ranks in vectors.items():
        offset = 0  # the same in every rank's vector
        for name, shape in shapes.items():
            share = -(-prod(shape) // len(ranks))  # elements on each rank; the last rank's share is padded
            if any(offset + share > rank.shape[0] for rank in ranks):
                raise _does_not_fit(where, name, sum(rank.shape[0] for rank in ranks))
            whole = join([part(rank, offset, offset + share) for rank in ranks])
            getattr(result, role)[name] = float32(Shaped(part(whole, 0, prod(shape)), shape))
            offset += share
    steps = {number(entry["step"]) for entries in adam for entry in entries if "step" in entry}
    result.step = dict.fromkeys(shapes, max(steps) if steps else None)
    return result


def cut(pieces: Sequence[TensorRef], shapes: Shapes, where: str) -> dict[str, TensorRef]:
    """The parameters that lie one after another in a flat vector, which is given as consecutive pieces.

    Padding at the end is ignored. Raises CheckpointError for a vector of another length.
    """
    total, needed = sum(piece.shape[0] for piece in pieces), sum(prod(shape) for shape in shapes.values())
    # Padding is less than MAX_ALIGNMENT elements for each rank.
    if not needed <= total < needed + MAX_ALIGNMENT * max(len(pieces), 1):
        raise _does_not_fit(where, f"parameters with {needed} elements in all", total)
    ends, end = [], 0
    for piece in pieces:
        end += piece.shape[0]
        ends.append(end)
    result: dict[str, TensorRef] = {}
    start, index = 0, 0  # where this parameter begins in the vector; the first piece that has a part of it
    for name, shape in shapes.items():
        stop = start + prod(shape)
        while index < len(pieces) - 1 and ends[index] <= start:
            index += 1
        parts, at = [], index
        while True:
            begin = ends[at] - pieces[at].shape[0]  # of this piece in the vector
            parts.append(part(pieces[at], max(start, begin) - begin, min(stop, ends[at]) - begin))
            if ends[at] >= stop:
                break
            at += 1
        result[name] = float32(Shaped(join(parts), tuple(shape)))  # [elements] seen as the parameter
        start = stop
    return result


def parameter_groups(shapes: Shapes, sizes: Sequence[int], measure: Measure, where: str) -> list[Shapes]:
    """The model's parameters, in order, divided into the optimizer's parameter groups of these `sizes`.

    A single group has all of them. Of several groups the last has norms and biases, which have no weight decay; the
    others have the rest in order, cut where `measure` adds up to a group's size. Raises CheckpointError if it does not.
    """
    if len(sizes) == 1:
        return [shapes]
    plain = {name: shape for name, shape in shapes.items() if NO_DECAY.search(name)}
    rest = [(name, shape) for name, shape in shapes.items() if name not in plain]
    groups: list[Shapes] = []
    for size in sizes[:-2]:  # the group before the last gets what is left
        group: dict[str, tuple[int, ...]] = {}
        while rest and sum(map(measure, group.values())) < size:
            name, shape = rest.pop(0)
            group[name] = shape
        if sum(map(measure, group.values())) != size:
            raise CheckpointError(f"{where}: the optimizer's parameter groups do not fit the layers' weights")
        groups.append(group)
    return [*groups, dict(rest), plain]


def split_stages(
    layers: Mapping[int, Shapes], copy: Shapes, targets: Sequence[int], measure: Measure, where: str
) -> list[Shapes]:
    """The parameters that each pipeline stage holds, in order, found from the total size of each stage's optimizer.

    `layers`: parameters by position in the pipeline. `copy`: tied parameters, which the last of several stages holds
    once more, before its own. `targets`: the sizes by `measure`. Raises CheckpointError for sizes that do not fit.
    """
    stages: list[Shapes] = []
    remaining = list(layers.values())
    for stage, target in enumerate(targets):
        # Layers are taken in order until the stage's optimizer is as large as its state says.
        held = dict(copy) if stage and stage == len(targets) - 1 else {}
        while remaining and sum(map(measure, held.values())) < target:
            held |= remaining.pop(0)
        if sum(map(measure, held.values())) != target:
            raise CheckpointError(
                f"{where}: the optimizer state of pipeline stage {stage} does not fit the layers' weights"
            )
        stages.append(held)
    if remaining:
        raise CheckpointError(f"{where}: the optimizer states cover only some of the layers: a stage's file is missing")
    return stages


def number(value: Any) -> int:
    """The value of a step counter, which some programs store as a tensor of one element."""
    return int(value.read().item()) if hasattr(value, "read") else int(value)


def _partitions(count: Any) -> int | None:
    return max(count) if isinstance(count, list) else count


def _does_not_fit(where: str, what: str, total: int) -> CheckpointError:
    return CheckpointError(
        f"{where}: the optimizer's flat vectors have {total} elements, which does not fit {what}: a shard is missing, "
        "or the files belong to different runs"
    )
