"""What is asked of the machine, and what it answers."""

from __future__ import annotations

import os

import pytest
import torch

from castalia.cli.train import read_config
from castalia.evaluate.perplexity import evaluate
from castalia.train.hardware import repeat_bits
from castalia.train.loop import train
from castalia.train.metrics import read_metrics


@pytest.fixture
def switches(monkeypatch):
    """Puts back what `repeat_bits` changes for the whole process."""
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        monkeypatch.delenv(name, raising=False)
    yield
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        os.environ.pop(name, None)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def losses(folder):
    return [(record["step"], record["loss"], record["grad_norm"]) for record in read_metrics(folder)]


def test_determinism_is_strict_because_attention_heeds_nothing_less(switches):
    repeat_bits()
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.zeros(4).put_(torch.tensor([1, 1]), torch.ones(2))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # without it matrix products raise
    assert torch.zeros(4, device="meta").is_meta and not torch.utils.deterministic.fill_uninitialized_memory


def test_what_the_user_gave_cublas_and_nccl_stays(switches, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    repeat_bits()
    assert (os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["NCCL_ALGO"]) == (":16:8", "Ring")


def test_a_run_that_asks_for_determinism_has_it_and_the_same_losses_on_a_cpu(switches, tiny, tmp_path):
    options = ["train.steps=2", "eval.batches=0", "train.device=cpu"]
    train(tiny(tmp_path / "plain", *options), evaluate)
    assert not torch.are_deterministic_algorithms_enabled()
    train(tiny(tmp_path / "strict", *options, "train.deterministic=true"), evaluate)
    assert torch.are_deterministic_algorithms_enabled()
    assert losses(tmp_path / "plain") == losses(tmp_path / "strict") != []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [[], ["model.num_kv_heads=2", "data.mask_documents=true"]])
def test_a_stopped_run_goes_on_bit_for_bit_on_a_gpu(switches, tiny, tmp_path, options):
    """Heads of 64 and sequences of 512, so that several blocks of keys add to one gradient of the queries."""
    large = ["model.hidden_size=256", "data.seq_length=512", "precision.compute=bf16", "model.hidden_dropout=0.1"]
    options = [*large, *options, "train.device=cuda", "train.deterministic=true", "eval.batches=0"]
    train(tiny(tmp_path / "straight", *options), evaluate)
    train(tiny(tmp_path / "stopped", *options, "train.exit_interval=10"), evaluate)
    train(read_config([str(tmp_path / "stopped"), "train.exit_interval=null"]), evaluate)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")
