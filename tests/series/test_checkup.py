"""What the check of a series names, and that it names nothing in a series that is right."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from castalia.checkpoint.opener import open_checkpoint
from castalia.observe.metrics import read_events
from castalia.series.checkup import Checkup, check_series
from castalia.series.members import find_series
from tests.series import changes
from tests.series.changes import exported, first, steps_of

Sources = tuple[Path, Path, Path]  # the run, one of another seed, one of other data
Change = Callable[[dict[int, Path], int, int, Sources], None]  # steps, where, from where


def _from(part: str = "", source: int = 0, same_step: bool = False) -> Change:
    def change(steps: dict[int, Path], at: int, other: int, sources: Sources) -> None:
        changes.taken_from(steps[at], steps_of(sources[source])[at if same_step else other], part)

    return change


def _matrix(how: Callable[[torch.Tensor], torch.Tensor], part: str = "blocks.0.mlp.up.weight") -> Change:
    return lambda steps, at, other, sources: changes.changed(steps[at], first(part, how))


def _weights_exchanged(steps: dict[int, Path], at: int, other: int, sources: Sources) -> None:
    one, two = (changes.read(open_checkpoint(steps[step]).model) for step in (at, at + 1))
    changes.with_weights(steps[at], two)
    changes.with_weights(steps[at + 1], one)


def _all_from_here(steps: dict[int, Path], at: int, other: int, sources: Sources) -> None:
    for step in range(at, max(steps) + 1):
        changes.copied_whole(steps[step], steps_of(sources[1])[step])


def _moments(source: int, same_step: bool, kinds: tuple[str, ...] = ("exp_avg", "exp_avg_sq")) -> Change:
    def change(steps: dict[int, Path], at: int, other: int, sources: Sources) -> None:
        state = open_checkpoint(steps_of(sources[source])[at if same_step else other]).optimizer
        assert state is not None
        changes.with_state(steps[at], lambda name, kind, values: state[name][kind].read() if kind in kinds else values)

    return change


IN_WEIGHTS: dict[str, tuple[Change, str]] = {  # what is done, and the verdict; {0}: the step that it was done to
    "the weights of another step": (_from(), "duplicate of step {1}"),
    "a copy of another step's folder": (
        lambda steps, at, other, sources: changes.copied_whole(steps[at], steps[other]),
        "duplicate of step {1}",
    ),
    "one block of another step": (_from("blocks.1."), "spliced from step {1}"),
    "one matrix of another step": (_from("blocks.0.mlp.up.weight"), "spliced from step {1}"),
    "the weights of another seed": (_from("", 1, True), "not a continuation"),
    "other weights from here on": (_all_from_here, "not a continuation"),
    "no folder": (lambda steps, at, other, sources: shutil.rmtree(steps[at]), "missing"),
    "a file cut short": (lambda steps, at, other, sources: changes.cut_short(steps[at]), "unreadable"),
    "NaN": (_matrix(changes.with_nan), "damaged"),
    "a matrix of zeros": (_matrix(torch.zeros_like), "damaged"),
    "a hole of zeros": (_matrix(changes.with_hole), "damaged"),
    "a flipped exponent": (_matrix(changes.with_spike), "damaged"),
    "permuted rows": (_matrix(lambda values: values.flip(0), "blocks.0.attn.qkv.weight"), "damaged"),
    "a transposed matrix": (_matrix(lambda values: values.t().contiguous(), "blocks.0.attn.out.weight"), "damaged"),
    "a scaled matrix": (_matrix(lambda values: values * 1.5, "blocks.0.mlp.down.weight"), "damaged"),
    "one block of another seed": (_from("blocks.1.", 1, True), "damaged"),
    "rounded weights": (
        lambda steps, at, other, sources: changes.changed(steps[at], lambda name, values: values.bfloat16().float()),
        "damaged",
    ),
    "folders exchanged": (
        lambda steps, at, other, sources: changes.exchanged(steps[at], steps[at + 1]),
        "mislabelled",
    ),
    "weights exchanged": (_weights_exchanged, "mislabelled"),
}
ONLY_OURS: dict[str, tuple[Change, str]] = {  # what a format with checksums and optimizer state shows as well
    "the weights of other data": (_from("", 2, True), "not a continuation"),
    "a flipped byte": (lambda steps, at, other, sources: changes.byte_flipped(steps[at]), "damaged"),
    "moments of zero": (
        lambda steps, at, other, sources: changes.with_state(steps[at], lambda name, kind, v: torch.zeros_like(v)),
        "damaged",
    ),
    "moments of another step": (_moments(0, False), "spliced from step {1}: optimizer"),
    "moments of another run": (_moments(1, True), "not a continuation"),
    "second moments of another run": (_moments(1, True, ("exp_avg_sq",)), "damaged"),
}
PLACES = [(1, 9), (10, 3), (18, 6)]  # where, and from which step
EXCHANGED = ("folders exchanged", "weights exchanged")


@pytest.fixture(scope="module")
def sources(trained) -> Sources:
    return trained(), trained("seed=5"), trained("data.split=80,20,0")


@pytest.fixture(scope="module")
def in_weights_alone(sources, tmp_path_factory) -> Sources:
    """The same as Hugging Face folders without anything but weights."""
    place = tmp_path_factory.mktemp("weights")
    one, two, three = (
        exported(run, place / f"of{number}", "hf", torch.float32, False) for number, run in enumerate(sources)
    )
    return one, two, three


def checked(path: Path, **options: object) -> Checkup:
    run = path if (path / "events.jsonl").is_file() else None
    return check_series(find_series([path]), run=run, **options)  # type: ignore[arg-type]


def wrong(found: Checkup) -> dict[int, str]:
    return {report.step: report.verdict for report in found.reports if report.worst is not None}


def names_it(copy, sources: Sources, kind: str, change: Change, verdict: str, at: int, other: int) -> None:
    series = copy(sources[0])
    change(steps_of(series), at, other, sources)
    found = wrong(checked(series))
    # A path that is broken after its first step leaves that step alone, not all the others.
    expected = {0} if kind == "other weights from here on" and at == 1 else {at}
    expected |= {at + 1} if kind in EXCHANGED else set()
    assert found.keys() == expected
    assert all(text.startswith(verdict.format(at, other)) for text in found.values()), found


at_all_places = pytest.mark.parametrize(
    "place",
    [pytest.param(p, id=f"at {p[0]}", marks=[pytest.mark.grid] * (p != PLACES[1])) for p in PLACES],
)
FAST = ("the weights of another step", "one block of another step", "no folder", "a scaled matrix")


@pytest.mark.parametrize("kind", FAST)
def test_what_is_wrong_at_a_step_is_named(copy, sources, kind):
    names_it(copy, sources, kind, *IN_WEIGHTS[kind], *PLACES[1])


@pytest.mark.slow
@at_all_places
@pytest.mark.parametrize("kind", [*IN_WEIGHTS, *ONLY_OURS])
def test_whatever_is_wrong_is_named_wherever_it_is(copy, sources, kind, place):
    names_it(copy, sources, kind, *(IN_WEIGHTS | ONLY_OURS)[kind], *place)


@pytest.mark.slow
@at_all_places
@pytest.mark.parametrize("kind", IN_WEIGHTS)
def test_weights_alone_show_it_too(copy, in_weights_alone, kind, place):
    names_it(copy, in_weights_alone, kind, *IN_WEIGHTS[kind], *place)


@pytest.mark.slow
def test_a_file_of_another_step_or_run_is_named(sources, tmp_path):
    ours, theirs = (exported(run, tmp_path / run.parent.name, "neox", torch.float32, True) for run in sources[:2])
    layer = "layer_03-model_00-model_states.pt"
    shutil.copyfile(steps_of(ours)[4] / layer, steps_of(ours)[12] / layer)
    shutil.copyfile(steps_of(theirs)[8] / layer, steps_of(ours)[8] / layer)
    found = wrong(checked(ours))
    assert found == {8: f"spliced from elsewhere: {layer}", 12: f"spliced from step 4: {layer}"}


OPTIMIZERS = {
    "adamw": (),
    "adamw 0.999": ("optimizer.betas=[0.9,0.999]",),
    "adamw, fast": ("optimizer.lr=0.03",),
    "lion": ("optimizer.name=lion", "optimizer.lr=0.0005"),
    "muon": ("optimizer.name=muon",),
    "adafactor": ("optimizer.name=adafactor", "optimizer.lr=0.01"),
    "sgd": ("optimizer.name=sgd", "optimizer.lr=0.1"),
}
OTHERS = {style: (f"schedule.style={style}",) for style in ("constant", "linear", "exponential", "wsd", "inverse_sqrt")}
OTHERS |= {dtype: (f"precision.compute={dtype}",) for dtype in ("bf16", "fp16")}
OTHERS |= {
    "skips": ("train.steps=40", "watch.window=8", "watch.threshold=0.5", "watch.policy=skip"),
    "rewinds": (
        "train.steps=40", "watch.window=8", "watch.threshold=0.5", "watch.policy=rewind", "watch.back=2",
        "checkpoint.every=2",
    ),
    "few steps": ("checkpoint.every=8", "checkpoint.log_base=2", "checkpoint.log_until=8", "train.steps=40"),
    "groups": ("optimizer.groups=[{match: norm, lr_scale: 3.0}, {match: head, weight_decay: 0.0}]",),
    "layer decay": ("optimizer.layer_decay=0.5",),
    "no clipping": ("optimizer.name=sgd", "optimizer.clip_norm=null"),
    "frozen": ("finetune.freeze=[embed]",),
    "slow": ("optimizer.lr=1e-7",),
}  # fmt: skip


def test_a_run_that_is_right_is_fine(sources):
    found = checked(sources[0])
    assert wrong(found) == {}
    assert [report.step for report in found.reports] == list(range(21))
    assert found.is_fine and found.unknown == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*OPTIMIZERS, *OTHERS])
def test_every_kind_of_run_that_is_right_is_fine(trained, tmp_path, kind):
    run = trained(*(OPTIMIZERS | OTHERS)[kind])
    assert wrong(checked(run)) == {}
    if kind not in ("skips", "rewinds"):  # of which weights alone say that two steps are equal
        assert wrong(checked(exported(run, tmp_path / "hf", "hf", torch.float32, False))) == {}
    if kind in ("skips", "rewinds"):
        assert any(event["event"] == "spike" for event in read_events(run))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("to", ["hf", "neox", "megatron-deepspeed"])
def test_every_format_of_a_run_that_is_right_is_fine(trained, tmp_path, to, dtype):
    overrides = ("model.position=learned", "model.tie_embeddings=true") if to == "megatron-deepspeed" else ()
    series = exported(trained(*overrides), tmp_path / "series", to, dtype, True)
    assert wrong(checked(series)) == {}
    assert wrong(checked(series, quick=True)) == {}


@pytest.mark.slow
def test_formats_may_differ_within_a_series(sources, tmp_path):
    folders = [exported(sources[0], tmp_path / to, to, torch.float32, True) for to in ("hf", "neox")]
    own = steps_of(sources[0])
    mixed = [(own if step % 3 == 0 else steps_of(folders[step % 3 - 1]))[step] for step in own]
    found = check_series(find_series(mixed))
    assert wrong(found) == {}
    assert len(found.reports) == 21


@pytest.mark.slow
def test_a_restart_with_another_rate_and_a_fresh_optimizer_is_fine(corpus, tmp_path):
    from castalia.config.load import load_config
    from castalia.train.loop import train
    from tests.series.conftest import settings

    run = tmp_path / "run"
    begun = [*settings(corpus), f"checkpoint.dir={run}"]
    train(load_config([], [*begun, "train.exit_interval=7"]))
    again = ["optimizer.lr=0.01", "checkpoint.schedule_from=config", "checkpoint.load_optimizer=false"]
    train(load_config([], [*begun, f"checkpoint.resume={run}", *again, "checkpoint.every=3"]))
    assert wrong(checked(run)) == {}
    assert wrong(checked(run / "checkpoints")) == {}


def test_a_config_bounds_what_weights_alone_leave_open(copy, in_weights_alone, sources):
    series = copy(in_weights_alone[0])
    changes.taken_from(steps_of(series)[1], steps_of(in_weights_alone[2])[1])
    assert any("no config" in line for line in checked(series).unknown)
    found = checked(series, against=str(sources[0]))
    assert wrong(found) == {1: "not a continuation"}
    fact = next(report for report in found.reports if report.step == 1).worst
    assert fact is not None and fact.certain and "can reach" in fact.text


def test_a_quick_check_finds_copies_and_strangers(copy, sources):
    series = copy(sources[0])
    changes.copied_whole(steps_of(series)[12], steps_of(series)[4])
    changes.taken_from(steps_of(series)[8], steps_of(sources[1])[8])
    assert wrong(checked(series, quick=True)) == {8: "not a continuation", 12: "duplicate of step 4"}


def test_another_model_is_told(copy, sources, trained):
    series, other = copy(sources[0]), trained("model.hidden_size=16", "train.steps=3")
    changes.copied_whole(steps_of(series)[3], steps_of(other)[3])
    assert wrong(checked(series)) == {3: "not a continuation"}
