"""Check a series of checkpoints: is each step what its name says, and does each follow from the one before.

The order of work: open all steps, compare what their headers say, read every tensor of all steps once, judge the bytes
(damaged, equal to another step's), then the distances, then the optimizer states. Whatever is found is a `StepFact` of
a step, certain or inferred; the gravest decides the verdict.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from castalia.checkpoint.tensors import Checkpoint
from castalia.config.load import load_config, load_run
from castalia.config.schema import ModelConfig, RunConfig
from castalia.config.tensor_table import in_order, row_of
from castalia.errors import CastaliaError
from castalia.examine.diff import model_settings
from castalia.observe.metrics import read_events
from castalia.series.members import Member
from castalia.series.travel import Training, training_of
from castalia.storage.derived import Part
from castalia.storage.lazy import TensorRef
from castalia.train.run_folder import is_run
from castalia.train.schedule import is_save_step

Verdict = Literal[
    "fine", "duplicate", "spliced", "not a continuation", "mislabelled", "missing", "unreadable", "damaged"
]
GRAVITY: tuple[Verdict, ...] = (
    "missing", "unreadable", "damaged", "duplicate", "spliced", "mislabelled", "not a continuation",
)  # fmt: skip


@dataclass(frozen=True)
class StepFact:
    """One thing that was found at a step."""

    verdict: Verdict  # what it makes of the step; fine: worth knowing, nothing is wrong
    text: str
    certain: bool = True  # by bytes or by mathematics; else inferred from what the other steps are like
    of: int | None = None  # the step whose weights these are, where they are another's
    files: tuple[str, ...] = ()  # that hold what is wrong, where not all do


@dataclass
class StepReport:
    """A step of the series and what was found of it."""

    step: int
    name: str
    path: Path | None  # None: it is missing
    facts: list[StepFact] = field(default_factory=list)
    digest: str = ""  # of all weights; equal digests are equal weights

    @property
    def worst(self) -> StepFact | None:
        """The fact that decides the verdict; of equally grave ones, a certain one."""
        wrong = [fact for fact in self.facts if fact.verdict != "fine"]
        return min(wrong, key=lambda fact: (GRAVITY.index(fact.verdict), not fact.certain), default=None)

    @property
    def verdict(self) -> str:
        """The verdict in words: "duplicate of step 5", for instance."""
        worst = self.worst
        if worst is None:
            return "fine"
        if worst.verdict == "duplicate":
            return f"duplicate of step {worst.of}"
        if worst.verdict == "spliced":
            origin = "elsewhere" if worst.of is None else f"step {worst.of}"
            return f"spliced from {origin}" + (f": {', '.join(worst.files)}" if worst.files else "")
        return worst.verdict

    def as_json(self) -> dict[str, Any]:
        """Values of JSON."""
        facts = [
            {"verdict": f.verdict, "text": f.text, "certain": f.certain, "of": f.of, "files": list(f.files)}
            for f in self.facts
        ]
        worst = self.worst
        return {
            "step": self.step,
            "name": self.name,
            "path": str(self.path) if self.path else None,
            "verdict": self.verdict,
            "certain": worst is None or worst.certain,
            "digest": self.digest,
            "facts": facts,
        }


class Entry:
    """A member of the series while it is judged."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.report = StepReport(member.step, member.name, member.path)
        self.checkpoint: Checkpoint | None = None
        self.training: Training | None = None

    def say(self, verdict: Verdict, text: str, certain: bool = True, **more: Any) -> None:
        """Note a fact."""
        self.report.facts.append(StepFact(verdict, text, certain, **more))

    @property
    def sound(self) -> bool:
        """Whether it could be read and nothing is wrong with it so far."""
        return self.checkpoint is not None and self.report.worst is None

    @property
    def updates(self) -> int:
        """Updates that the optimizer made before this step: steps, unless the files know of skipped ones."""
        assert self.checkpoint is not None
        progress = self.checkpoint.progress
        return self.member.step - (progress.skipped if progress.step == self.member.step else 0)

    @property
    def skipped(self) -> int:
        """Steps without an update."""
        return self.member.step - self.updates


class Series:
    """The opened members, and what they have in common."""

    def __init__(self, members: Sequence[Member], against: str | None = None) -> None:
        self.entries = [Entry(member) for member in members]
        self.unknown: list[str] = []  # what could not be judged, and why
        self.against = config_of(against) if against else None
        for entry in self.entries:
            self._open(entry)
        self.names = self._names()
        self.rows = {name: self._rows(name) for name in self.names}

    def _open(self, entry: Entry) -> None:
        try:
            entry.checkpoint = entry.member.open(adapters=True)
        except (CastaliaError, OSError) as error:
            entry.say("unreadable", str(error))
            return
        entry.training = training_of(entry.checkpoint, self.against)

    @property
    def readable(self) -> list[Entry]:
        """The entries that could be opened, in order."""
        return [entry for entry in self.entries if entry.checkpoint is not None]

    def _names(self) -> list[str]:
        """The tensors that most of the steps have, in the order of the model."""
        held = Counter(name for entry in self.readable for name in entry.checkpoint.model)  # type: ignore[union-attr]
        return in_order([name for name, count in held.items() if 2 * count > len(self.readable)])

    def _rows(self, name: str) -> tuple[int, ...]:
        """The shape that a tensor has at most steps; of vocabularies, with the fewest rows of any."""
        shapes = Counter(
            tuple(entry.checkpoint.model[name].shape)  # type: ignore[union-attr]
            for entry in self.readable
            if name in entry.checkpoint.model  # type: ignore[union-attr]
        )
        usual = shapes.most_common(1)[0][0]
        if row_of(name).has_token_rows:  # formats pad them differently
            return (min(shape[0] for shape in shapes if shape[1:] == usual[1:]), *usual[1:])
        return usual

    def tensor(self, entry: Entry, name: str) -> TensorRef | None:
        """A tensor of a step, cut to the rows that all have; None where it is not there or has another shape."""
        ref = entry.checkpoint.model.get(name) if entry.checkpoint else None
        shape = self.rows[name]
        if ref is None or len(ref.shape) != len(shape) or tuple(ref.shape[1:]) != shape[1:]:
            return None
        if ref.shape == shape or not shape:
            return ref
        return Part(ref, 0, shape[0]) if row_of(name).has_token_rows and ref.shape[0] >= shape[0] else None

    def report(self) -> list[StepReport]:
        """All reports, in the order of steps."""
        return sorted((entry.report for entry in self.entries), key=lambda report: report.step)


def config_of(against: str) -> RunConfig:
    """The config in a run's folder, in a file, or of a preset. Raises ConfigError, or OSError without such a file."""
    return load_run(Path(against)) if is_run(Path(against)) else load_config([against], [])


def check_headers(series: Series) -> None:
    """Judge what can be read without tensors: structure, config, dtype, step, progress, optimizer steps."""
    _structure(series)
    _configs(series)
    _dtypes(series)
    _labels(series)
    _progress(series)


def _structure(series: Series) -> None:
    for entry in series.readable:
        assert entry.checkpoint is not None
        lacking = [name for name in series.names if series.tensor(entry, name) is None]
        more = [name for name in entry.checkpoint.model if name not in series.rows]
        if 2 * len(lacking) > len(series.names):
            entry.say("not a continuation", f"another model: {len(lacking)} tensors are not those of the other steps")
        elif lacking or more:
            listed = ", ".join((lacking + more)[:3])
            entry.say("damaged", f"{len(lacking)} tensors lack or have other shapes, {len(more)} are new: {listed}")


def _configs(series: Series) -> None:
    """Steps whose config describes another model than the others', although their tensors have the same shapes."""
    configs = [(entry, entry.checkpoint.config.model) for entry in series.readable if entry.checkpoint.config]  # type: ignore[union-attr]
    models = [(entry, _settings(model)) for entry, model in configs if model is not None]
    if series.against and series.against.model:
        usual, where = _settings(series.against.model), "the config that it is held against"
    elif models:
        usual, where = Counter(settings for _, settings in models).most_common(1)[0][0], "most steps"
    else:
        return
    for entry, settings in models:
        other = sorted(set(settings) - set(usual))
        if other and entry.sound:
            listed = ", ".join(f"{key} {value} ({dict(usual).get(key)} in {where})" for key, value in other[:3])
            entry.say("mislabelled", f"its config describes another model: {listed}")


def _settings(model: ModelConfig) -> tuple[tuple[str, str], ...]:
    return tuple((key, repr(value)) for key, value in sorted(model_settings(model).items()))


def _dtypes(series: Series) -> None:
    """One step among many of one format that is stored in a coarser dtype was rounded once more than the others."""
    by_format = defaultdict(list)
    for entry in series.readable:
        assert entry.checkpoint is not None
        kinds = Counter(ref.dtype_name for ref in entry.checkpoint.model.values())
        by_format[entry.checkpoint.format].append((entry, kinds.most_common(1)[0][0] if kinds else ""))
    for entries in by_format.values():
        usual, count = Counter(dtype for _, dtype in entries).most_common(1)[0]
        for entry, dtype in entries:
            if dtype != usual:
                few = 5 * count >= 4 * len(entries)
                text = f"stored in {dtype}, {count} other steps of its format in {usual}"
                entry.say("damaged" if few else "fine", text, certain=False)


def _labels(series: Series) -> None:
    for entry in series.readable:
        assert entry.checkpoint is not None
        stored = entry.checkpoint.progress.step
        if stored and stored != entry.member.step or (not stored and _knows_steps(entry) and entry.member.step):
            entry.say("mislabelled", f"its files are of step {stored}", of=stored)


def _knows_steps(entry: Entry) -> bool:
    """Whether a stored step of 0 means that the run had not begun, and not that the format stores none."""
    assert entry.checkpoint is not None
    return entry.checkpoint.optimizer is not None


def _progress(series: Series) -> None:
    """Optimizer steps and tokens that go on before and after a step, but not through it."""
    known = [entry for entry in series.readable if entry.sound]
    steps = [(entry, entry.updates, _optimizer_step(entry)) for entry in known]
    _out_of_line(steps, "the optimizer has made {0:,} steps, where about {1:,} fit the steps around")
    tokens = [(entry, entry.member.step, _tokens(entry)) for entry in known]
    _out_of_line(tokens, "{0:,} tokens were read, where about {1:,} fit the steps around")


def _out_of_line(counts: Sequence[tuple[Entry, int, int | None]], text: str) -> None:
    """Note steps whose count, the last of the three, is not between those of the steps around, which agree."""
    line = [(entry, at, count) for entry, at, count in counts if count is not None]
    for (_, x, a), (entry, y, b), (_, z, c) in zip(line, line[1:], line[2:], strict=False):
        # Counts that fall were rewound or begun anew.
        if x < y < z and a <= c and not a <= b <= c:
            entry.say("mislabelled", text.format(b, round(a + (c - a) * (y - x) / (z - x))), certain=False)


def _optimizer_step(entry: Entry) -> int | None:
    assert entry.checkpoint is not None
    steps = Counter(int(state["step"]) for state in (entry.checkpoint.optimizer or {}).values())
    return steps.most_common(1)[0][0] if steps and entry.checkpoint.facts.adam_steps_stored is not False else None


def _tokens(entry: Entry) -> int | None:
    assert entry.checkpoint is not None
    return entry.checkpoint.progress.tokens or None


def check_completeness(series: Series, run: Path | None, wanted: Callable[[int], bool]) -> None:
    """Add the steps that the run's record, the schedule of saving or the regularity of the others expects.

    `wanted`: whether a step was asked for at all.
    """
    present = {entry.member.step for entry in series.entries}
    for step, (reason, certain) in sorted(_expected(series, run, sorted(present)).items()):
        if step not in present and wanted(step):
            entry = Entry(Member(step, "", Path()))
            entry.report.path = None
            entry.say("missing", reason, certain)
            series.entries.append(entry)


def _expected(series: Series, run: Path | None, present: Sequence[int]) -> dict[int, tuple[str, bool]]:
    held = [(entry.member.step, entry.checkpoint.config) for entry in series.readable if entry.checkpoint]
    configs = [(step, series.against or config) for step, config in held if series.against or config]
    saving = [(step, config) for step, config in configs if config and _saves(config)]
    if any(config.checkpoint.keep_last for _, config in saving):
        series.unknown.append("which steps are missing: checkpoint.keep_last deletes old ones")
        return {}
    saved = [event["step"] for event in read_events(run) if event["event"] == "save"] if run else []
    if saved:
        return dict.fromkeys(saved, ("the run's events.jsonl tells that it was saved", True))
    if not saving:
        return dict.fromkeys(_gaps(present), ("the steps around it are regular", False))
    expected = {}
    for step in range(present[-1] + 1):
        # A run may have been resumed with another schedule: the next step that is there knows the one that held.
        config = next((config for at, config in saving if at >= step), saving[-1][1])
        if is_save_step(config.checkpoint, step, config.train.steps or 0):
            expected[step] = ("the config beside the weights says that it is saved", True)
    return expected


def _saves(config: RunConfig) -> bool:
    saving = config.checkpoint
    return bool(saving.every or saving.log_base or saving.steps)


def _gaps(steps: Sequence[int]) -> list[int]:
    """Steps that would make a sequence regular: the distance on both sides of a gap goes on in it, or powers of two."""
    missing: list[int] = []
    distances = [b - a for a, b in zip(steps, steps[1:], strict=False)]
    for at, (a, gap) in enumerate(zip(steps, distances, strict=False)):
        before, after = distances[max(0, at - 3) : at], distances[at + 1 : at + 4]
        if before and after:
            usual = before[-1] if before[-1] == after[0] else 0
        else:  # at an end, three on the other side must agree
            usual = (before or after)[0] if len(set(before or after)) == 1 and len(before or after) == 3 else 0
        doubling = at > 1 and [steps[at - 2], steps[at - 1], a + gap] == [a / 4, a / 2, 2 * a]
        if usual and gap > usual and gap % usual == 0 and not doubling:
            missing += range(a + usual, a + gap, usual)
        elif a > 0 and _power_of_two(a) and _power_of_two(a + gap) and gap > a:
            missing += [a << n for n in range(1, ((a + gap) // a).bit_length() - 1)]
    return missing


def _power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
