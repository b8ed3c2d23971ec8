"""`castalia serve` with several processes, as real clients see it."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.serve.server_process import serving


@pytest.mark.slow
def test_two_processes_serve_and_end_together(models: Path, tmp_path: Path) -> None:
    body = {"prompt": "In the", "max_tokens": 40, "temperature": 1.0, "logit_bias": {"0": -100}}
    with serving(tmp_path / "one", str(models), "--device", "cpu", "--memory", "2GB") as served:
        alone = [_text(served.url, body | {"model": "neox", "seed": seed}) for seed in range(6)]
    with serving(tmp_path / "two", str(models), "--device", "cpu", "--memory", "2GB", "--tp", "2") as served:
        with ThreadPoolExecutor(6) as clients:
            asked = [body | {"model": "neox", "seed": seed} for seed in range(6)]
            assert list(clients.map(lambda each: _text(served.url, each), asked)) == alone
        assert _text(served.url, body | {"model": "llama", "seed": 1})
        refused = httpx.post(f"{served.url}/api/lens", json={"model": "neox", "text": "a"}, timeout=60)
        assert refused.status_code == 400 and "split over processes" in refused.text
        children = _children(served.process.pid)
        assert len(children) >= 2 and served.end() == 128 + signal.SIGTERM
        assert not any(Path(f"/proc/{child}").exists() for child in children)
        assert "Traceback" not in served.log.read_text() and "error" not in served.log.read_text()


@pytest.mark.slow
def test_a_process_that_dies_ends_the_server(models: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "log", str(models), "--device", "cpu", "--memory", "2GB", "--pp", "2") as served:
        assert _text(served.url, {"model": "neox", "prompt": "In the", "seed": 1})
        os.kill(_rank_one(served.process.pid), signal.SIGKILL)
        assert served.process.wait(60) == 128 + signal.SIGKILL
        assert "killed by signal 9" in served.log.read_text()


def _text(url: str, body: dict) -> str:
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    answer.raise_for_status()
    return answer.json()["choices"][0]["text"]


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _rank_one(pid: int) -> int:
    for _ in range(100):
        for child in _children(pid):
            if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
                return child
        time.sleep(0.1)
    raise AssertionError("no process has rank 1")
