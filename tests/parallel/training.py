"""What the workers of the pool run: the real session, step by step, and what each rank then says of itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

from castalia.config.schema import RunConfig
from castalia.train.setup import Session, start

Piece = tuple[str, tuple[int, ...]]  # a tensor's name, and where in it the piece begins


class Seen(NamedTuple):
    """What a rank saw of some steps."""

    losses: list[float]
    norms: list[float]
    scales: list[float]  # fp16 loss scale after each step
    applied: list[bool]
    tokens: dict[int, bytes]  # row of the first step's batch -> its tokens
    first: list[tuple[Piece, np.ndarray]]  # weights before the first step
    digests: list[dict[Piece, str]]  # of the weights after each step


def same_for_all(overrides: Iterable[str]) -> list[str]:
    """Overrides that one process shares."""
    return [override for override in overrides if not override.startswith("parallel.")]


def train_steps(config: RunConfig, steps: int = 10, poisoned: tuple[int, int, float] | None = None) -> Seen:
    """`poisoned`: rank, step and a factor for the activations of its first block in that step."""
    session = start(config)
    seen = Seen([], [], [], [], rows_of_first_batch(session), pieces(session), [])
    factor = 1.0
    if poisoned and session.executor.rank in (poisoned[0], 0 if session.executor.world == 1 else poisoned[0]):
        block = next(iter(session.executor.models[0].blocks.values()))
        block.register_forward_hook(lambda module, inputs, output: output * factor)
    for step in range(session.progress.step, session.progress.step + steps):
        factor = poisoned[2] if poisoned and step == poisoned[1] else 1.0
        result = session.step(step, session.batch(step))
        seen.losses.append(result.loss)
        seen.norms.append(result.grad_norm)
        seen.applied.append(result.applied)
        seen.scales.append(session.step.scaler.scale if session.step.scaler else 1.0)
        seen.digests.append({piece: digest(value) for piece, value in pieces(session)})
    return seen


def rows_of_first_batch(session: Session) -> dict[int, bytes]:
    rows = session.plan.rows_of(session.executor.data_rank)
    tokens = session.batch(session.progress.step).tokens.reshape(len(rows), -1)  # of pairs both sides
    return {row: sequence.tobytes() for row, sequence in zip(rows, tokens, strict=True)}


def pieces(session: Session) -> list[tuple[Piece, np.ndarray]]:
    """Every piece of every parameter on this rank, the second copy of a tied embedding too."""
    executor = session.executor
    every = [*executor.parameters.items(), *executor.duplicates.items()]
    for model in executor.models:
        if model.cfg.tie_embeddings and model.embed is not None:
            assert model.head is None and model.head_weight is model.embed.weight
    found = []
    for name, parameter in every:
        part = executor.part(parameter)
        found.append(((name, part.start), part.local.to(torch.float32).numpy().copy()))
    return found


def digest(value: np.ndarray) -> str:
    return hashlib.blake2b(value.tobytes(), digest_size=12).hexdigest()


def assembled(ranks: list[Seen]) -> dict[str, Any]:
    """Whole tensors from all ranks' first pieces; a piece held by several must be the same everywhere."""
    whole: dict[str, dict[tuple[int, ...], np.ndarray]] = {}
    for rank in ranks:
        for (name, begin), value in rank.first:
            if value.size:
                known = whole.setdefault(name, {}).setdefault(begin, value)
                assert np.array_equal(known, value), f"{name} at {begin} is not the same on all ranks"
    return whole


def assert_copies_are_equal(ranks: list[Seen]) -> None:
    """After every step each piece that several ranks hold has the same bits on all of them."""
    for step in range(len(ranks[0].digests)):
        known: dict[Piece, str] = {}
        for rank, seen in enumerate(ranks):
            for piece, value in seen.digests[step].items():
                assert known.setdefault(piece, value) == value, f"step {step}: {piece} on rank {rank} differs"
