"""Balancing of experts: loads become even, and the biases are part of what a run continues from."""

from __future__ import annotations

import torch

from castalia.checkpoint.opener import open_checkpoint
from castalia.cli.train import read_config
from castalia.config.schema import ExpertsConfig, ModelConfig
from castalia.model.transformer import Transformer
from castalia.parallel.executor import Executor
from castalia.train.balance import move_biases
from castalia.train.loop import train
from tests.train.test_neox_quirks import losses

EXPERTS = ExpertsConfig(count=8, top_k=2, width=8, router="balanced")
MODEL = ModelConfig(num_layers=2, hidden_size=16, num_heads=2, vocab_size=64, vocab_multiple=1, experts=EXPERTS)


def fullest(executor: Executor, tokens: torch.Tensor) -> float:
    """Tokens of the fullest expert over the mean, in one training pass."""
    mlp = executor.model.blocks["0"].mlp
    mlp.load = None
    with torch.no_grad():
        executor.model(tokens)
    return float(mlp.load.max() / mlp.load.double().mean())


def test_loads_become_even_and_routers_that_do_not_train_stay():
    model = Transformer(MODEL)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    for block in model.blocks.values():
        block.mlp.router.balance.bias.data.zero_()
    executor, tokens = Executor(model), torch.randint(64, (8, 64), generator=generator)
    model.blocks["1"].mlp.router.weight.requires_grad_(False)
    before = fullest(executor, tokens)
    for _ in range(200):
        fullest(executor, tokens)
        move_biases(executor, 0.005)
    assert before > 2 and fullest(executor, tokens) < before / 2
    assert model.blocks["0"].mlp.router.balance.bias.any()
    assert not model.blocks["1"].mlp.router.balance.bias.any()


def test_a_step_moves_each_bias_by_the_rate_towards_the_mean():
    load, bias = torch.tensor([5, 1, 3, 3]), torch.tensor([0.5, 0.0, 0.0, -1.0])
    model = Transformer(MODEL.with_({"num_layers": 1, "experts.count": 4}))
    mlp = model.blocks["0"].mlp
    mlp.load, mlp.router.balance.bias.data = load, bias.clone()
    move_biases(Executor(model), 0.25)
    assert mlp.router.balance.bias.tolist() == [0.25, 0.25, 0.0, -1.0]


def weights(run, step):
    return {name: ref.read() for name, ref in open_checkpoint(run / "checkpoints" / f"step_{step:06d}").model.items()}


def test_a_resumed_run_has_the_biases_of_one_that_never_stopped(tiny, tmp_path):
    """Nor does it matter whether the backward pass computes activations again, in which tokens are counted again."""
    mixture = "model.experts={count: 4, top_k: 2, width: 16, router: balanced, balance_rate: 0.01}"
    options = [mixture, "train.steps=6", "checkpoint.every=6", "eval.every=null", "log.every=1"]
    train(tiny(tmp_path / "whole", *options))
    train(tiny(tmp_path / "halves", *options, "train.exit_interval=3", "train.recompute=full"))
    train(read_config([str(tmp_path / "halves"), "train.exit_interval=null"]))
    assert losses(tmp_path / "whole") == losses(tmp_path / "halves")
    one, other = (weights(tmp_path / run, 6) for run in ("whole", "halves"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    bias = one["blocks.1.mlp.router.balance.bias"]
    assert bias.dtype == torch.float32 and bias.any() and bias.abs().max() <= 0.06
