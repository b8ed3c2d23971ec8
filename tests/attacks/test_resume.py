"""A run that was stopped and goes on is the run that never stopped, for whatever optimizer, precision and layout.

`make test` and `make test-slow` draw a few combinations with a seed, `make campaign` tries all of them.
"""

from __future__ import annotations

import random
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from castalia.config.load import load_run
from castalia.train.loop import train
from castalia.train.setup import Session, start
from tests.attacks.scenes import TINY, Theatre, differences, snapshot

OPTIMIZERS = ("adamw", "lion", "sgd", "adafactor", "muon")
PRECISIONS = ("fp32", "bf16", "fp16")
LAYOUTS = {
    "1": (),
    "dp": (), "zero 1": ("parallel.zero=1",), "zero 2": ("parallel.zero=2",), "zero 3": ("parallel.zero=3",),
    "tp": ("parallel.tp=2",), "pp": ("parallel.pp=2",), "cp": ("parallel.cp=2",),
}  # fmt: skip
ALL = list(product(OPTIMIZERS, PRECISIONS, LAYOUTS))
DRAWN = random.Random(18).sample([each for each in ALL if each[2] != "1"], 12)


def play(theatre: Theatre, optimizer: str, precision: str, layout: str) -> None:
    """Six steps at once, and three and three, saved and read by as many ranks."""
    ranks = 1 if layout == "1" else 2
    words = ["train", *TINY, f"optimizer.name={optimizer}", f"precision.compute={precision}", *LAYOUTS[layout]]
    words += ["train.micro_batch_size=null", "model.hidden_dropout=0.1", "checkpoint.every=3", "checkpoint.dir=run"]
    theatre.set_up(())
    done = theatre.stage.run(words, theatre.work, ranks=ranks)
    if done.code == 2:
        pytest.skip(f"{optimizer}, {precision}, {layout}: refused: {done.said.strip().splitlines()[-1]}")
    assert done.code == 0, done.said
    straight = without_exit(theatre.work)
    theatre.set_up(())
    theatre.play([*words, "train.exit_interval=3"], ranks)
    theatre.play(["train", "run", "train.exit_interval=null"], ranks)
    assert differences(straight, without_exit(theatre.work)) == []


def without_exit(folder: Path) -> dict[str, str]:
    """The manifest of step 3 tells of train.exit_interval."""
    return {path: digest for path, digest in snapshot(folder).items() if "step_000003/manifest" not in path}


@pytest.mark.parametrize("optimizer, precision, layout", DRAWN[:1])
def test_stopped_is_never_stopped(theatre, optimizer, precision, layout):
    play(theatre, optimizer, precision, layout)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer, precision, layout", DRAWN[1:])
def test_stopped_is_never_stopped_in_more_layouts(theatre, optimizer, precision, layout):
    play(theatre, optimizer, precision, layout)


@pytest.mark.campaign
@pytest.mark.parametrize("optimizer, precision, layout", ALL)
def test_stopped_is_never_stopped_in_all(theatre, optimizer, precision, layout):
    play(theatre, optimizer, precision, layout)


def found_in(session: Session, step: int) -> dict[str, Any]:
    """All that the next update depends on."""
    found: dict[str, Any] = {f"weight {name}": value.detach() for name, value in session.executor.parameters.items()}
    for name, parameter in session.executor.parameters.items():
        for kind, value in session.optimizer.state[parameter].items():
            found[f"{kind} {name}"] = value
    for number, group in enumerate(session.optimizer.param_groups):
        found |= {f"{kind} of group {number}": value for kind, value in group.items() if kind not in ("params", "lr")}
    found["rate"] = session.step.rate(step)
    found["tokens"] = torch.as_tensor(session.batch(step).tokens)
    found["loss scale"] = session.step.scaler.state() if session.step.scaler else None
    found["skipped"], found["plan"] = session.step.skipped, session.plan_at(step)
    sections = ("model", "optimizer", "schedule", "precision", "parallel", "finetune")
    return found | {name: getattr(session.config, name) for name in sections}


@pytest.mark.parametrize("optimizer, precision", [("adamw", "fp16"), ("muon", "bf16")])
def test_before_the_first_update_all_is_as_it_was(tiny, tmp_path: Path, optimizer: str, precision: str):
    """Exactly; and then the update, with dropout, which depends on nothing else."""
    words = [f"optimizer.name={optimizer}", f"precision.compute={precision}", "model.hidden_dropout=0.1"]
    config = tiny(tmp_path / "run", *words, "eval.every=null")
    train(config.model_copy(update={"train": config.train.model_copy(update={"exit_interval": 3})}))
    never = start(config)
    for step in range(3):
        never.step(step, never.batch(step))
    resumed = start(load_run(tmp_path / "run"))
    for updates in (0, 1):
        left, right = found_in(never, 3 + updates), found_in(resumed, 3 + updates)
        assert left.keys() == right.keys()
        for name, value in left.items():
            same = torch.equal(value, right[name]) if isinstance(value, torch.Tensor) else value == right[name]
            assert same, f"{name} after {updates} updates"
        one, other = (session.step(3 + updates, session.batch(3 + updates)) for session in (never, resumed))
        assert (one.loss, one.grad_norm, one.lr) == (other.loss, other.grad_norm, other.lr)
