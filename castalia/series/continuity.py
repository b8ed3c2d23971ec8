"""Judge the weights of a series by what was read: damage, equal bytes, and whether each step follows another."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from hashlib import sha256

import numpy as np
import torch

from castalia.checkpoint.sampled_values import rounded
from castalia.config.schema import is_adapter
from castalia.config.tensor_table import row_of
from castalia.series.audit import Entry, Series
from castalia.series.geometry import (
    DETOUR,
    FAR,
    Distances,
    detours,
    exchanged,
    is_jump,
    longest_path,
    place_of,
    usual_movement,
)
from castalia.series.tensor_pass import TensorReading
from castalia.series.travel import Reach, reach
from castalia.storage.lazy import TensorRef

Readings = Mapping[str, Sequence[TensorReading]]  # by tensor, of each entry of the series
HOLES = 16  # zeros of a matrix that a step may have more than its neighbours
MANY = 512  # values of 16 bits that are not equal by chance, where some of them move
SPREAD = 20.0  # times the usual largest change of an element, there and back again, is no training
COARSER = ("bfloat16", "float16")
NEARER = 0.05  # what a distance that is too small counts, where one that is too large counts 1
QUIET = 4.0  # `DETOUR` of the others, where only some tensors are strange
ALONE = 12.0  # `DETOUR` of one tensor by itself, which wanders more than all together


class Weights:
    """The entries of a series with what was read of their weights."""

    def __init__(self, series: Series, readings: Readings) -> None:
        self.series, self.readings = series, readings
        self.entries = series.entries
        self.constant: frozenset[str] = frozenset()  # tensors that never move
        self.left_behind: set[int] = set()  # entries that a rewind left behind

    def of(self, index: int) -> dict[str, TensorReading]:
        """The readings of one entry that are complete, by tensor."""
        return {name: column[index] for name, column in self.readings.items() if not column[index].error}

    def sound(self) -> list[int]:
        """The entries that nothing speaks against so far."""
        return [i for i, entry in enumerate(self.entries) if entry.sound and i not in self.left_behind]

    def labelled(self) -> list[int]:
        """The same, and those whose files name another step."""
        return [
            index
            for index, entry in enumerate(self.entries)
            if entry.checkpoint is not None and (entry.sound or entry.report.worst.verdict == "mislabelled")  # type: ignore[union-attr]
        ]

    @cached_property
    def distances(self) -> Distances:
        """Over the tensors that all readable entries have; entries that could not be read count as zeros."""
        samples = {name: np.stack([_finite(reading.sample) for reading in column]) for name, column in self._whole()}
        counts = {name: max(reading.count for reading in column) for name, column in self._whole()}
        return Distances(samples, counts)

    def _whole(self) -> list[tuple[str, list[TensorReading]]]:
        # Entries without a sample of the full length become zeros, so that all can be stacked: [entries, places].
        length = {name: max(len(reading.sample) for reading in column) for name, column in self.readings.items()}
        return [
            (name, [r if len(r.sample) == length[name] else _empty(length[name]) for r in column])
            for name, column in self.readings.items()
            if length[name]
        ]

    @cached_property
    def lengths(self) -> np.ndarray:
        """How far each entry is on its way, [entries]: summed learning rates where all are known, else steps."""
        trainings = [entry.training for entry in self.entries]
        steps = np.array([float(entry.member.step) for entry in self.entries])
        if not len(steps) or any(training is None for training in trainings):
            return steps
        sums, total, before = [], 0.0, 0
        for entry, training in zip(self.entries, trainings, strict=True):
            assert training is not None
            after = entry.updates
            # Behind the furthest entry nothing is added: what a rewind repeats counts once.
            total += training.lr_sum(before, after) if after >= before else 0.0
            before = max(before, after)
            sums.append(total)
        return np.array(sums)

    def are_few(self, names: Iterable[str]) -> bool:
        """Whether the tensors are the lesser part of the model, so that the rest goes on without them."""
        matrices = self.matrices(self.distances.names)
        return 2 * len(set(names) & set(matrices)) < len(matrices)

    def matrices(self, names: Sequence[str]) -> list[str]:
        """Those of the tensors whose initial values are random."""
        # What begins as ones or zeros is alike in all runs, and cannot tell one from another.
        return [name for name in names if row_of(name).is_drawn and self.distances.grams[name].any()]


def _finite(values: np.ndarray) -> np.ndarray:
    # `_damage` speaks of such values; here they would only make the distances to all other steps NaN or infinite.
    return np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0).clip(-1e12, 1e12)


def _empty(length: int) -> TensorReading:
    return TensorReading(sample=np.zeros(length, np.float32))


def judge(series: Series, readings: Readings, quick: bool) -> None:
    """Find what is wrong with the weights, and note it at the steps."""
    weights = Weights(series, readings)
    # In this order: what a check speaks against is no longer `sound`, and no measure for the checks that follow.
    _digests(weights)
    _damage(weights, quick)
    _duplicates(weights, quick)
    _leave_behind(weights)
    _splices(weights, quick)
    _foreign_tensors(weights)
    _holes(weights, quick)
    _order(weights, quick)


def _digests(weights: Weights) -> None:
    for index, entry in enumerate(weights.entries):
        known = weights.of(index)
        if entry.checkpoint is not None and len(known) == len(weights.readings):
            text = " ".join(f"{name} {reading.digest}" for name, reading in known.items())
            entry.report.digest = sha256(text.encode()).hexdigest()[:32]
    moving = weights.sound()
    weights.constant = frozenset(
        name
        for name, column in weights.readings.items()
        # Of two steps one may be a copy of the other, which is for `_duplicates` to say.
        if len(moving) > 2 and len({column[index].digest for index in moving}) == 1
    )


def _damage(weights: Weights, quick: bool) -> None:
    """Bytes that are not what was written, and values that no training leaves."""
    for index, entry in enumerate(weights.entries):
        if entry.checkpoint is None:
            continue
        errors = [(name, column[index].error) for name, column in weights.readings.items() if column[index].error]
        if errors and not all(error == "is not there" for _, error in errors):
            entry.say("damaged", next(error for _, error in errors if error != "is not there"))
        bad = {name: reading.not_finite for name, reading in weights.of(index).items() if reading.not_finite}
        if bad:
            name, count = next(iter(bad.items()))
            where = " of the sample" if quick else ""
            entry.say("damaged", f"{count:,} values{where} of {name} are NaN or infinite" + _others(len(bad) - 1))
        if (rounded := _rounded(weights, index)) and not quick:
            entry.say("damaged", rounded, certain=False)
        zero = [
            name
            for name, reading in weights.of(index).items()
            if reading.zeros == reading.count > 0 and row_of(name).is_drawn and name not in weights.constant
        ]
        if zero and not all(is_adapter(name) for name in zero):
            entry.say("damaged", f"all values of {zero[0]} are zero" + _others(len(zero) - 1))


def _rounded(weights: Weights, index: int) -> str:
    """Whether all values are those of a coarser dtype than that which they are stored in, and only at few steps."""
    entry = weights.entries[index]
    assert entry.checkpoint is not None
    names = [name for name in weights.readings if row_of(name).is_drawn and name not in weights.constant]
    stored = {entry.checkpoint.model[name].dtype_name for name in names if name in entry.checkpoint.model}
    if stored != {"float32"}:
        return ""
    for dtype in COARSER:
        shares = [
            float(np.mean([_share_of(column[i].sample, dtype) for column in (weights.readings[n] for n in names)]))
            for i in range(len(weights.entries))
            if weights.entries[i].checkpoint is not None
        ]
        mine = min(_share_of(weights.readings[name][index].sample, dtype) for name in names)
        # Where most steps are as coarse, the run was published so; only a step unlike the others is damaged.
        if mine == 1.0 and float(np.median(shares)) < 0.5:
            return f"stored in float32, but all values are those of {dtype}: they were rounded"
    return ""


def _share_of(values: np.ndarray, dtype: str) -> float:
    """The share of values that a dtype holds exactly."""
    return float(np.mean(rounded(values.astype(np.float32), dtype) == values)) if len(values) else 0.0


def _others(count: int) -> str:
    return f", and {count} tensors more" if count > 0 else ""


def _still(a: Entry, b: Entry) -> bool:
    """Whether nothing can have moved between two steps: no update was made, or with a learning rate of zero."""
    if a.checkpoint is None or b.checkpoint is None:
        return False
    first, last = sorted((a.updates, b.updates))
    if first == last:
        return True
    return b.training is not None and b.training.lr_sum(first, last) == 0.0


def _duplicates(weights: Weights, quick: bool) -> None:
    """Steps with equal weights, of which at most one is what it says."""
    groups = defaultdict(list)
    for index in weights.labelled():
        if weights.entries[index].report.digest:
            groups[weights.entries[index].report.digest].append(index)
    for group in groups.values():
        # Steps without an update between them are one step in this respect.
        different = [group[0]]
        for index in group[1:]:
            if _still(weights.entries[different[-1]], weights.entries[index]):
                other = weights.entries[different[-1]].member.step
                weights.entries[index].say(
                    "fine", f"equal to step {other}: no update was made since, or with a rate of 0"
                )
            else:
                different.append(index)
        if len(different) < 2:
            continue
        true = _true_one(weights, different)
        for index in different:
            if index != true:
                step = weights.entries[true].member.step
                text = f"its {'samples of the' if quick else ''} weights are those of step {step}, bit for bit"
                weights.entries[index].say("duplicate", text.replace("  ", " "), not quick, of=step)


def _true_one(weights: Weights, group: Sequence[int]) -> int:
    """The one of several equal steps whose weights these are, by what its files say, else by where they fit."""
    named = []
    for index in group:
        checkpoint = weights.entries[index].checkpoint
        if checkpoint and checkpoint.progress.step == weights.entries[index].member.step:
            named.append(index)
    if len(named) == 1:
        return named[0]
    costs = {index: _misfit(weights, index, group) for index in group}
    best = min(group, key=lambda index: costs[index])
    # Of many the last one that may be it: in published suites the final weights stand in place of earlier ones.
    return [index for index in group if costs[index] <= costs[best] + 0.5][-1] if len(group) > 2 else best


def _misfit(weights: Weights, index: int, group: Sequence[int], names: Sequence[str] | None = None) -> float:
    """How badly the tensors fit at a place, by the distances to the steps around that are not of the group.

    With `names`: by how their distances compare with those of the other tensors there.
    """
    outside = [i for i in weights.sound() if i not in group]
    before = [i for i in outside if i < index][-1:]
    after = [i for i in outside if i > index][:1]
    squared = weights.distances.squared(names)
    if names is None:
        usual = usual_movement(squared, outside, weights.lengths)
        expected = {i: usual(min(i, index), max(i, index)) for i in before + after}
        shift = 0.0
    else:
        rest = [name for name in weights.distances.names if name not in set(names)]
        others = weights.distances.squared(rest) if rest else squared
        # Tensors move at paces of their own, so what these usually move more or less than the rest is taken off.
        expected = {i: math.sqrt(others[i, index]) for i in before + after}
        edges = list(zip(outside, outside[1:], strict=False))
        shift = float(np.median([_log(squared[e]) - _log(others[e]) for e in edges])) / 2 if edges else 0.0
    excess = [_log(squared[i, index]) / 2 - _log(expected[i] ** 2) / 2 - shift for i in before + after]
    # Nearer than expected says next to nothing: learning rates fall, and the end of a run comes to rest.
    costs = [value if value > 0 else NEARER * -value for value in excess]
    return float(np.mean(costs)) if costs else 0.0


def _log(value: float) -> float:
    # Equal weights have a distance of zero.
    return math.log(max(value, 1e-60))


def _splices(weights: Weights, quick: bool) -> None:
    """Steps of which some tensors, not all, are those of another step."""
    sound = weights.sound()
    shared: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, column in weights.readings.items():
        if name in weights.constant or is_adapter(name):
            continue
        groups = defaultdict(list)
        for index in sound:
            groups[column[index].digest].append(index)
        for group in groups.values():
            for a, b in zip(group, group[1:], strict=False):
                if not _still(weights.entries[a], weights.entries[b]) and _tells(weights, name, a, b, sound, quick):
                    shared[a, b].append(name)
    for (a, b), names in shared.items():
        whole = [name for name in weights.readings if name not in weights.constant]
        if len(names) == len(whole):
            continue  # duplicates, which are told already
        costs = [_misfit(weights, index, (a, b), names) for index in (a, b)]
        wrong, right = (a, b) if costs[0] > costs[1] else (b, a)
        files = _files(weights, wrong, names)
        step = weights.entries[right].member.step
        text = f"{len(names)} of {len(whole)} tensors are those of step {step}, {names[0]} first"
        weights.entries[wrong].say("spliced", text, not quick, of=step, files=files)


def _tells(weights: Weights, name: str, a: int, b: int, sound: Sequence[int], quick: bool) -> bool:
    """Whether equal values of a tensor at two steps cannot be chance.

    Between neighbours few values may all stay as they are, where the steps are smaller than the dtype resolves, and so
    may the rows of tokens that do not occur.
    """
    if quick and row_of(name).has_token_rows:
        return False
    reading, entry = weights.readings[name][a], weights.entries[a]
    assert entry.checkpoint is not None
    neighbours = b == next((index for index in sound if index > a), None)
    if row_of(name).is_drawn:
        return not (neighbours and _without_gradient(weights.entries[b], name))
    if entry.checkpoint.model[name].dtype_name not in ("float32", "float64"):
        return not neighbours and reading.count >= MANY
    training = weights.entries[b].training
    moved = training.lr_sum(entry.updates, weights.entries[b].updates) if training else math.inf
    column = weights.readings[name]
    often = sum(column[i].digest == column[j].digest for i, j in zip(sound, sound[1:], strict=False)) > 1
    # Zeros that stay zeros never had a gradient, as biases of parts that nothing uses.
    moves = reading.count >= 8 and reading.zeros < reading.count and moved > 1e-5
    return not neighbours or (moves and not often)


def _without_gradient(entry: Entry, name: str) -> bool:
    """Whether the optimizer has seen no gradient of a tensor so far, so that it stands still."""
    assert entry.checkpoint is not None
    state = (entry.checkpoint.optimizer or {}).get(name)
    second = state.get("exp_avg_sq") if state else None
    return second is not None and not any(bool(piece.any()) for piece in second.pieces())  # type: ignore[attr-defined]


def _files(weights: Weights, index: int, names: Sequence[str]) -> tuple[str, ...]:
    checkpoint = weights.entries[index].checkpoint
    assert checkpoint is not None
    return files_of(checkpoint.model.get(name) for name in names)


def files_of(refs: Iterable[TensorRef | None]) -> tuple[str, ...]:
    """The names of the files in which tensors lie."""
    return tuple(sorted({run.path.name for ref in refs if ref is not None for run in ref.runs()}))


def _are_whole_files(weights: Weights, index: int, names: Sequence[str], among: Sequence[str]) -> bool:
    """Whether the tensors are all of `among` that lie in their files, and other files hold others."""
    files = set(_files(weights, index, names))
    inside = {name for name in among if files & set(_files(weights, index, [name]))}
    return inside == set(names) and len(inside) < len(among)


def _holes(weights: Weights, quick: bool) -> None:
    """Values that are lost at one step alone: zeros where none are around, single elements that jump and return."""
    if quick:
        return
    found: dict[int, dict[str, str]] = defaultdict(dict)
    for name, column in weights.readings.items():
        if name not in weights.constant and not is_adapter(name):
            sound = [index for index in weights.sound() if not column[index].error]
            for index, text in (*_zeros(weights, name, sound), *_jumps(weights, name, sound)):
                found[index].setdefault(name, text)
    for index, texts in found.items():
        if weights.are_few(texts):
            text = next(iter(texts.values())) + _others(len(texts) - 1)
            weights.entries[index].say("damaged", text, certain=False)


def _zeros(weights: Weights, name: str, sound: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Steps at which many more values of a matrix are zero than at the steps around."""
    column = weights.readings[name]
    for p, i, n in zip([None, *sound], sound, [*sound[1:], None], strict=False):
        around = [column[k].zeros for k in (p, n) if k is not None]
        if around and row_of(name).is_drawn and column[i].zeros > 10 * max(around) + HOLES:
            yield i, f"{column[i].zeros:,} values of {name} are zero, at the steps around at most {max(around):,}"


def _jumps(weights: Weights, name: str, sound: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Steps at which a single value of a tensor is far from where it is before and after."""
    column = weights.readings[name]
    for p, i, n in zip(sound, sound[1:], sound[2:], strict=False):
        # A reading is compared element by element with the one before it alone, so all three must lie side by side.
        if n != i + 1 or p != i - 1:
            continue
        there, back = _largest(column[i]), _largest(column[n])
        near = [_largest(column[k]) for k in sound if max(1, i - 3) <= k <= n + 3 and k not in (i, n)]
        checkpoint = weights.entries[i].checkpoint
        assert checkpoint is not None
        # Rounding alone moves the largest element by so much.
        step_of_dtype = torch.finfo(checkpoint.model[name].dtype).eps * column[p].largest
        usual = max(float(np.median(near)) if near else math.inf, step_of_dtype)
        # As far back as there: an element that was lost, not an update that the run goes on from.
        if min(there, back) > SPREAD * max(usual, 1e-30) and abs(there - back) < 0.2 * there:
            yield i, f"a value of {name} jumps by {there:.3g} and returns, where {usual:.3g} is usual"


def _largest(reading: TensorReading) -> float:
    return reading.previous.largest if reading.previous else 0.0


def _foreign_tensors(weights: Weights) -> None:
    """Steps of which some tensors are far from those of the steps around, while the others are not."""
    sound = weights.sound()
    names = [name for name in weights.distances.names if name not in weights.constant]
    alone: dict[int, list[str]] = defaultdict(list)
    for name in weights.matrices(names):
        for i, detour in detours(weights.distances.squared([name]), sound).items():
            if detour > ALONE:
                alone[i].append(name)
    matrices = weights.matrices(names)
    for i, strange in alone.items():
        rest = [name for name in matrices if name not in strange]
        if not rest or detours(weights.distances.squared(rest), sound)[i] > QUIET:
            continue  # the step as a whole, which `_order` judges
        if _are_whole_files(weights, i, strange, matrices):
            text = f"{len(strange)} matrices are of other weights, {strange[0]} first; the others go on"
            files = _files(weights, i, strange)
            weights.entries[i].say("spliced", text, certain=False, files=files)
        elif weights.are_few(strange):
            text = f"{len(strange)} matrices are not those of the steps around, {strange[0]} first; the others are"
            weights.entries[i].say("damaged", text, certain=False)


def _order(weights: Weights, quick: bool) -> None:
    """Which steps follow each other as the optimizer can move them, and which do not belong there."""
    chain = weights.sound()
    names = [name for name in weights.distances.names if name not in weights.constant]
    if len(chain) < 2 or not names:
        return
    squared = weights.distances.squared()
    usual = usual_movement(squared, chain, weights.lengths)
    strangers = {i for i, detour in detours(squared, chain).items() if detour > DETOUR and _matters(squared, chain, i)}
    for a, b in exchanged(squared, chain):
        for i, j in ((a, b), (b, a)):
            step = weights.entries[j].member.step
            text = f"it fits where step {step} is, and step {step} here: the two are exchanged"
            weights.entries[i].say("mislabelled", text, certain=False, of=step)
    # Exchanged steps have been told, and would break the path for those around them.
    chain = [i for i in chain if weights.entries[i].sound]
    jump = is_jump(weights.distances, squared, weights.matrices(names), usual, chain[0] if chain else 0)
    bounds = _Bounds(weights, names)
    impossible: dict[tuple[int, int], tuple[str, list[str]]] = {}

    def fits(a: int, b: int) -> bool:
        # Many pairs are asked for more than once, and the reasons are needed below.
        if (a, b) not in impossible:
            impossible[a, b] = bounds.beyond(a, b)
        return not impossible[a, b][0] and not ({a, b} & strangers) and not jump(a, b)

    path, breaks = longest_path(chain, fits)
    for index in chain:
        if index in path:
            continue
        entry = weights.entries[index]
        # Only the nearest steps of the path count: over a longer way the optimizer can reach more.
        neighbours = [(i, index) for i in path if i < index][-1:] + [(index, i) for i in path if i > index][:1]
        reasons = [impossible[pair] for pair in neighbours if impossible.get(pair, ("",))[0]]
        place = place_of(squared, path, index)
        if place and place[0] < index < place[1]:  # where it is
            place = None
        if place and not any(impossible.get(pair, ("",))[0] for pair in (place, (place[0], index), (index, place[1]))):
            steps = " and ".join(str(weights.entries[i].member.step) for i in place)
            entry.say("mislabelled", f"its weights fit between steps {steps}", certain=False)
        elif reasons:
            few = all(weights.are_few(names) for _, names in reasons)
            entry.say("damaged" if few else "not a continuation", reasons[0][0])
        else:
            text = "it is far from the steps before and after it, which are near each other"
            entry.say("not a continuation", text, certain=False)
    for a, b in breaks:
        reason = impossible.get((a, b), ("", []))[0]
        # What the learning rates cannot reach is proven, a large distance is only a sign.
        text = reason or f"from step {weights.entries[a].member.step} on the weights are others, which go on from here"
        weights.entries[b].say("not a continuation", text, certain=bool(reason))
    if all(entry.training is None for entry in weights.entries):
        weights.series.unknown.append(
            "whether the steps are larger than the learning rate allows: no config; --against CONFIG"
        )


def _matters(squared: np.ndarray, chain: Sequence[int], index: int) -> bool:
    """Whether a detour is more than the wandering of a run that has come to rest."""
    at = list(chain).index(index)
    edges = [squared[a, b] for a, b in zip(chain, chain[1:], strict=False) if index not in (a, b)]
    there = min(squared[chain[at - 1], index], squared[index, chain[at + 1]])
    return not edges or there > FAR * float(np.median(edges[max(0, at - 5) : at + 4] or edges))


def _leave_behind(weights: Weights) -> None:
    """Set the steps aside that a rewind left behind: later ones have fewer updates."""
    kept: list[int] = []
    for index in weights.sound():
        while kept and weights.entries[kept[-1]].updates > weights.entries[index].updates:
            weights.left_behind.add(kept.pop())
        kept.append(index)
    for index in weights.left_behind:
        text = "a rewind left it behind: the next step goes on from an earlier one"
        weights.entries[index].say("fine", text, certain=False)


class _Bounds:
    """Whether the optimizer can have moved the weights from one step to another."""

    def __init__(self, weights: Weights, names: Sequence[str]) -> None:
        self.weights, self.names = weights, [name for name in names if not is_adapter(name)]

    def beyond(self, a: int, b: int) -> tuple[str, list[str]]:
        """Why not, in words, and which tensors; empty if it can, or if nothing is known of the training."""
        before, after = self.weights.entries[a], self.weights.entries[b]
        # The settings may have changed on the way: the ones that allow more decide, see `_highest`.
        trainings = [each for each in (before.training, after.training) if each is not None]
        if after.training is None or not trainings:
            return "", []
        # Steps that were skipped may have been rewound: the way back and on again counts, too.
        begin, end = before.updates, after.updates + 2 * max(0, after.skipped - before.skipped)
        sums = [training.lr_sum(begin, end) for training in trainings]
        worst: tuple[float, str] = (1.0, "")
        too_far = []
        for name in self.names:
            readings = [self.weights.readings[name][index] for index in (a, b)]
            if any(reading.error for reading in readings):
                continue
            refs = [entry.checkpoint.model[name] for entry in (before, after) if entry.checkpoint]
            # If the two are stored in different dtypes, the coarser one decides how much of a movement may be rounding.
            dtype = max((ref.dtype_name for ref in refs), key=lambda kind: torch.finfo(getattr(torch, kind)).eps)
            largest, norm = max(r.largest for r in readings), max(r.norm for r in readings)
            bounds = [
                reach(training, name, lr_sum, (begin, end), readings[1].count, largest, norm, dtype)
                for training, lr_sum in zip(trainings, sums, strict=True)
            ]
            for moved, limit, what in self._moved(name, a, b, bounds):
                if limit is not None and moved > limit:
                    too_far.append(name)
                if limit is not None and moved > limit * worst[0]:
                    # {0} is filled in after the loop, for the one tensor that exceeds its bound the most.
                    text = f"{name} {what} {moved:.3g}; {{0}} can reach {limit:.3g} at most"
                    worst = moved / max(limit, 1e-300), text
        steps = f"{end - begin} updates from step {before.member.step} on"
        rates = f"{steps}, whose learning rates sum up to {max(sums):.3g},"
        return worst[1].format(rates) if worst[1] else "", too_far

    def _moved(self, name: str, a: int, b: int, bounds: Sequence[Reach]) -> list[tuple[float, float | None, str]]:
        """(movement, its bound, in words), exact where the two were read one after the other, else by the sample."""
        reading, count = self.weights.readings[name][b], self.weights.readings[name][b].count
        if reading.previous is not None and self._follow(name, a, b):
            largest, squares = reading.previous.largest, reading.previous.squares
        else:
            samples = [self.weights.readings[name][index].sample.astype(np.float64) for index in (a, b)]
            difference = samples[1] - samples[0]
            largest = float(np.abs(difference).max(initial=0.0))
            # Of a sample, the mean is uncertain: half of it is certainly there.
            squares = 0.5 * float(np.mean(difference**2)) * count if len(difference) else 0.0
        root = math.sqrt(squares / max(count, 1))
        return [
            (largest, _highest(bound.largest for bound in bounds), "has an element that moves by"),
            (root, _highest(bound.rms for bound in bounds), "moves in the root mean square by"),
            (math.sqrt(squares), _highest(bound.norm for bound in bounds), "moves in norm by"),
        ]

    def _follow(self, name: str, a: int, b: int) -> bool:
        column = self.weights.readings[name]
        return all(column[index].error for index in range(a + 1, b))


def _highest(limits: Iterable[float | None]) -> float | None:
    known = [limit for limit in limits if limit is not None]
    return max(known, default=None)
