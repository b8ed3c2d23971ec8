"""One user's whole way: a NeoX config as it was published, an overlay, real text, a kill, a resume, a talking model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

KJV = Path(__file__).resolve().parents[2] / "examples" / "kjv" / "kjv.jsonl"
OVERLAY = """{
  "data-path": "kjv_text_document",
  "vocab-file": "tokenizer.json",
  "save": "run",
  "load": "run",
  "seq-length": 128,
  "max-position-embeddings": 128,
  "train-micro-batch-size-per-gpu": 8,
  "train-iters": 200,
  "lr-decay-iters": 200,
  "checkpoint-factor": 50,
  "eval-iters": 2,
  "fp16": {"enabled": false},
}
"""


def castalia(*args: str, cwd: Path) -> str:
    command = [sys.executable, "-m", "castalia", *args]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900, env=one_thread())
    assert result.returncode == 0, f"{args}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def records(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    complete = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in complete]


@pytest.mark.slow
def test_pythia_14m_from_its_yaml_is_killed_resumed_evaluated_and_talks(tmp_path, fixtures):
    castalia("tokenizer", "train", str(KJV), "--vocab-size", "1024", "--output", "tokenizer.json", cwd=tmp_path)
    prepare = ["data", "prepare", str(KJV), "--tokenizer", "tokenizer.json", "--output", "kjv", "--append-eod"]
    castalia(*prepare, cwd=tmp_path)
    (tmp_path / "overlay.yml").write_text(OVERLAY)
    train = ["train", str(fixtures / "configs" / "pythia_14M.yml"), "overlay.yml"]

    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "castalia", *train], cwd=tmp_path, env=one_thread(), stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while len(records(run)) < 120 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    assert process.wait() == -9, "the run ended before it could be killed"

    assert "step 100" in castalia("train", "run", cwd=tmp_path)
    losses = {record["step"]: record["loss"] for record in records(run)}
    assert list(losses) == list(range(1, 201))
    assert sum(losses[step] for step in range(181, 201)) / 20 < losses[1] - 2

    scores = json.loads(castalia("eval", "run", "--json", cwd=tmp_path))
    assert scores["loss"] < losses[1] - 2
    said = castalia("generate", "run", "--prompt", "And God said", "--max-tokens", "20", cwd=tmp_path)
    assert said.startswith("And God said") and len(said.split()) > 6
