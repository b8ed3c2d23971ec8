"""Statistics of layers are those of the whole model, however it is split."""

from __future__ import annotations

import json

import pytest

from castalia.observe.layer_stats import dead_units
from castalia.train.loop import train
from castalia.train.setup import start

pytestmark = pytest.mark.xdist_group("pool")


def layers_of_a_run(config):
    """A task: the whole run, as `castalia train` does it."""
    train(config)


def dead_after_a_step(config):
    """A task: dead units, where the first five of a block's have weights that ReLU never lets through."""
    session = start(config)
    for name, parameter in session.executor.parameters.items():
        part = session.executor.part(parameter)
        if name == "blocks.1.mlp.up.bias":
            part.local[: max(0, 5 - part.start[0])] = -100.0
    session.step.gradients(0, session.batch(0))
    return dead_units(session.executor)


@pytest.mark.parametrize(
    "world, layout",
    [
        (2, ["parallel.tp=2"]),
        (2, ["parallel.pp=2"]),
        (2, ["parallel.zero=1"]),
        pytest.param(4, ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.cp=2"], marks=pytest.mark.slow),
        pytest.param(4, ["parallel.pp=2", "parallel.zero=3"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_layers_are_those_of_one_process(pool, tiny, tmp_path, world, layout):
    options = ["log.layers_every=2", "train.exit_interval=2", "eval.batches=0", "optimizer.clip_norm=0.1"]
    records = []
    for ranks, more in ((1, []), (world, layout)):
        folder = tmp_path / str(ranks)
        pool.run(layers_of_a_run, ranks, tiny("gpt2-tied", *options, f"checkpoint.dir={folder}", *more))
        records.append(json.loads((folder / "layers.jsonl").read_text()))
    one, many = records
    assert list(one) == list(many) and many["step"] == 2
    for kind in ("activations", "gradients", "weights"):
        assert list(one[kind]) == list(many[kind])
        for name, numbers in one[kind].items():
            found, zeros = many[kind][name], 0.0
            if kind == "gradients":  # keys' biases have gradients that are all rounding, to zero or nearly
                zeros = found.pop("zeros") - numbers.pop("zeros")
            assert found == pytest.approx(numbers, rel=1e-4), (kind, name)
            assert abs(zeros) < 0.05, (kind, name)


def test_dead_units_are_counted_once(pool, tiny):
    relu = ["model.activation=relu", "model.hidden_size=32"]
    one = pool.run(dead_after_a_step, 1, tiny("gpt2-tied", *relu))[0]
    assert one["blocks.1.mlp.up.weight"] >= 5
    for layout in (["parallel.tp=2", "parallel.zero=1"], ["parallel.pp=2"]):
        assert pool.run(dead_after_a_step, 4, tiny("gpt2-tied", *relu, *layout)) == [one] * 4
