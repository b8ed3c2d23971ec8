"""Filling models and optimizers from checkpoints."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from castalia.checkpoint.formats.native.save import CheckpointSaver
from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.restore import load_optimizer, load_shards, optimizer_state
from castalia.checkpoint.tensors import Progress, Shard
from castalia.config.schema import ModelConfig, OptimizerConfig, RunConfig
from castalia.errors import CheckpointError
from castalia.language_model import load_model
from castalia.loading import load_weights
from castalia.model.init import initialize
from castalia.model.transformer import Transformer
from castalia.train.optimizer import make_optimizer
from castalia.train.update_rules import AnyOptimizer
from castalia.units import short_number

MODEL = ModelConfig(num_layers=2, hidden_size=16, num_heads=2, vocab_size=60, vocab_multiple=64, max_positions=32)
TOKENS = torch.arange(24).view(2, 12)


def build(cfg: ModelConfig = MODEL, seed: int = 1) -> Transformer:
    model = Transformer(cfg)
    initialize(model, cfg, seed)
    return model


def fresh(model: Transformer, **settings) -> AnyOptimizer:
    return make_optimizer(dict(model.named_parameters()), OptimizerConfig(lr=1e-2, **settings))


def trained(model: Transformer, steps: int = 3, **settings) -> AnyOptimizer:
    optimizer = fresh(model, **settings)
    train(model, optimizer, steps)
    return optimizer


def train(model: Transformer, optimizer: AnyOptimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss, count = model(TOKENS[:, :-1], TOKENS[:, 1:])
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def save(folder: Path, model: Transformer, optimizer: AnyOptimizer | None = None) -> Path:
    state = None if optimizer is None else optimizer_state(optimizer, dict(model.named_parameters()))
    with CheckpointSaver(folder) as writer:
        writer.save(dict(model.named_parameters()), state, Progress(step=3), RunConfig(model=model.cfg))
    return folder


@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": True}, {"norm": "rmsnorm", "gated_mlp": True, "num_kv_heads": 1}]
)
def test_a_loaded_model_gives_the_same_logits(tmp_path: Path, changes: dict) -> None:
    model = build(MODEL.model_copy(update=changes))
    loaded = load_model(save(tmp_path, model))
    assert not loaded.training
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS), model.eval()(TOKENS))
        half = load_model(tmp_path, dtype=torch.bfloat16)
        assert half(TOKENS).dtype == torch.bfloat16
        assert torch.allclose(half(TOKENS).float(), loaded(TOKENS), atol=0.05)


@pytest.mark.parametrize(
    "settings",
    [{}, {"name": "lion"}, {"name": "sgd"}, {"name": "sgd", "momentum": 0.0}, {"name": "adafactor"}, {"name": "muon"}],
)
def test_training_goes_on_bit_for_bit(tmp_path: Path, settings: dict) -> None:
    model = build()
    optimizer = trained(model, **settings)
    checkpoint = open_checkpoint(save(tmp_path, model, optimizer))
    resumed = build(seed=2)
    other = fresh(resumed, **settings)
    load_weights(resumed, checkpoint)
    load_optimizer(other, dict(resumed.named_parameters()), checkpoint)
    assert train(resumed, other, 3) == train(model, optimizer, 3)


def test_the_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    model = build()
    checkpoint = open_checkpoint(save(tmp_path, model, trained(model)))
    for settings in ({"name": "lion"}, {"name": "muon"}, {"name": "sgd", "momentum": 0.0}):
        with pytest.raises(CheckpointError, match="that of another optimizer.*exp_avg_sq.*load_optimizer=false"):
            load_optimizer(fresh(model, **settings), dict(model.named_parameters()), checkpoint)


def test_the_report_says_what_came(tmp_path: Path) -> None:
    model = build()
    report = load_weights(build(seed=2), open_checkpoint(save(tmp_path, model)))
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert str(report) == "28 of 28 tensors, 8,640 parameters, Castalia, step 3"
    assert [short_number(n) for n in (20_556_201_984, 162_519_552, 512)] == ["20.56B", "162.5M", "512"]


def test_everything_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(tmp_path, build()))
    other = build(MODEL.model_copy(update={"tie_embeddings": True, "mlp_size": 48, "gated_mlp": True, "num_layers": 1}))
    before = [parameter.clone() for parameter in other.parameters()]
    with pytest.raises(CheckpointError) as caught:
        load_weights(other, checkpoint)
    message = str(caught.value)
    assert "missing: blocks.0.mlp.gate.weight [48, 16]" in message
    assert "unexpected: head.weight [64, 16]" in message
    assert "unexpected: blocks.1.norm1.bias [16]" in message
    assert "blocks.0.mlp.up.weight has shape [64, 16] in the checkpoint, [48, 16] in the model" in message
    assert all(torch.equal(*pair) for pair in zip(before, other.parameters(), strict=True))


@pytest.mark.parametrize("multiple, rows", [(128, 128), (1, 60)])
def test_only_padding_of_the_vocabulary_may_differ(tmp_path: Path, multiple: int, rows: int) -> None:
    model = build()
    optimizer = trained(model)
    checkpoint = open_checkpoint(save(tmp_path, model, optimizer))
    other = build(MODEL.model_copy(update={"vocab_multiple": multiple}))
    other_optimizer = fresh(other)
    report = load_weights(other, checkpoint)
    load_optimizer(other_optimizer, dict(other.named_parameters()), checkpoint, other.cfg.vocab_size)
    assert f"embed.weight: 64 rows in the checkpoint, {rows} in the model" in report.notes[0]
    moments = other_optimizer.state[other.embed.weight]["exp_avg"]
    for found, saved in (
        (other.embed.weight, model.embed.weight),
        (moments, optimizer.state[model.embed.weight]["exp_avg"]),
    ):
        assert torch.equal(found[:60], saved[:60])
        assert not found[64:].any()
    larger = build(MODEL.model_copy(update={"vocab_size": 100}))
    with pytest.raises(CheckpointError, match=r"embed.weight has shape \[64, 16\] in the checkpoint, \[128, 16\]"):
        load_weights(larger, checkpoint)


def test_a_part_that_is_all_padding_becomes_zero(tmp_path: Path) -> None:
    """The second half of the padded rows is as large as all rows that were saved."""
    checkpoint = open_checkpoint(save(tmp_path, build()))
    half = torch.ones(64, 16)
    cfg = MODEL.model_copy(update={"vocab_multiple": 128})
    load_shards({"embed.weight": Shard(half, (128, 16), (64, 0))}, cfg, checkpoint)
    assert not half.any()


def test_weights_alone_cannot_be_resumed(tmp_path: Path) -> None:
    model = build()
    checkpoint = open_checkpoint(save(tmp_path, model))
    with pytest.raises(CheckpointError, match="no optimizer state.*checkpoint.init_from"):
        load_optimizer(fresh(model), dict(model.named_parameters()), checkpoint)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to see anonymous memory")
def test_loading_needs_the_model_and_one_tensor(tmp_path: Path) -> None:
    """In a process of its own, sampled by a thread: libraries and threads differ too much to share one."""
    cfg = ModelConfig(num_layers=4, hidden_size=768, num_heads=12, vocab_size=4096)
    model = Transformer(cfg)
    size, largest = (
        4 * n for n in (sum(p.numel() for p in model.parameters()), max(p.numel() for p in model.parameters()))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    save(tmp_path / "large", model)
    save(tmp_path / "small", build())  # loaded first, so that imports are not counted
    script = f"""
    import re, threading, time, torch
    from castalia.language_model import load_model
    def anonymous():
        return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
    peak, done = 0, False
    def watch():
        global peak
        while not done:
            peak = max(peak, anonymous())
            time.sleep(0.0005)
    load_model({str(tmp_path / "small")!r})
    before = anonymous()
    thread = threading.Thread(target=watch)
    thread.start()
    model = load_model({str(tmp_path / "large")!r})
    done = True
    thread.join()
    print(peak - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 0.9 * size < int(done.stdout) < size + largest
