"""Judge the optimizer states of a series: are they there, of these weights, and do they go on from step to step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from castalia.checkpoint.rules import MOMENTS
from castalia.checkpoint.tensors import state_tensors
from castalia.config.tensor_table import row_of
from castalia.series.audit import Entry, Series
from castalia.series.continuity import files_of
from castalia.series.geometry import longest_path
from castalia.series.states import StateAt, StateReading

SHARE = 0.01  # of a tensor's elements: fewer may break a rule by rounding

States = Mapping[str, Sequence[StateReading]]  # by tensor, of each entry of the series


def state_at(entry: Entry, name: str) -> StateAt | None:
    """What is read of a tensor's optimizer state at a step; None: there is none."""
    checkpoint = entry.checkpoint
    state = (checkpoint.optimizer or {}).get(name) if checkpoint else None
    if checkpoint is None or state is None:
        return None
    weight = None if name.endswith(".bias") else checkpoint.model.get(name)  # biases are sums or means over ranks
    betas = checkpoint.config.optimizer.betas if checkpoint.config else (0.0, 0.0)
    tensors = {kind: ref for kind, ref in state_tensors(state).items() if kind != "master" or weight is not None}
    factor = checkpoint.summed_micro_batches
    return StateAt(tensors, weight, int(state["step"]), entry.skipped, betas, factor)


def judge_states(series: Series, states: States) -> None:
    """Find what is wrong with the optimizer states, and note it at the steps."""
    for index, entry in enumerate(series.entries):
        if entry.checkpoint is not None and entry.checkpoint.optimizer is not None:
            _alone(entry, {name: column[index] for name, column in states.items() if column[index].count})
            errors = [column[index].error for column in states.values() if column[index].error]
            if errors:
                entry.say("damaged", errors[0])
    _lacking(series)
    _equal(series, states)
    _broken(series, states)


def _lacking(series: Series) -> None:
    """Steps without an optimizer state among steps with one."""
    having = [entry for entry in series.readable if entry.checkpoint and entry.checkpoint.optimizer is not None]
    if 2 * len(having) <= len(series.readable) or not having:
        return
    for entry in series.readable:
        assert entry.checkpoint is not None
        same = sum(entry.checkpoint.format == other.checkpoint.format for other in having if other.checkpoint)
        if entry.checkpoint.optimizer is None and 2 * same > len(having):
            entry.say("damaged", "it has no optimizer state, which the other steps have")


def _alone(entry: Entry, readings: Mapping[str, StateReading]) -> None:
    """What a state shows without others."""
    made = entry.updates > 0 and any(state["step"] for state in (entry.checkpoint.optimizer or {}).values())  # type: ignore[union-attr]
    kinds = {kind for reading in readings.values() for kind in reading.zeros}
    for kind in sorted(kinds):
        zero = [name for name, reading in readings.items() if reading.zeros.get(kind) == reading.count]
        if made and readings and len(zero) == len(readings):
            entry.say("damaged", f"all {kind} are zero after {entry.updates:,} updates")
    beyond = [name for name, reading in readings.items() if reading.beyond > SHARE * reading.count]
    if beyond:
        text = (
            f"the first moment of {beyond[0]} is larger than the second allows, {len(beyond)} tensors in all: the two "
        )
        entry.say("damaged", text + "are not of one run or step")
    unrounded = [name for name, reading in readings.items() if reading.unrounded > SHARE * reading.count]
    if len(unrounded) > len(readings) / 2:
        text = "the weights are not their fp32 masters rounded: the optimizer state is of other weights"
        entry.say("spliced", text, files=_state_files(entry, unrounded, "master"))


def _state_files(entry: Entry, names: Sequence[str], kind: str) -> tuple[str, ...]:
    assert entry.checkpoint is not None and entry.checkpoint.optimizer is not None
    optimizer = entry.checkpoint.optimizer
    return files_of(optimizer[name].get(kind) for name in names if name in optimizer)  # type: ignore[misc]


def _equal(series: Series, states: States) -> None:
    """Moments of one step that are those of another whose weights are others."""
    shared: dict[tuple[int, int], list[tuple[str, str]]] = defaultdict(list)
    for name, column in states.items():
        for kind in MOMENTS:
            groups = defaultdict(list)
            for index, reading in enumerate(column):
                if series.entries[index].sound and reading.zeros.get(kind, reading.count) < reading.count:
                    groups[reading.digests.get(kind)].append(index)
            for group in groups.values():
                for a, b in zip(group, group[1:], strict=False):
                    if row_of(name).is_drawn and series.entries[a].updates != series.entries[b].updates:
                        shared[a, b].append((name, kind))
    for (a, b), found in shared.items():
        breaks = {index: sum(_breaks(column, index) for column in states.values()) for index in (a, b)}
        wrong, right = (a, b) if breaks[a] > breaks[b] else (b, a)
        step = series.entries[right].member.step
        names = [name for name, _ in found]
        text = f"{len(found)} moments are those of step {step}, bit for bit, {names[0]}.{found[0][1]} first"
        files = _state_files(series.entries[wrong], names, found[0][1])
        series.entries[wrong].say("spliced", text, of=step, files=files)


def _breaks(column: Sequence[StateReading], index: int) -> int:
    """On how many sides of a step the second moment does not go on."""
    following = column[index + 1 : index + 2]
    return sum(bool((reading.shrunk or 0) > SHARE * reading.count) for reading in (column[index], *following))


def _broken(series: Series, states: States) -> None:
    """Steps whose second moments do not follow from those before, nor those after from them."""
    moved = ("fine", "not a continuation", "mislabelled")  # what weights say may be said of moments, too
    known = [(index, entry) for index, entry in enumerate(series.entries) if entry.checkpoint is not None]
    chain = [index for index, entry in known if all(fact.verdict in moved for fact in entry.report.facts)]

    def fits(a: int, b: int) -> bool:
        """Whether moments can be so small; what was not compared, can."""
        if b - a > 2:
            return True
        past = [r.shrunk if b - a == 1 else r.shrunk_past for r in (column[b] for column in states.values())]
        counts = [column[b].count for column in states.values()]
        judged = [(number, count) for number, count in zip(past, counts, strict=True) if number is not None]
        return 2 * sum(number > SHARE * count for number, count in judged) <= len(judged)

    path, breaks = longest_path(chain, fits)
    for index in [*(i for i in chain if i not in path), *(b for _, b in breaks)]:
        text = "the second moments and those of the steps around do not follow from each other: they are of another run"
        if series.entries[index].sound:
            series.entries[index].say("not a continuation", text)
