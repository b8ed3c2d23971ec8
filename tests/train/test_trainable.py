"""The forum's story: somebody means to fine-tune a 20B and must not end with a small model trained from nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from castalia.cli.train import read_config, train
from castalia.config.load import load_config
from castalia.config.schema import ModelConfig
from castalia.data.config_corpora import batch_at
from castalia.errors import ConfigError
from castalia.language_model import load_model
from castalia.observe.metrics import read_metrics
from castalia.train.dry_run import rehearse
from castalia.train.run_header import HEADER
from tests.checkpoint.neox_writer import write

POSTER = """{
  "pipe_parallel_size": 4,
  "model_parallel_size": 2,

  "num_layers": 12,
  "hidden_size": 768,
  "num_attention_heads": 12,
  "seq_length": 2048,
  "max_position_embeddings": 2048,
  "pos_emb": "rotary",
  "no_weight_tying": true,

  "optimizer": {"type": "Adam", "params": {"lr": 6.0e-4, "betas": [0.9, 0.95]}},
  "zero_optimization": {"stage": 1},
  "train_micro_batch_size_per_gpu": 4,
  "data_path": "data/mydata_text_document",
  "train_iters": 5000,
  "fp16": {"enabled": true},

  "save": "checkpoints",
  "load": "checkpoints",
  "finetune": true,
  "checkpoint_factor": 1000,
}
"""
# As narrow as tests need it, but cut like the 20B: 44 layers on 2 tensor and 4 pipeline ranks.
NARROW = ModelConfig(
    num_layers=44, hidden_size=16, num_heads=2, vocab_size=257, vocab_multiple=2, max_positions=32, rotary_pct=0.25,
    parallel_residual=True,
)  # fmt: skip
NARROW_CONFIG = """{
  "pipe_parallel_size": 4, "model_parallel_size": 2, "make_vocab_size_divisible_by": 1,
  "num_layers": 44, "hidden_size": 16, "num_attention_heads": 2, "rotary_pct": 0.25,
  "seq_length": 32, "max_position_embeddings": 32, "pos_emb": "rotary", "no_weight_tying": true,
  "gpt_j_residual": true, "bias_gelu_fusion": true,
  "optimizer": {"type": "Adam", "params": {"lr": 1.0e-3, "betas": [0.9, 0.95]}},
  "zero_optimization": {"stage": 1},
  "train_micro_batch_size_per_gpu": 4, "train_iters": 2, "precision": "fp32",
  "load": "20B_checkpoints", "finetune": true, "save": "tuned"
}
"""


@pytest.fixture
def poster(tmp_path, monkeypatch):
    """The poster's folder: a config, and `checkpoints` with nothing in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "forum.yml").write_text(POSTER)
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


@pytest.fixture(scope="module")
def narrow_20b(tmp_path_factory):
    """What the 20B's authors would have published, narrow: v1 files of TP 2 x PP 4 with ZeRO-1 over two data ranks."""
    folder = tmp_path_factory.mktemp("published") / "20B_checkpoints"
    folder.mkdir()
    write(folder / "global_step150000", NARROW, tp=2, pp=4, dp=2, kind="old1", era="v1", dtype=torch.float16)
    (folder / "latest").write_text("global_step150000")
    return folder


def without_torch(*words):
    """The command line in an interpreter that cannot import torch."""
    code = f"import sys; sys.modules['torch'] = None; sys.argv = {['castalia', *words]!r}\n"
    code += "from castalia.cli.main import main; main()"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_with_nothing_to_load_it_stops_before_torch_is_imported_and_says_why(poster, options):
    done = without_torch("train", "forum.yml", *options)
    assert done.returncode == 2
    assert "forum.yml:21: checkpoint.init_from=checkpoints: the folder is empty" in done.stderr
    assert "nothing to fine-tune" in done.stderr
    assert "The 12 layers x 768 of this config would be a new model with random weights" in done.stderr
    assert "Name the folder that holds the checkpoint (NeoX: load)" in done.stderr
    assert sorted(path.name for path in poster.iterdir()) == ["checkpoints", "forum.yml"]
    assert not list((poster / "checkpoints").iterdir())
    (poster / "checkpoints").rmdir()
    assert "there is no such folder" in without_torch("train", "forum.yml", *options).stderr


def test_with_the_20b_in_place_it_says_what_disagrees(poster, narrow_20b):
    (poster / "checkpoints").rmdir()
    (poster / "checkpoints").symlink_to(narrow_20b)
    for save in ("checkpoints", "out"):  # the folder in use comes second
        with pytest.raises(ConfigError) as refusal:
            train(load_config("forum.yml", [f"save={save}"]))
        for line in (
            "checkpoints/global_step150000 is another model than the config describes",
            "model.num_layers: 44 in the checkpoint, 12 in the config (forum.yml:5)",
            "model.hidden_size: 16 in the checkpoint, 768 in the config (forum.yml:6)",
            "model.num_heads: 2 in the checkpoint, 12 in the config (forum.yml:7)",
            "or leave them out: the architecture then comes from the checkpoint",
        ):
            assert line in str(refusal.value)


def test_the_comparison_comes_before_any_memory_is_taken(narrow_20b, corpus, tmp_path):
    """The real 20B would need 300 GB here."""
    words = [f"checkpoint.init_from={narrow_20b}", f"checkpoint.dir={tmp_path / 'run'}", f"data.path={corpus}"]
    with pytest.raises(ConfigError, match="model.hidden_size: 16 in the checkpoint, 6144 in the config"):
        train(load_config("gpt-neox-20b", [*words, "train.device=cpu"]))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def right(narrow_20b, corpus, tmp_path):
    (tmp_path / "right.yml").write_text(NARROW_CONFIG)
    words = [f"load={narrow_20b}", f"save={tmp_path / 'tuned'}", f"data_path={corpus}", "tokenizer.kind=bytes"]
    return load_config(tmp_path / "right.yml", [*words, "data.split=1,0,0", f"data.cache_dir={tmp_path}"])


def test_with_the_right_config_it_fine_tunes(right, narrow_20b, corpus, tmp_path):
    train(right)
    said = " ".join(Path(right.checkpoint.dir, HEADER).read_text().split())
    for part in (
        "532 of 532 tensors, 152.6K parameters, NeoX v1, TP 2 x PP 4, step 9",
        "weights restored",
        "moments reset init_from begins a new run",
        "schedule reset",
        "step reset init_from begins a new run: the first step is 1 of 2",
        "data position reset",
        "one process: tp 2 x pp 4 x cp 1",
        "vocabulary 257 padded to 258",
    ):
        assert part in said
    assert "RANDOM" not in said
    first, *_ = read_metrics(tmp_path / "tuned")
    batch = batch_at(right.model_copy(update={"model": NARROW}), 1)
    published = load_model(narrow_20b)
    with torch.no_grad():
        total, number = published(torch.tensor(batch.tokens), labels=torch.tensor(batch.labels))
    assert first["loss"] == pytest.approx(float(total / number), rel=1e-5)  # it began from what was loaded
    trained, loaded = load_model(tmp_path / "tuned").state_dict(), published.state_dict()
    assert all(not torch.equal(trained[name], loaded[name]) for name in trained)


def test_what_the_config_leaves_open_is_told(right, narrow_20b, tmp_path, capsys):
    """GPT-NeoX would build another function from the same shapes, and say nothing."""
    text = NARROW_CONFIG.replace('"gpt_j_residual": true, ', "").replace('"rotary_pct": 0.25,', "")
    (tmp_path / "partial.yml").write_text(text)
    words = [f"load={narrow_20b}", f"save={tmp_path / 'other'}", f"data_path={right.data.path}", "tokenizer.kind=bytes"]
    rehearse(load_config(tmp_path / "partial.yml", [*words, "data.split=1,0,0", f"data.cache_dir={tmp_path}"]), True)
    said = " ".join(capsys.readouterr().out.split())
    assert "the checkpoint decides what the config leaves at its default: " in said
    assert "rotary_pct=0.25 instead of 1.0" in said
    assert "parallel_residual=True instead of False" in said


def test_the_architecture_need_not_be_repeated(right, corpus, narrow_20b, tmp_path, capsys):
    words = [f"checkpoint.init_from={narrow_20b}", f"checkpoint.dir={tmp_path / 'bare'}", f"data.path={corpus}"]
    words += ["tokenizer.kind=bytes", "data.seq_length=32", "train.batch_size=2", "train.steps=1", "data.split=1,0,0"]
    rehearse(load_config([], words), verbose=True)
    said = capsys.readouterr().out
    assert "model.num_layers 44 from the checkpoint" in " ".join(said.split())
    assert "memory: tensors took" in said
    assert not (tmp_path / "bare").exists()


def test_what_was_loaded_must_know_something(straight, tiny, tmp_path, capsys):
    """Loss beside ln(vocabulary): near it, weights that were loaded know nothing about the data."""
    rehearse(tiny(tmp_path / "run", f"checkpoint.init_from={straight}"))
    assert "no better than random" not in capsys.readouterr().out
    train(tiny(tmp_path / "random", "train.steps=2", "train.exit_interval=1", "eval.every=null", "optimizer.lr=1e-9"))
    train(read_config([str(tmp_path / "random")]))
    assert "no better than random" not in capsys.readouterr().out  # random weights were asked for, and then its own
    rehearse(tiny(tmp_path / "run", f"checkpoint.init_from={tmp_path / 'random'}"))
    said = " ".join(capsys.readouterr().out.split())
    assert "would give 5.5491, ln(vocabulary)" in said
    assert "predicts this data no better than random weights would: the corpus may belong to another tokenizer" in said
