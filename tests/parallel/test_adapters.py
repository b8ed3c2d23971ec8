"""Adapters and frozen tensors on several ranks: the same numbers as on one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from castalia.checkpoint.opener import open_checkpoint
from castalia.config.schema import MambaConfig, ModelConfig
from castalia.errors import ConfigError
from castalia.train.loop import train
from tests.checkpoint.made import made, written
from tests.parallel.training import assembled, assert_copies_are_equal, train_steps

pytestmark = pytest.mark.xdist_group("pool")
SLOW = pytest.mark.slow

SIZES = {"num_layers": 4, "hidden_size": 32, "num_heads": 4, "vocab_size": 257, "vocab_multiple": 16}
MODELS = {
    "neox": ModelConfig(**SIZES, rotary_pct=0.5, parallel_residual=True),
    "llama": ModelConfig(
        **SIZES, num_kv_heads=2, norm="rmsnorm", gated_mlp=True, activation="silu", attention_bias=False, mlp_bias=False
    ),
    "mamba": ModelConfig(**SIZES, pattern=("mamba", "attention"), norm="rmsnorm", mamba=MambaConfig(linear_bias=True)),
    "rwkv": ModelConfig(**SIZES, pattern=("rwkv",)),
    "tied": ModelConfig(**SIZES, position="learned", tie_embeddings=True, max_positions=16),
}
LORA = ["finetune.lora.rank=3", "optimizer.lr=0.02"]
STEADY = [*LORA, "optimizer.eps=1e-6"]  # gradients of next to nothing would become whole steps of Adam
WITH_HEAD = [*LORA, 'finetune.lora.targets=["attn.qkv", "attn.out", "mlp.down", "head"]']
HEAD = ['finetune.train=["^head"]']
LAST = ['finetune.train=["^blocks.3"]', "optimizer.clip_norm=0.01"]
TOP = ['finetune.train=["^blocks.[23]", "^norm", "^embed"]', "optimizer.layer_decay=0.7"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, corpus):
    """A function: model and overrides -> config of ten steps that begin from its random weights."""
    from castalia.config.load import load_config

    folder = tmp_path_factory.mktemp("bases")
    for name, model in MODELS.items():
        written(made(model, optimizer=False), folder / name, "native")

    def config(model, *overrides):
        source = f'data.train=[{{"path": "{corpus / "text"}", "labels": "{corpus / "labels"}"}}]'
        fixed = ["data.seq_length=16", "tokenizer.kind=bytes", "precision.compute=fp32", "optimizer.lr=0.003"]
        fixed += ["train.steps=10", "train.batch_size=16", "train.accumulation=4", "log.peak_tflops=0.1"]
        return load_config([], [f"checkpoint.init_from={folder / model}", source, *fixed, *overrides])

    return config


@pytest.mark.parametrize(
    ("model", "what", "layout"),
    [
        ("neox", LORA, ["parallel.tp=2"]),
        pytest.param("llama", WITH_HEAD, ["parallel.tp=2", "parallel.sequence_parallel=true"], marks=SLOW),
        ("mamba", LORA, ["parallel.tp=2"]),
        pytest.param("rwkv", STEADY, ["parallel.tp=2", "parallel.sequence_parallel=true"], marks=SLOW),
        ("neox", WITH_HEAD, ["parallel.zero=3"]),
        ("llama", LORA, ["parallel.pp=2"]),
        pytest.param(
            "tied", LORA, ["parallel.pp=2", "parallel.pipeline=zero-bubble", "train.accumulation=8"], marks=SLOW
        ),
        ("neox", [*HEAD, 'optimizer.groups=[{"match": "^head", "lr_scale": 0.5}]'], ["parallel.pp=2"]),
        ("neox", LAST, ["parallel.pp=2"]),  # the first stage trains nothing, and every step is clipped
        pytest.param("neox", HEAD, ["parallel.zero=3"], marks=SLOW),
        pytest.param("neox", HEAD, ["parallel.tp=2"], marks=SLOW),
        pytest.param("tied", TOP, ["parallel.zero=1", "parallel.tp=2"], marks=SLOW),
        pytest.param(
            "neox",
            [*WITH_HEAD, "train.recompute=full"],
            ["parallel.tp=2", "parallel.pp=2", "parallel.zero=2"],
            marks=SLOW,
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else value,
)
def test_every_layout_trains_like_one_process(pool, tuned, model, what, layout):
    world = (
        4 if len([key for key in layout if key.startswith(("parallel.tp", "parallel.pp", "parallel.zero"))]) > 1 else 2
    )
    ranks = pool.run(train_steps, world, tuned(model, *what, *layout))
    one = pool.run(train_steps, 1, tuned(model, *what))[0]
    np.testing.assert_allclose(ranks[0].losses, one.losses, rtol=5e-6)
    np.testing.assert_allclose(ranks[0].norms, one.norms, rtol=2e-5)
    assert one.losses[-1] != one.losses[0]
    assert_copies_are_equal(ranks)
    first, same = assembled(ranks), assembled([one])
    assert first.keys() == same.keys()


@SLOW
def test_layouts_begin_with_the_same_adapters(pool, tuned):
    ranks = pool.run(train_steps, 4, tuned("llama", *WITH_HEAD, "parallel.tp=2", "parallel.zero=3"), 1)
    one = pool.run(train_steps, 1, tuned("llama", *WITH_HEAD), 1)[0]
    pieces = {piece: value for rank in ranks for piece, value in rank.first}
    for (name, _), whole in one.first:
        for (other, start), value in pieces.items():
            if other == name:
                cut = tuple(slice(s, s + n) for s, n in zip(start, value.shape, strict=True))
                assert np.array_equal(whole[cut], value), name


class Drawn(TorchDispatchMode):
    """Notes the inputs of dropout, whole ones that torch would see to among all ranks included."""

    def __init__(self):
        super().__init__()
        self.inputs = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(word in str(function) for word in ("dropout", "bernoulli", "rand")):
            self.inputs += [type(arg) for arg in args if isinstance(arg, torch.Tensor)]
        return function(*args, **(kwargs or {}))


def train_and_note(config):
    """A task: two steps, and the types of tensors that were dropped out."""
    with Drawn() as drawn:
        return train_steps(config, 2), {kind.__name__ for kind in drawn.inputs}


@pytest.mark.parametrize("model", ["neox", "rwkv"])
def test_dropout_of_adapters_takes_place_on_each_rank_alone(pool, tuned, model):
    words = [*LORA, "finetune.lora.dropout=0.5", "parallel.tp=2"]
    ranks = pool.run(train_and_note, 2, tuned(model, *words))
    assert [kinds for _, kinds in ranks] == [{"Tensor"}] * 2
    assert_copies_are_equal([seen for seen, _ in ranks])
    assert ranks[0][0].losses == ranks[1][0].losses


def test_compiled_blocks_have_no_dropout_of_split_adapters(pool, tuned):
    words = [*LORA, "finetune.lora.dropout=0.5", "parallel.tp=2"]
    with pytest.raises(ConfigError, match="tensor ranks cannot draw their own dropout"):
        pool.run(train_steps, 2, tuned("neox", *words, "train.compile=true"))


def run_to_the_end(config):
    """A task: the whole run, as `castalia train` does it."""
    train(config)


@SLOW
def test_a_run_with_adapters_goes_on_with_another_layout(pool, tuned, tmp_path):
    """Three steps on tp 2 x zero 3, then two on one process."""
    common = [*WITH_HEAD, "train.exit_interval=3", f"checkpoint.dir={tmp_path / 'run'}"]
    pool.run(run_to_the_end, 4, tuned("llama", *common, "parallel.tp=2", "parallel.zero=3"))
    straight = pool.run(train_steps, 1, tuned("llama", *WITH_HEAD), 5)[0]
    resumed = tuned("llama", *WITH_HEAD, f"checkpoint.dir={tmp_path / 'more'}")
    changes = resumed.checkpoint.model_copy(update={"init_from": None, "resume": str(tmp_path / "run")})
    again = pool.run(train_steps, 1, resumed.model_copy(update={"checkpoint": changes}), 2)[0]
    np.testing.assert_allclose(again.losses, straight.losses[3:], rtol=5e-6)
    saved = open_checkpoint(tmp_path / "run", adapters=True)
    assert saved.optimizer is not None
    assert set(saved.optimizer) == {name for name in saved.model if "lora" in name}
    base = open_checkpoint(tuned("llama").checkpoint.init_from)
    assert all(torch.equal(saved.model[name].read(), ref.read()) for name, ref in base.model.items())
