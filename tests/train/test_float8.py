"""A run in float8: what it says of itself, its bits after a resume, and what it refuses."""

from __future__ import annotations

import shutil

import pytest

from castalia.checkpoint.opener import open_checkpoint
from castalia.cli.train import read_config, train
from castalia.config.load import load_config
from castalia.errors import ConfigError
from castalia.observe.metrics import read_metrics
from castalia.plan.devices import DEVICES
from castalia.plan.run_plan import Hardware, RunFacts, report
from castalia.train.evaluation import evaluate_checkpoint
from tests.train.test_loop import assert_equal_runs

# 36 columns of the MLP are no multiple of 16.
FLOAT8 = ("precision.compute=fp8", "model.mlp_size=36", "model.hidden_dropout=0.1")


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("float8") / "run"
    train(tiny(folder, *FLOAT8))
    return folder


def test_a_resumed_run_has_the_same_bits(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    train(read_config([str(tmp_path / "run"), "checkpoint.step=10"]))
    assert_equal_runs(tmp_path / "run", run)


def test_it_says_what_multiplies_in_float8(run):
    header = " ".join((run / "header.txt").read_text().split())
    assert "fp8 compute; fp32 weights" in header
    assert "attn.qkv and attn.out of 2 blocks multiply in float8, with a scale for each tensor, all else in" in header
    assert "mlp.up, mlp.down also in bf16, having a size that is no multiple of 16; on a CPU for its numbers" in header
    assert open_checkpoint(run).config.precision.compute == "fp8"


def test_what_reads_it_computes_in_bf16(run):
    assert evaluate_checkpoint(open_checkpoint(run))["precision"] == "bf16"


def test_other_runs_differ(run, tiny, tmp_path):
    train(tiny(tmp_path / "run", *FLOAT8, "precision.compute=bf16"))
    ours, plain = ([record["loss"] for record in read_metrics(folder)] for folder in (run, tmp_path / "run"))
    assert ours != plain and ours == pytest.approx(plain, rel=0.02)


def plan(gpus, *words):
    given = ["train.micro_batch_size=16", "train.batch_size=16", "train.recompute=none"]
    config = load_config(["pythia-1.4b"], [*given, *words])
    return report(config, RunFacts(), Hardware(1, DEVICES[gpus]) if gpus else None)


def test_it_is_planned():
    wide, narrow = (plan("h100", f"precision.compute={compute}").sized for compute in ("bf16", "fp8"))
    assert narrow.memory.largest < wide.memory.largest
    assert 0.5 < narrow.time.seconds_per_step / wide.time.seconds_per_step < 1
    assert plan(None, "precision.compute=fp8").sized.memory.largest == narrow.memory.largest
    with pytest.raises(ConfigError, match="fp8 needs GPUs of compute capability 8.9 .*A100-80 has 8.0"):
        plan("a100-80", "precision.compute=fp8")


def test_what_float8_does_not_go_with(tiny, tmp_path):
    with pytest.raises(ConfigError, match="of which this model has none whose sizes are multiples of 16"):
        tiny(tmp_path, *FLOAT8, "model.pattern=[mamba]", "model.norm=rmsnorm")
    with pytest.raises(ConfigError, match=r"rounds by more than train.objective=dpo may find .*=bf16"):
        tiny(tmp_path, *FLOAT8, "train.objective=dpo")
