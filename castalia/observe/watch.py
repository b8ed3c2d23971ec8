"""What a run does about spikes of its loss, and how it finds the first tensor that is not finite.

The policy (`watch.policy`) lies here in full: `Watch.decide` says what becomes of each step whose gradients are
complete, `Watch.rewind_target` which checkpoint a rewinding run returns to. The training loop carries it out.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from castalia.checkpoint.formats.native.read import saved_steps
from castalia.config.schema import WatchConfig
from castalia.config.tensor_table import block_of
from castalia.data.indexed import open_dataset
from castalia.data.loader import Samples
from castalia.data.pairs import Pairs
from castalia.data.tokenizer import Tokenizer
from castalia.errors import TrainingError
from castalia.observe.layer_stats import dead_units, expert_shares, tensor_statistics
from castalia.observe.metrics import read_events
from castalia.observe.update_history import history_before
from castalia.parallel.executor import Executor

SPREAD = 1.4826 / math.sqrt(2)  # of normal noise: standard deviation / median change from value to value
LEAST_SPREAD = {"loss": 0.01, "grad_norm": 0.1}  # of logarithms, so that calm runs do not report every change
EXCERPT_TOKENS = 32
SLOWER = 1.5  # times the usual seconds of a step
EASED = 1.2  # times the usual seconds: no longer slow
SLOW_STEPS = 5
EARLY_JUMP = 2.0  # of the loss, in nats, above the last steps: more than any warm-up's noise
EARLY_STEPS = 5
MAX_REWINDS = 3  # to one and the same checkpoint
Action = Literal["apply", "skip", "rewind", "stop"]  # what becomes of a step's update; all but "apply" leave it out
ACTIONS = {
    "report": "its update is applied anyway",
    "stop": "stopping before its update",
    "skip": "its update is left out",
    "rewind": "going back",
}


class Finding(NamedTuple):
    """Which values of a step are unusual, and what is usual."""

    what: tuple[str, ...]  # of "loss", "grad_norm"
    usual: dict[str, float]


class Spikes:
    """Compares loss and gradient norm with the medians of the steps before. All ranks have the same values.

    The values that it remembers are part of a checkpoint, so that a resumed run decides like one that never stopped.
    """

    def __init__(self, cfg: WatchConfig, stored: Mapping[str, Sequence[float]] | None = None) -> None:
        self.cfg = cfg
        self.seen = {name: deque((stored or {}).get(name, ()), maxlen=cfg.window) for name in LEAST_SPREAD}

    def look(self, loss: float, norm: float) -> Finding | None:
        """What is unusual about these values; None if nothing is. Values that are not finite always are."""
        values = {"loss": loss, "grad_norm": norm}
        usual = {name: median(seen) for name, seen in self.seen.items() if seen}
        what = tuple(name for name, value in values.items() if self._is_spike(name, value))
        return Finding(what, usual) if what else None

    def _is_spike(self, name: str, value: float) -> bool:
        if not math.isfinite(value):
            return True
        if 2 * len(self.seen[name]) < self.cfg.window:  # too few steps to know what is usual
            recent = list(self.seen[name])[-EARLY_STEPS:]
            return name == "loss" and bool(recent) and value > median(recent) + EARLY_JUMP
        logs = [_log(seen) for seen in self.seen[name]]
        # Changes from step to step, because the trend of a falling loss would inflate a variance.
        changes = [abs(after - before) for before, after in itertools.pairwise(logs)]
        spread = max(SPREAD * median(changes), LEAST_SPREAD[name])
        return _log(value) > median(logs) + self.cfg.threshold * spread

    def remember(self, loss: float, norm: float) -> None:
        """Counts a step whose update was applied; skipped ones say nothing about what is usual."""
        self.seen["loss"].append(loss)
        self.seen["grad_norm"].append(norm)

    def stored(self) -> dict[str, list[float]]:
        """What a checkpoint keeps."""
        return {name: list(values) for name, values in self.seen.items()}


def _log(value: float) -> float:
    return math.log(max(value, 1e-30))


class PaceChange(NamedTuple):
    """Steps have become slow, or are no longer."""

    slow: bool
    seconds: float  # of recent steps
    usual: float  # seconds of the steps before


class StepPace:
    """Notices when steps begin to take longer than usual, and when that is over."""

    def __init__(self, window: int) -> None:
        self.seconds: deque[float] = deque(maxlen=window)
        self.usual: float | None = None  # while steps are slow: the seconds of those before

    def look(self, seconds: float) -> PaceChange | None:
        """Given a step's seconds: what has changed with it, if anything."""
        self.seconds.append(seconds)
        # Medians, so that a single slow step, such as one that saves, counts for nothing.
        if 2 * len(self.seconds) < self.seconds.maxlen:  # type: ignore[operator]
            return None
        now = median(list(self.seconds)[-SLOW_STEPS:])
        if self.usual is None:
            usual = median(self.seconds)
            if now <= SLOWER * usual:
                return None
            self.usual = usual
            return PaceChange(True, now, usual)
        # A lower threshold than that of the beginning, so that a pace about it is told of once.
        if now > EASED * self.usual:
            return None
        usual, self.usual = self.usual, None
        return PaceChange(False, now, usual)


class Watch:
    """Decides about each step once its gradients are complete, and writes down what was unusual about it.

    Every method is called on all ranks together and has the same result on all of them.
    """

    def __init__(
        self,
        cfg: WatchConfig,
        executor: Executor,
        data: Samples | Pairs,
        tokenizer: Tokenizer | None,
        stored: Mapping[str, Sequence[float]] | None,
        event: Callable[..., None],
        say: Callable[[str], None],
    ) -> None:
        """`event` writes down an event's name and facts; `stored`: what the checkpoint says of earlier steps."""
        self.cfg, self.executor, self.data, self.tokenizer = cfg, executor, data, tokenizer
        self.event, self.say = event, say
        self.spikes = Spikes(cfg, stored)
        self.dead: dict[str, int] = {}
        self.dead_experts: dict[str, list[int]] = {}
        self.rewinds: Counter[int] = Counter()  # by the step returned to

    def decide(self, step: int, loss: float, norm: float, loss_scale: float | None) -> Action:
        """What becomes of the update of a step (from 1), given its loss and gradient norm.

        An fp16 overflow (`loss_scale` is set) is skipped under every policy. Any other loss or norm that is not finite
        counts as a spike, but the policies `report` and `stop` have no remedy for it: they let the update go ahead, and
        `TrainStep.apply` ends the run with the name of the first bad tensor.
        """
        if self.cfg.dead_every and step % self.cfg.dead_every == 0:
            self._look_for_dead_units(step)
        finite, policy = math.isfinite(loss) and math.isfinite(norm), self.cfg.policy
        if not finite and loss_scale:
            self._tell("overflow", step, loss, norm, loss_scale, loss_scale=loss_scale)
            return "skip"
        finding = self.spikes.look(loss, norm)
        if finite and (finding is None or policy == "report"):
            self.spikes.remember(loss, norm)
        if finding is None or (not finite and policy in ("report", "stop")):
            return "apply"
        self._tell("spike", step, loss, norm, loss_scale, what=finding.what, usual=finding.usual, action=policy)
        self.say(f"step {step}: {describe(finding, loss, norm)}; {ACTIONS[policy]}; its data are in events.jsonl")
        return "apply" if policy == "report" else policy

    def rewind_target(self, run: Path, step: int) -> Path:
        """The checkpoint in a run's folder that a spike at `step` goes back to: of those that led to it, the
        `watch.back`-th newest, or the oldest where there are fewer.

        Raises TrainingError where none is left, or where returning to it has not helped MAX_REWINDS times.
        """
        on_disk = saved_steps(run / "checkpoints")
        saved = [number for number in history_before(read_events(run), step).saved if number in on_disk]
        newest = [(number, on_disk[number]) for number in saved[-self.cfg.back :]]
        targets = self.executor.gather(newest)[0]  # as the first rank sees the disk; other machines' views may lag
        if not targets:
            raise TrainingError(
                f"step {step} is a spike, but no checkpoint of this run is left to go back to; save more often "
                "(checkpoint.every, checkpoint.steps=[0]), or set watch.policy=skip"
            )
        back_to, checkpoint = targets[0]
        self.rewinds[back_to] += 1
        if self.rewinds[back_to] > MAX_REWINDS:
            raise TrainingError(
                f"step {step} is a spike, and going back to step {back_to} did not help {MAX_REWINDS} times: these "
                "data alone are not the cause. Go further back (watch.back), or lower optimizer.lr"
            )
        return checkpoint

    def restore(self, stored: Mapping[str, Sequence[float]] | None) -> None:
        """Takes up what a checkpoint remembers of the steps before it."""
        self.spikes = Spikes(self.cfg, stored)

    def _tell(self, event: str, step: int, loss: float, norm: float, scale: float | None, **facts: Any) -> None:
        # All ranks compute the statistics; only the first one, which writes the event, looks up the data.
        layers = tensor_statistics(self.executor, scale or 1.0)
        data = data_of_step(self.data, self.tokenizer, step - 1) if self.executor.rank == 0 else {}
        self.event(event, step=step, loss=loss, grad_norm=norm, **facts, **data, **layers)

    def _look_for_dead_units(self, step: int) -> None:
        dead = dead_units(self.executor)
        if any(count > self.dead.get(name, 0) for name, count in dead.items()):
            self.event("dead units", step=step, units=dead)
            self.say(f"step {step}: {sum(dead.values())} MLP units in {len(dead)} layers get no gradient")
        self.dead = dead
        idle = {
            name: experts
            for name, shares in expert_shares(self.executor).items()
            if (experts := [number for number, share in enumerate(shares) if not share])
        }
        if idle and idle != self.dead_experts:
            self.event("dead experts", step=step, experts=idle)
            self.say(f"step {step}: {sum(map(len, idle.values()))} experts in {len(idle)} layers get no token")
        self.dead_experts = idle


def describe(finding: Finding, loss: float, norm: float) -> str:
    """The unusual values of a step in words, with the usual ones."""
    values = {"loss": loss, "grad_norm": norm}
    usual = (f" (usually {finding.usual[name]:.4g})" if name in finding.usual else "" for name in finding.what)
    return " and ".join(
        f"{name.replace('grad_norm', 'gradient norm')} {values[name]:.4g}{known}"
        for name, known in zip(finding.what, usual, strict=True)
    )


def data_of_step(data: Samples | Pairs, tokenizer: Tokenizer | None, step: int) -> dict[str, Any]:
    """What a step (from 0) trains on: positions in the data order, pieces of documents, and the beginnings of their
    texts, of EXCERPT_TOKENS tokens each."""
    positions = data.positions(step).tolist()
    pieces = [piece for position in positions for piece in data.pieces(position)]
    facts: dict[str, Any] = {"samples": positions, "pieces": [[*piece] for piece in pieces]}
    if tokenizer is not None:
        corpora = {prefix: open_dataset(prefix) for prefix in {piece.prefix for piece in pieces}}
        begins = [corpora[prefix][document][start:stop][:EXCERPT_TOKENS] for prefix, document, start, stop in pieces]
        facts["texts"] = [tokenizer.decode(tokens.tolist()) for tokens in begins]
    return facts


class Cause(NamedTuple):
    """What went wrong on a rank. Causes compare by their order: the smallest of all ranks' came first."""

    order: tuple[int, int, int]
    what: str


def first_cause(executor: Executor, loss: float, again: Callable[[], object]) -> Cause:
    """The first tensor that is not finite, in the order of cause and effect: parameters, loss, gradients.

    `again` computes the step once more, so that its activations can be observed.
    """

    def is_finite(tensor: Tensor) -> bool:
        return bool(executor.local(tensor).isfinite().all())

    parameters = [named for model in executor.models for named in model.named_parameters()]
    gradients = {name: parameter.grad for name, parameter in reversed(parameters)}  # in the order of the backward pass
    bad = next((name for name, grad in gradients.items() if grad is not None and not is_finite(grad)), None)
    with first_bad_activation(executor.models, is_finite) as bad_modules:
        again()
    for name, parameter in parameters:
        if not is_finite(parameter):
            return Cause((0, 0, 0), f"the parameter {name}")
    if bad_modules and not math.isfinite(loss):
        block, done, module = bad_modules[0]
        return Cause((1, block, done), f"the loss, after the output of {module}")
    if not math.isfinite(loss):
        return Cause((2, 0, 0), "the loss")
    if bad:
        return Cause((3, 0, 0), f"the gradient of {bad}")
    return Cause((4, 0, 0), "none by itself: the norm of all gradients overflows")


@contextmanager
def first_bad_activation(
    models: Sequence[nn.Module], is_finite: Callable[[Tensor], bool]
) -> Iterator[list[tuple[int, int, str]]]:
    """Watches forward passes; afterwards the list holds the first module whose output is not finite, or nothing.

    The module is given by its block (-1 before the first), the number of modules computed before it, and its name.
    """
    bad_modules: list[tuple[int, int, str]] = []
    calls = itertools.count()

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            done = next(calls)
            if not bad_modules and isinstance(output, Tensor) and not is_finite(output):
                bad_modules.append((block_of(name), done, name))

        return hook

    named = [(name, module) for model in models for name, module in model.named_modules() if name]
    handles = [module.register_forward_hook(look(name)) for name, module in named]
    try:
        yield bad_modules
    finally:
        for handle in handles:
            handle.remove()
