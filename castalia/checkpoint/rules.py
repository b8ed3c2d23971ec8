"""Tables that say how another format's tensors become ours, read in both directions.

A format is a list of `Rule`s. Each names some of our tensors, some of theirs, and the operation between the two, on
lazy tensors. `to_ours` and `to_theirs` apply a table to one role at a time, so that weights, masters and Adam moments
go through the same table. Theirs may be split over tensor ranks: every one of their names stands for a list of
tensors, one for each rank (formats without ranks: lists of one).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from castalia.errors import CheckpointError
from castalia.storage.lazy import Combined, Permuted, Scaled, TensorRef, Transposed, join, part

Role = Literal["weight", "master", "exp_avg", "exp_avg_sq"]
MOMENTS: tuple[Role, ...] = ("exp_avg", "exp_avg_sq")  # Adam's first and second
STATE_ROLES: tuple[Role, ...] = ("master", *MOMENTS)  # the tensors that mixed-precision Adam has for each parameter
Refs = Sequence[TensorRef]


class Op(Protocol):
    """An invertible operation: `forward` reads (theirs to ours), `backward` writes (ours to theirs)."""

    def forward(self, theirs: Refs, role: Role) -> Refs: ...
    def backward(self, ours: Refs, role: Role) -> Refs: ...


@dataclass(frozen=True)
class Same:
    """The tensor as it is: only its name differs."""

    def forward(self, theirs: Refs, role: Role) -> Refs:
        return theirs

    def backward(self, ours: Refs, role: Role) -> Refs:
        return ours


@dataclass(frozen=True)
class Inverse:
    op: Op

    def forward(self, theirs: Refs, role: Role) -> Refs:
        return self.op.backward(theirs, role)

    def backward(self, ours: Refs, role: Role) -> Refs:
        return self.op.forward(ours, role)


class Chain:
    """One operation after another, in the order of reading."""

    def __init__(self, *ops: Op):
        self.ops = ops

    def forward(self, theirs: Refs, role: Role) -> Refs:
        for op in self.ops:
            theirs = op.forward(theirs, role)
        return theirs

    def backward(self, ours: Refs, role: Role) -> Refs:
        for op in reversed(self.ops):
            ours = op.backward(ours, role)
        return ours


@dataclass(frozen=True)
class Transpose:
    """A matrix stored [in, out]."""

    def forward(self, theirs: Refs, role: Role) -> Refs:
        return [Transposed(ref) for ref in theirs]

    backward = forward


@dataclass(frozen=True)
class PermuteRows:
    """Their rows, seen as a grid of shape `view`, with the grid's axes put in `order`."""

    view: tuple[int, ...]
    order: tuple[int, ...]

    def forward(self, theirs: Refs, role: Role) -> Refs:
        return [Permuted(ref, self.view, self.order) for ref in theirs]

    def backward(self, ours: Refs, role: Role) -> Refs:
        view = tuple(self.view[axis] for axis in self.order)
        back = tuple(self.order.index(axis) for axis in range(len(self.order)))
        return [Permuted(ref, view, back) for ref in ours]


@dataclass(frozen=True)
class Interleave:
    """Several of theirs become one of ours made of groups; tensor j gives `sizes[j]` rows to each group, in order.

    One group is plain concatenation. `Inverse(Interleave(sizes))` splits.
    """

    sizes: tuple[int, ...]
    groups: int = 1

    def forward(self, theirs: Refs, role: Role) -> Refs:
        for ref, size in zip(theirs, self.sizes, strict=True):
            _expect_rows(ref, size * self.groups)
        pieces = [
            part(ref, group * size, (group + 1) * size)
            for group in range(self.groups)
            for ref, size in zip(theirs, self.sizes, strict=True)
        ]
        return [join(pieces)]

    def backward(self, ours: Refs, role: Role) -> Refs:
        (ref,) = ours
        period = sum(self.sizes)
        _expect_rows(ref, period * self.groups)
        result, offset = [], 0
        for size in self.sizes:
            starts = [group * period + offset for group in range(self.groups)]
            result.append(join([part(ref, start, start + size) for start in starts]))
            offset += size
        return result


@dataclass(frozen=True)
class ConcatRanks:
    """Equal consecutive blocks, one on each rank."""

    ranks: int
    dim: int = 0

    def forward(self, theirs: Refs, role: Role) -> Refs:
        return [join(theirs, self.dim)]

    def backward(self, ours: Refs, role: Role) -> Refs:
        (ref,) = ours
        size, rest = divmod(ref.shape[self.dim], self.ranks)
        if rest:
            raise CheckpointError(
                f"dimension {self.dim} of shape {tuple(ref.shape)} does not divide over {self.ranks} tensor ranks"
            )
        return [part(ref, rank * size, (rank + 1) * size, self.dim) for rank in range(self.ranks)]


@dataclass(frozen=True)
class SameOnRanks:
    """A copy on each rank. Copies that drifted apart are averaged; `drift` tells how far."""

    ranks: int

    def forward(self, theirs: Refs, role: Role) -> Refs:
        return [theirs[0] if self.ranks == 1 else Combined(tuple(theirs), "mean")]

    def backward(self, ours: Refs, role: Role) -> Refs:
        return list(ours) * self.ranks


@dataclass(frozen=True)
class SumOverRanks:
    """A bias that every rank adds before the all-reduce: the true one is the sum.

    The gradient of each rank's bias is the gradient of the sum, so moments are averaged and handed on unchanged.
    """

    ranks: int

    def forward(self, theirs: Refs, role: Role) -> Refs:
        how: Literal["sum", "mean"] = "sum" if role in ("weight", "master") else "mean"
        return [theirs[0] if self.ranks == 1 else Combined(tuple(theirs), how)]

    def backward(self, ours: Refs, role: Role) -> Refs:
        if self.ranks > 1 and role in ("weight", "master"):
            ours = [Scaled(ref, self.ranks) for ref in ours]
        return list(ours) * self.ranks


@dataclass(frozen=True)
class OnEachRank:
    """`inner` on every rank's tensor by itself, then each of its results joined over the ranks."""

    inner: Op
    over: ConcatRanks

    def forward(self, theirs: Refs, role: Role) -> Refs:
        per_rank = [self.inner.forward([ref], role) for ref in theirs]
        return [ref for refs in zip(*per_rank, strict=True) for ref in self.over.forward(refs, role)]

    def backward(self, ours: Refs, role: Role) -> Refs:
        per_tensor = [self.over.backward([ref], role) for ref in ours]
        return [ref for refs in zip(*per_tensor, strict=True) for ref in self.inner.backward(refs, role)]


@dataclass(frozen=True)
class Rule:
    """Our tensors (left) and theirs (right). Names of several tensors are separated by spaces."""

    ours: str
    theirs: str
    op: Op = Same()

    def at(self, **values: int) -> Rule:
        """The rule with `{name}` in its names filled in."""
        return Rule(self.ours.format(**values), self.theirs.format(**values), self.op)


def per_block(rules: Iterable[Rule], num_blocks: int, first: int = 0) -> list[Rule]:
    """The rules of one block for every block: `{i}` counts blocks from 0, `{layer}` from `first`."""
    rules = list(rules)
    return [rule.at(i=i, layer=first + i) for i in range(num_blocks) for rule in rules]


def to_ours(
    rules: Iterable[Rule], theirs: Mapping[str, Refs], role: Role = "weight", ignore: str | None = None
) -> dict[str, TensorRef]:
    """Our tensors from theirs.

    Raises CheckpointError naming tensors that the table needs and the files lack, and tensors that no rule uses and
    whose names the regular expression `ignore` does not match.
    """
    rules = list(rules)
    needed = [name for rule in rules for name in rule.theirs.split()]
    missing = sorted(set(needed) - set(theirs))
    unknown = sorted(n for n in set(theirs) - set(needed) if ignore is None or not re.search(ignore, n))
    if missing or unknown:
        raise CheckpointError(
            "the tensors do not match the architecture"
            + (f"; missing: {_some(missing)}" if missing else "")
            + (f"; not understood: {_some(unknown)}" if unknown else "")
        )
    ours: dict[str, TensorRef] = {}
    for rule in rules:
        try:
            refs = rule.op.forward([ref for name in rule.theirs.split() for ref in theirs[name]], role)
        except CheckpointError as error:
            raise CheckpointError(f"{rule.theirs}: {error}") from error
        ours.update(zip(rule.ours.split(), refs, strict=True))
    return ours


def to_theirs(
    rules: Iterable[Rule], ours: Mapping[str, TensorRef], role: Role = "weight"
) -> dict[str, list[TensorRef]]:
    """Their tensors from ours: for each of their names one tensor for each rank. The inverse of `to_ours`.

    Raises CheckpointError naming tensors of ours that are missing or that the other format has no place for.
    """
    rules = list(rules)
    needed = {name for rule in rules for name in rule.ours.split()}
    missing, left = sorted(needed - set(ours)), sorted(set(ours) - needed)
    if missing or left:
        raise CheckpointError(
            "the tensors do not match the target's architecture"
            + (f"; missing: {_some(missing)}" if missing else "")
            + (f"; the target has no place for: {_some(left)}" if left else "")
        )
    theirs: dict[str, list[TensorRef]] = {}
    for rule in rules:
        refs = list(rule.op.backward([ours[name] for name in rule.ours.split()], role))
        names = rule.theirs.split()
        ranks = len(refs) // len(names)
        theirs.update({name: refs[j * ranks : (j + 1) * ranks] for j, name in enumerate(names)})
    return theirs


def drift(ours: Mapping[str, TensorRef]) -> dict[str, float]:
    """Averaged tensors whose copies differ between ranks, with the largest difference. Reads those tensors."""
    found = {name: ref.drift() for name, ref in ours.items() if isinstance(ref, Combined) and ref.how == "mean"}
    return {name: value for name, value in found.items() if value != 0}


def _expect_rows(ref: TensorRef, rows: int) -> None:
    if tuple(ref.shape[:1]) != (rows,):
        raise CheckpointError(f"a tensor of shape {tuple(ref.shape)} should have {rows} rows")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
