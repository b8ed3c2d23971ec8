"""Tables of rules between another format's tensors and ours, read in both directions.

A format's table is a list of `Rule`s. A rule names some of our tensors, some tensors of the format, and the operation
between the two, which is lazy: nothing is read. `to_ours` and `to_theirs` apply a table to one role at a time, so that
weights, fp32 masters and Adam's moments go through the same table. A format may split tensors over tensor-parallel
ranks; each of its names therefore stands for a list of tensors, one for each rank (a list of one without ranks).

In this module "theirs" are the tensors of the other format, "ours" the canonical ones of
`castalia.model.transformer`. Rows are the first dimension.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from castalia.errors import CheckpointError
from castalia.storage.derived import Combined, Flattened, Permuted, Scaled, Shaped, Transposed, join, part
from castalia.storage.lazy import TensorRef

Role = Literal["weight", "master", "exp_avg", "exp_avg_sq"]
MOMENTS: tuple[Role, ...] = ("exp_avg", "exp_avg_sq")  # Adam's first and second
STATE_ROLES: tuple[Role, ...] = ("master", *MOMENTS)  # the tensors that mixed-precision Adam has for each parameter
Refs = Sequence[TensorRef]


class Op(Protocol):
    """An invertible operation between the tensors of one rule."""

    def forward(self, theirs: Refs, role: Role) -> Refs:
        """Our tensors, when a checkpoint is read."""

    def backward(self, ours: Refs, role: Role) -> Refs:
        """The other format's tensors, when one is written; the inverse of `forward`."""


@dataclass(frozen=True)
class Same:
    """No change: only the name differs."""

    def forward(self, theirs: Refs, role: Role) -> Refs:
        """The tensors as they are."""
        return theirs

    def backward(self, ours: Refs, role: Role) -> Refs:
        """The tensors as they are."""
        return ours


@dataclass(frozen=True)
class Inverse:
    """An operation with its directions swapped."""

    op: Op

    def forward(self, theirs: Refs, role: Role) -> Refs:
        """What the operation gives in the other direction."""
        return self.op.backward(theirs, role)

    def backward(self, ours: Refs, role: Role) -> Refs:
        """What the operation gives in the other direction."""
        return self.op.forward(ours, role)


class Chain:
    """Several operations, in the order in which they are applied when a checkpoint is read."""

    def __init__(self, *ops: Op):
        self.ops = ops

    def forward(self, theirs: Refs, role: Role) -> Refs:
        """All operations, from the first to the last."""
        for op in self.ops:
            theirs = op.forward(theirs, role)
        return theirs

    def backward(self, ours: Refs, role: Role) -> Refs:
        """The inverses of all operations, from the last to the first."""
        for op in reversed(self.ops):
            ours = op.backward(ours, role)
        return ours


@dataclass(frozen=True)
class Each:
    """Several tensors, each with an operation of its own."""

    ops: tuple[Op, ...]

    def forward(self, theirs: Refs, role: Role) -> Refs:
        """What each operation makes of its tensor."""
        return [op.forward([ref], role)[0] for op, ref in zip(self.ops, theirs, strict=True)]

    def backward(self, ours: Refs, role: Role) -> Refs:
        """What the inverse of each operation makes of its tensor."""
        return [op.backward([ref], role)[0] for op, ref in zip(self.ops, ours, strict=True)]


@dataclass(frozen=True)
class Transpose:
    """A matrix that is stored [in, out], as GPT-2's `Conv1D` has it; ours are [out, in]."""

    def forward(self, theirs: Refs, role: Role) -> Refs:
        """The transposed matrices; the same in both directions."""
        return [Transposed(ref) for ref in theirs]

    backward = forward


@dataclass(frozen=True)
class PermuteRows:
    """Rows that are seen as a grid of shape `view`; reading puts the grid's axes in `order`.

    GPT-2's fused matrix has all queries, all keys, all values; ours has query, key and value of each head. With two
    heads of one row each, `PermuteRows((3, 2, 1), (1, 0, 2))` reads

        q0 q1 k0 k1 v0 v1  ->  q0 k0 v0 q1 k1 v1
    """

    view: tuple[int, ...]
    order: tuple[int, ...]

    def forward(self, theirs: Refs, role: Role) -> Refs:
        """Each tensor with its rows in our order."""
        return [Permuted(ref, self.view, self.order) for ref in theirs]

    def backward(self, ours: Refs, role: Role) -> Refs:
        """Each tensor with its rows in the format's order."""
        view = tuple(self.view[axis] for axis in self.order)  # the grid's shape after `forward`
        back = tuple(self.order.index(axis) for axis in range(len(self.order)))
        return [Permuted(ref, view, back) for ref in ours]


@dataclass(frozen=True)
class Interleave:
    """Several tensors that become one made of `groups`, to each of which tensor j gives its next `sizes[j]` rows.

    Llama's query, key and value matrices become our fused one, which has a group for each key/value head. With four
    query heads on two key/value heads of one row each, `Interleave((2, 1, 1), groups=2)` reads

        q0 q1 q2 q3 | k0 k1 | v0 v1  ->  q0 q1 k0 v0  q2 q3 k1 v1

    With one group it concatenates; `Inverse(Interleave(sizes))` splits.
    """

    sizes: tuple[int, ...]
    groups: int = 1

    def forward(self, theirs: Refs, role: Role) -> Refs:
        """One tensor with `groups * sum(sizes)` rows. Raises CheckpointError for other numbers of rows."""
        for ref, size in zip(theirs, self.sizes, strict=True):
            _expect_rows(ref, size * self.groups)
        pieces = [
            part(ref, group * size, (group + 1) * size)
            for group in range(self.groups)
            for ref, size in zip(theirs, self.sizes, strict=True)
        ]
        return [join(pieces)]

    def backward(self, ours: Refs, role: Role) -> Refs:
        """Tensor j with `groups * sizes[j]` rows, for each j. Raises CheckpointError for other numbers of rows."""
        (ref,) = ours
        period = sum(self.sizes)
        _expect_rows(ref, period * self.groups)
        result, offset = [], 0  # where a tensor's rows begin in each group
        for size in self.sizes:
            starts = [group * period + offset for group in range(self.groups)]
            result.append(join([part(ref, start, start + size) for start in starts]))
            offset += size
        return result


@dataclass(frozen=True)
class ConcatRanks:
    """A tensor that is cut into equal consecutive blocks, one on each tensor rank.

    A column-parallel matrix [8, 4] on two ranks (dim 0) is [4, 4] on each, a row-parallel one (dim 1) [8, 2]:

        dim 0:  rank 0 has rows 0-3, rank 1 rows 4-7      dim 1:  rank 0 has columns 0-1, rank 1 columns 2-3
    """

    ranks: int
    dim: int = 0

    def forward(self, theirs: Refs, role: Role) -> Refs:
        """The whole tensor."""
        return [join(theirs, self.dim)]

    def backward(self, ours: Refs, role: Role) -> Refs:
        """The block of each rank. Raises CheckpointError unless the dimension divides over the ranks."""
        (ref,) = ours
        size, rest = divmod(ref.shape[self.dim], self.ranks)
        if rest:
            raise CheckpointError(
                f"dimension {self.dim} of shape {tuple(ref.shape)} does not divide over {self.ranks} tensor ranks"
            )
        return [part(ref, rank * size, (rank + 1) * size, self.dim) for rank in range(self.ranks)]


@dataclass(frozen=True)
class SameOnRanks:
    """A tensor of which each rank has a copy. Copies that drifted apart are averaged; `drift` measures how far."""

    ranks: int

    def forward(self, theirs: Refs, role: Role) -> Refs:
        """The mean of the copies."""
        return [theirs[0] if self.ranks == 1 else Combined(tuple(theirs), "mean")]

    def backward(self, ours: Refs, role: Role) -> Refs:
        """The same tensor for each rank."""
        return list(ours) * self.ranks


@dataclass(frozen=True)
class FirstOfRanks:
    """A tensor of which each rank has a copy that may have drifted, and of which only the first rank's is right."""

    ranks: int

    def forward(self, theirs: Refs, role: Role) -> Refs:
        """The first rank's copy."""
        return [theirs[0]]

    def backward(self, ours: Refs, role: Role) -> Refs:
        """The same tensor for each rank."""
        return list(ours) * self.ranks


@dataclass(frozen=True)
class Unfold:
    """A matrix [groups rows, columns] that is ours as [groups, rows, columns], in the same order."""

    groups: int

    def forward(self, theirs: Refs, role: Role) -> Refs:
        """Each matrix with its groups apart. Raises CheckpointError where they do not divide its rows."""
        for ref in theirs:
            if len(ref.shape) != 2 or ref.shape[0] % self.groups:
                raise CheckpointError(f"a tensor of shape {tuple(ref.shape)} is no {self.groups} equal matrices")
        return [Shaped(Flattened(ref), (self.groups, ref.shape[0] // self.groups, ref.shape[1])) for ref in theirs]

    def backward(self, ours: Refs, role: Role) -> Refs:
        """Each tensor as one matrix."""
        return [Shaped(Flattened(ref), (ref.shape[0] * ref.shape[1], ref.shape[2])) for ref in ours]


@dataclass(frozen=True)
class Reshape:
    """A tensor of the same values in the same order in another shape."""

    theirs: tuple[int, ...]
    ours: tuple[int, ...]

    def forward(self, theirs: Refs, role: Role) -> Refs:
        """Each tensor in our shape. Raises CheckpointError for another one than the format's."""
        for ref in theirs:
            if tuple(ref.shape) != self.theirs:
                raise CheckpointError(f"a tensor of shape {tuple(ref.shape)} should be {list(self.theirs)}")
        return [Shaped(Flattened(ref), self.ours) for ref in theirs]

    def backward(self, ours: Refs, role: Role) -> Refs:
        """Each tensor in the format's shape."""
        return [Shaped(Flattened(ref), self.theirs) for ref in ours]


@dataclass(frozen=True)
class SumOverRanks:
    """A bias that every tensor rank adds before the all-reduce, so that the model's bias is the sum over the ranks.

    The gradient of each rank's bias is the gradient of that sum. Therefore only weights and masters are summed (and
    divided when they are written); moments are averaged over the ranks, and written to each rank as they are.
    """

    ranks: int

    def forward(self, theirs: Refs, role: Role) -> Refs:
        """The sum of weights and masters, the mean of moments."""
        how: Literal["sum", "mean"] = "sum" if role in ("weight", "master") else "mean"
        return [theirs[0] if self.ranks == 1 else Combined(tuple(theirs), how)]

    def backward(self, ours: Refs, role: Role) -> Refs:
        """An equal share of weights and masters for each rank; moments as they are."""
        if self.ranks > 1 and role in ("weight", "master"):
            ours = [Scaled(ref, self.ranks) for ref in ours]
        return list(ours) * self.ranks


@dataclass(frozen=True)
class OnEachRank:
    """`inner` is applied to every rank's tensor by itself; its results are then joined over the ranks by `over`.

    For tensors whose rows are fused within each rank: [q k v] of rank 0's heads, then [q k v] of rank 1's heads.
    """

    inner: Op
    over: ConcatRanks

    def forward(self, theirs: Refs, role: Role) -> Refs:
        """The results of `inner`, each joined over the ranks."""
        per_rank = [self.inner.forward([ref], role) for ref in theirs]  # [rank][result]
        return [ref for refs in zip(*per_rank, strict=True) for ref in self.over.forward(refs, role)]

    def backward(self, ours: Refs, role: Role) -> Refs:
        """Each rank's block of the results, taken apart by `inner`."""
        per_tensor = [self.over.backward([ref], role) for ref in ours]  # [tensor][rank]
        return [ref for refs in zip(*per_tensor, strict=True) for ref in self.inner.backward(refs, role)]


@dataclass(frozen=True)
class Rule:
    """The names of some of our tensors and of their counterparts in the format. Spaces separate several names."""

    ours: str
    theirs: str
    op: Op = Same()

    def at(self, **values: int) -> Rule:
        """The rule with the placeholders `{i}` and `{layer}` of its names filled in."""
        return Rule(self.ours.format(**values), self.theirs.format(**values), self.op)


def per_block(rules: Iterable[Rule], num_blocks: int, first: int = 0) -> list[Rule]:
    """The rules of one block for every block: `{i}` counts blocks from 0, `{layer}` from `first`."""
    rules = list(rules)
    return [rule.at(i=i, layer=first + i) for i in range(num_blocks) for rule in rules]


def with_bias(ours: str, theirs: str, op: Op | None = None, *, bias: bool = True) -> list[Rule]:
    """The rules of a module's weight and bias. Names of several modules are separated by spaces."""

    def parameters(names: str, kind: str) -> str:
        """The names of the modules' weights or biases."""
        return " ".join(f"{name}.{kind}" for name in names.split())

    kinds = ("weight", "bias") if bias else ("weight",)
    return [Rule(parameters(ours, kind), parameters(theirs, kind), op or Same()) for kind in kinds]


def to_ours(
    rules: Iterable[Rule], theirs: Mapping[str, Refs], role: Role = "weight", ignore: str | None = None
) -> dict[str, TensorRef]:
    """Our tensors, by name, from the format's tensors of one role.

    Raises CheckpointError that names the tensors that a rule needs and the files lack, and those that no rule uses,
    unless the regular expression `ignore` matches their names.
    """
    rules = list(rules)
    needed = [name for rule in rules for name in rule.theirs.split()]
    missing = sorted(set(needed) - set(theirs))
    unknown = sorted(n for n in set(theirs) - set(needed) if ignore is None or not re.search(ignore, n))
    if missing or unknown:
        raise CheckpointError(
            "the tensors do not match the architecture"
            + (f"; missing: {_first_names(missing)}" if missing else "")
            + (f"; not understood: {_first_names(unknown)}" if unknown else "")
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
    """The format's tensors of one role from ours: for each name a list of one tensor for each tensor rank.

    The inverse of `to_ours`. Raises CheckpointError that names tensors that are missing, and tensors that the format
    has no place for.
    """
    rules = list(rules)
    needed = {name for rule in rules for name in rule.ours.split()}
    missing, left = sorted(needed - set(ours)), sorted(set(ours) - needed)
    if missing or left:
        raise CheckpointError(
            "the tensors do not match the target's architecture"
            + (f"; missing: {_first_names(missing)}" if missing else "")
            + (f"; the target has no place for: {_first_names(left)}" if left else "")
        )
    theirs: dict[str, list[TensorRef]] = {}
    for rule in rules:
        refs = list(rule.op.backward([ours[name] for name in rule.ours.split()], role))
        names = rule.theirs.split()
        ranks = len(refs) // len(names)  # an operation gives all ranks of the first name, then of the second
        theirs.update({name: refs[j * ranks : (j + 1) * ranks] for j, name in enumerate(names)})
    return theirs


def drift(ours: Mapping[str, TensorRef]) -> dict[str, float]:
    """The averaged tensors whose copies differ between ranks, with the largest difference. Reads those tensors."""
    distances = {name: ref.drift() for name, ref in ours.items() if isinstance(ref, Combined) and ref.how == "mean"}
    return {name: value for name, value in distances.items() if value != 0}


def _expect_rows(ref: TensorRef, rows: int) -> None:
    if tuple(ref.shape[:1]) != (rows,):
        raise CheckpointError(f"a tensor of shape {tuple(ref.shape)} should have {rows} rows")


def _first_names(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
