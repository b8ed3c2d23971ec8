"""Compiled blocks train like eager ones, in every layout."""

from __future__ import annotations

from functools import partial

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


EXPERTS = {
    "one process": (1, "balanced", []),
    "bf16": (1, "experts", ["precision.compute=bf16"]),
    "tp2": (2, "experts", ["parallel.tp=2"]),
    "tp2 sequence": (2, "balanced", ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    "expert2 zero3": (2, "balanced", ["parallel.expert=2", "parallel.zero=3"]),
    "pp2 zero-bubble": (2, "experts", ["model.num_layers=4", "parallel.pp=2", "parallel.pipeline=zero-bubble"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERTS)
def test_blocks_with_experts_are_compiled_in_every_layout(pool, tiny, name):
    world, family, words = EXPERTS[name]
    # Gradients of next to nothing become whole steps of Adam, up or down, unless eps is larger than they are.
    words = ["model.num_layers=2", "optimizer.eps=1e-6", *words]
    eager = pool.run(train_steps, world, tiny(family, *words), 3)
    answers = pool.run(compiled_steps, world, tiny(family, *words, "train.compile=true"), 3)
    compiled = [seen for seen, _ in answers]
    near = 2e-3 if "precision.compute=bf16" in words else 2e-6
    np.testing.assert_allclose(compiled[0].losses, eager[0].losses, rtol=near)
    np.testing.assert_allclose(compiled[0].norms, eager[0].norms, rtol=5 * near)
    assert_copies_are_equal(compiled)
    assert all(graphs >= 1 for _, graphs in answers), "nothing was compiled"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_blocks_are_compiled_around_their_experts(tiny, monkeypatch, precision):
    """Traced as for every backend, without the wait for a C++ compiler."""
    words = ["model.num_layers=2", "optimizer.eps=1e-6", f"precision.compute={precision}"]
    eager = train_steps(tiny("balanced", *words), 2)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    compiled, graphs = compiled_steps(tiny("balanced", *words, "train.compile=true"), 2)
    np.testing.assert_allclose(compiled.losses, eager.losses, rtol=2e-6 if precision == "fp32" else 2e-3)
    assert graphs >= 3  # the block without experts, and both parts of the other


def test_without_a_compiler_compiling_is_refused(tiny, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="train.compile=true needs a C.. compiler"):
        compile.compile_blocks(torch.nn.Module(), tiny("neox-parallel", "train.compile=true"), torch.device("cpu"))
