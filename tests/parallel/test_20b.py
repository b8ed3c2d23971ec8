"""The config of GPT-NeoX-20B in small: its TP 2 x PP 4 with ZeRO-1 on eight processes, then on one, then text."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from castalia.observe.metrics import read_metrics

OVERLAY = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "train_iters": 6,
    "lr_decay_iters": 6,
    "gradient_accumulation_steps": 4,
}


def castalia(*words, folder):
    """What a command prints."""
    words = [sys.executable, "-m", "castalia", *map(str, words)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_20b_in_small_trains_on_eight_processes_and_goes_on_on_one(fixtures, tmp_path):
    data = fixtures / "neox" / "data"
    paths = {"vocab_file": data / "tok.json", "data_path": data / "enwik8_text_document"}
    paths |= {"save": "run", "load": "run", "tensorboard-dir": "tensorboard", "log_dir": "logs"}
    overlay = OVERLAY | {key: str(path) for key, path in paths.items()}
    (tmp_path / "small.yml").write_text(json.dumps(overlay))
    config = fixtures / "configs" / "20B.yml"
    cache = "data.cache_dir=cache"
    printed = castalia("train", config, "small.yml", cache, "train.exit_interval=4", "--nproc", 8, folder=tmp_path)
    assert "PP 4 x TP 2" in printed
    one = ["parallel.tp=1", "parallel.pp=1", "parallel.gpus=null", "train.exit_interval=null"]
    assert "done: 6 steps" in castalia("train", "run", *one, folder=tmp_path)
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    prompt = "And the "
    printed = castalia("generate", "run", "--prompt", prompt, "--max-tokens", 8, folder=tmp_path)
    assert prompt in printed and len(printed.strip()) > len(prompt)
