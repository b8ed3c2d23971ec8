"""Compiled blocks train like eager ones, in every layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from castalia.errors import ConfigError
from castalia.parallel import compile
from tests.parallel.training import Seen, assert_copies_are_equal, train_steps

pytestmark = pytest.mark.xdist_group("pool")

LAYOUTS = {
    "one process": (1, []),
    "dp2 zero0": (2, []),
    "zero1": (2, ["parallel.zero=1"]),
    "zero2": (2, ["parallel.zero=2"]),
    "zero3": (2, ["parallel.zero=3"]),
    "tp2": (2, ["parallel.tp=2"]),
    "tp2 zero3": (4, ["parallel.tp=2", "parallel.zero=3"]),
    "tp2 sequence": (2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    "pp2": (2, ["parallel.pp=2"]),
    "pp2 zero-bubble": (2, ["parallel.pp=2", "parallel.pipeline=zero-bubble"]),
    "cp2": (2, ["parallel.cp=2"]),
    "cp2 ulysses": (2, ["parallel.cp=2", "parallel.cp_kind=ulysses"]),
    "recomputed": (2, ["parallel.zero=3", "train.recompute=selective"]),
}

SOME = ("one process", "zero3", "tp2 sequence", "pp2")


def compiled_steps(config, steps: int) -> tuple[Seen, int]:
    """What a rank saw, and how many graphs were compiled for it."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    seen = train_steps(config, steps)
    return seen, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in SOME else pytest.param(name, marks=pytest.mark.grid) for name in LAYOUTS]
)
def test_compiled_blocks_train_like_eager_ones(pool, tiny, name):
    world, layout = LAYOUTS[name]
    eager = pool.run(train_steps, world, tiny("neox-parallel", *layout), 3)
    answers = pool.run(compiled_steps, world, tiny("neox-parallel", *layout, "train.compile=true"), 3)
    compiled = [seen for seen, _ in answers]
    np.testing.assert_allclose(compiled[0].losses, eager[0].losses, rtol=2e-6)
    np.testing.assert_allclose(compiled[0].norms, eager[0].norms, rtol=2e-6)
    assert_copies_are_equal(compiled)
    assert all(1 <= graphs <= 2 for _, graphs in answers), "the blocks do not share their graph"


def test_without_a_compiler_compiling_is_refused(tiny, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="train.compile=true needs a C.. compiler"):
        compile.compile_blocks(torch.nn.Module(), tiny("neox-parallel", "train.compile=true"), torch.device("cpu"))
