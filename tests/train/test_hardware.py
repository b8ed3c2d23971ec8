"""What is asked of the machine, and what it answers."""

from __future__ import annotations

import os

import pytest
import torch

from castalia.cli.train import read_config
from castalia.machine import allowed_memory, usable_cores
from castalia.observe.display import Display
from castalia.observe.metrics import read_events, read_metrics
from castalia.plan.devices import USABLE
from castalia.train.hardware import had_its_cores, machine_name, measured_flops, repeat_bits, usable_memory
from castalia.train.loop import train
from castalia.tune.replay import replay


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
    train(tiny(tmp_path / "plain", *options))
    assert not torch.are_deterministic_algorithms_enabled()
    train(tiny(tmp_path / "strict", *options, "train.deterministic=true"))
    assert torch.are_deterministic_algorithms_enabled()
    assert losses(tmp_path / "plain") == losses(tmp_path / "strict") != []


def test_a_peak_is_measured_only_where_other_work_leaves_the_cores_alone():
    assert had_its_cores(busy_s=0.39, seconds=0.1, threads=4)
    assert not had_its_cores(busy_s=0.3, seconds=0.1, threads=4)
    assert (measured_flops(torch.float32, size=64) or 1e11) > 1e8


def test_an_mfu_above_one_is_not_shown(capsys):
    display = Display()
    display.start(0, 2, 0)
    record = {"step": 1, "loss": 2.0, "lr": 0.1, "grad_norm": 1.0, "tokens": 100, "seconds": 1.0}
    display.advance(record)
    display.step(record, peak=400.0)
    display.advance(record | {"step": 2})
    display.step(record | {"step": 2, "tokens": 200}, peak=50.0)
    first, second = capsys.readouterr().out.splitlines()
    assert "100 tokens/s  MFU 25.0%" in first and "100 tokens/s  ETA" in second


@pytest.mark.gpu
@pytest.mark.parametrize("options", [[], ["model.num_kv_heads=2", "data.mask_documents=true"]])
def test_a_stopped_run_goes_on_bit_for_bit_on_a_gpu(switches, tiny, tmp_path, options):
    """Heads of 64 and sequences of 512, so that several blocks of keys add to one gradient of the queries."""
    large = ["model.hidden_size=256", "data.seq_length=512", "precision.compute=bf16", "model.hidden_dropout=0.1"]
    options = [*large, *options, "train.device=cuda", "train.deterministic=true", "eval.batches=0"]
    train(tiny(tmp_path / "straight", *options))
    train(tiny(tmp_path / "stopped", *options, "train.exit_interval=10"))
    train(read_config([str(tmp_path / "stopped"), "train.exit_interval=null"]))
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")
    found = replay(tmp_path / "straight", 15)
    assert found["loss_distance"] == found["grad_norm_distance"] == 0


def test_processes_of_a_machine_share_what_a_plan_calls_usable(monkeypatch):
    alone = usable_memory(torch.device("cpu"), 3)
    assert alone == pytest.approx(allowed_memory() * USABLE, abs=8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert usable_memory(torch.device("cpu"), 3) == pytest.approx(allowed_memory() / 4 * USABLE, abs=8)


def test_the_machine_in_words():
    assert machine_name(torch.device("cpu")) == f"CPU, {usable_cores()} cores"
    assert machine_name(torch.device("cpu"), 4).endswith(" cores, 4 processes")


def test_a_run_records_what_it_trains_on(tiny, tmp_path):
    train(tiny(tmp_path / "run", "train.steps=1", "eval.batches=0"))
    (start,) = (event for event in read_events(tmp_path / "run") if event["event"] == "start")
    assert "cores" in start["machine"] or torch.cuda.is_available()
